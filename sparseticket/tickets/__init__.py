"""Search methods: one file and one config each, found by name in the registry."""

from .biprop import Biprop
from .edge_popup import EdgePopup
from .engine import Strong, select
from .frozen import Frozen
from .gem_miner import GemMiner
from .hidden_fold import HiddenFold
from .iterand import IteRand
from .multicoat import Multicoat
from .registry import METHODS, get_method
from .signed_supermask import SignedSupermask
from .supermask import Supermask
from .supsup import SupSup, infer_task, set_task, superpose

__all__ = [
    "METHODS",
    "Biprop",
    "EdgePopup",
    "Frozen",
    "GemMiner",
    "HiddenFold",
    "IteRand",
    "Multicoat",
    "SignedSupermask",
    "Strong",
    "SupSup",
    "Supermask",
    "get_method",
    "infer_task",
    "select",
    "set_task",
    "superpose",
]
