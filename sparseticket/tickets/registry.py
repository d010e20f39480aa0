"""Names of the search methods and their configs."""

from __future__ import annotations

from .edge_popup import EdgePopup

__all__ = ["METHODS", "get_method"]

METHODS: dict[str, type] = {EdgePopup.name: EdgePopup}


def get_method(name: str) -> type:
    """The config class of a method; ValueError with the known names for any other."""
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, known: {', '.join(METHODS)}")
    return METHODS[name]
