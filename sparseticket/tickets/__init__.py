"""Search and pruning methods: one file and one config each, found by name in the registry.

The configs are attributes of this package: ``tickets.GemMiner``.
"""

from .engine import Strong, select
from .pruning import prune_
from .registry import METHODS, PRUNERS, get_method, get_pruner
from .supsup import infer_task, set_task, superpose

_BY_CLASS = {config.__name__: config for config in (*METHODS.values(), *PRUNERS.values())}

__all__ = ["METHODS", "PRUNERS", "Strong", "get_method", "get_pruner", "infer_task", "prune_"]
__all__ += ["select", "set_task", "superpose"]
__all__ += sorted(_BY_CLASS)


def __getattr__(name: str) -> type:
    if name not in _BY_CLASS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _BY_CLASS[name]
