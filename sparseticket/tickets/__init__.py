"""Search methods: one file and one config each, found by name in the registry.

The configs are attributes of this package: ``tickets.GemMiner``.
"""

from .engine import Strong, select
from .registry import METHODS, get_method
from .supsup import infer_task, set_task, superpose

_BY_CLASS = {config.__name__: config for config in METHODS.values()}

__all__ = ["METHODS", "Strong", "get_method", "infer_task", "select", "set_task", "superpose"]
__all__ += sorted(_BY_CLASS)


def __getattr__(name: str) -> type:
    if name not in _BY_CLASS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _BY_CLASS[name]
