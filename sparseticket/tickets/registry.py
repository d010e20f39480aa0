"""Names of the search methods and their configs."""

from __future__ import annotations

from .biprop import Biprop
from .edge_popup import EdgePopup
from .frozen import Frozen
from .gem_miner import GemMiner
from .hidden_fold import HiddenFold
from .iterand import IteRand
from .multicoat import Multicoat
from .signed_supermask import SignedSupermask
from .supermask import Supermask
from .supsup import SupSup

__all__ = ["METHODS", "get_method"]

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


def get_method(name: str) -> type:
    """The config class of a method; ValueError with the known names for any other."""
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, known: {', '.join(METHODS)}")
    return METHODS[name]
