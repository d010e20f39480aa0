"""Optimizers of sparse modules: scores with their masks, or weights under theirs, in one pass."""

from .masked import MaskedAdamW, MaskedSGD
from .popup import PopupAdamW, PopupSGD

__all__ = ["MaskedAdamW", "MaskedSGD", "PopupAdamW", "PopupSGD"]
