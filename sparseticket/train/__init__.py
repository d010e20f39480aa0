"""Models, data, the training loop and the experiments of the command line."""

from .data import DATASETS, Dataset, load_dataset, loaders
from .loop import (
    Callback,
    LoopState,
    Recipe,
    SearchResult,
    TrainResult,
    evaluate,
    search,
    train_dense,
)
from .models import MODELS, build_model

__all__ = [
    "DATASETS",
    "MODELS",
    "Callback",
    "Dataset",
    "LoopState",
    "Recipe",
    "SearchResult",
    "TrainResult",
    "build_model",
    "evaluate",
    "load_dataset",
    "loaders",
    "search",
    "train_dense",
]
