"""Search methods: one file and one config each, found by name in the registry."""

from .edge_popup import EdgePopup
from .registry import METHODS, get_method

__all__ = ["METHODS", "EdgePopup", "get_method"]
