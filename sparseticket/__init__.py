"""Find, train, store and run lottery tickets: masks over weights that are frozen or trained."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch  # noqa: F401  (first: the compiled module shares torch's OpenMP runtime)

from ._build import load_compiled

__version__ = "0.1.0"

_EXPORTS = {
    "masks": ("PackedMask", "random_mask", "regenerate", "select_mask"),
    "nn": (
        "SparseConv1d",
        "SparseConv2d",
        "SparseConvTranspose2d",
        "SparseEmbedding",
        "SparseLinear",
        "SparseMultiheadAttention",
        "attach",
        "densify_",
        "explain",
        "fuse_batchnorm_",
        "sparsify_",
        "to_form_",
        "tune",
        "update_masks",
    ),
    "optim": ("MaskedAdamW", "MaskedSGD", "PopupAdamW", "PopupSGD"),
    "tickets": (
        "Biprop",
        "EdgePopup",
        "Frozen",
        "GemMiner",
        "HiddenFold",
        "IteRand",
        "Multicoat",
        "SignedSupermask",
        "SupSup",
        "Supermask",
        "infer_task",
        "set_task",
        "superpose",
    ),
    "io": (
        "Ticket",
        "TicketError",
        "export_dense",
        "export_onnx",
        "import_masks",
        "to_dense",
    ),
    "train": ("search",),
}
_PACKAGES = ("theory",)
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]

load_compiled(Path(__file__).parent)


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'sparseticket' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
