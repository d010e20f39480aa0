"""Names of the search methods, of the pruning methods, and their configs."""

from __future__ import annotations

from .biprop import Biprop
from .edge_popup import EdgePopup
from .frozen import Frozen
from .gem_miner import GemMiner
from .grasp import GraSP
from .hidden_fold import HiddenFold
from .iterand import IteRand
from .magnitude import Magnitude
from .multicoat import Multicoat
from .random_pruning import RandomPruning
from .signed_supermask import SignedSupermask
from .snip import SNIP
from .supermask import Supermask
from .supsup import SupSup
from .synflow import SynFlow

__all__ = ["METHODS", "PRUNERS", "get_method", "get_pruner"]

_CONFIGS = (
    EdgePopup,
    GemMiner,
    Frozen,
    Supermask,
    SignedSupermask,
    IteRand,
    Biprop,
    Multicoat,
    SupSup,
    HiddenFold,
)
METHODS: dict[str, type] = {config.name: config for config in _CONFIGS}
PRUNERS: dict[str, type] = {c.name: c for c in (Magnitude, RandomPruning, SNIP, GraSP, SynFlow)}


def get_method(name: str) -> type:
    """The config class of a method; ValueError with the known names for any other."""
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, known: {', '.join(METHODS)}")
    return METHODS[name]


def get_pruner(name: str) -> type:
    """The config class of a pruning method; ValueError with the known names for any other."""
    if name not in PRUNERS:
        raise ValueError(f"pruner: got {name!r}, known: {', '.join(PRUNERS)}")
    return PRUNERS[name]
