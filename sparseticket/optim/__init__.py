"""Optimizers that update scores and select masks in one pass."""

from .popup import PopupAdamW, PopupSGD

__all__ = ["PopupAdamW", "PopupSGD"]
