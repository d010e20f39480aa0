from __future__ import annotations

import torch

__all__ = ["mask_ops"]


def mask_ops(a: torch.Tensor, b: torch.Tensor | None, op: str) -> torch.Tensor:
    """``and``/``or``/``xor``/``andnot`` (a & ~b) of packed words, or an int64 scalar tensor:
    ``popcount`` of ``a``, ``hamming`` distance of ``a`` and ``b``."""
    if op == "popcount":
        return _popcount(a)
    if op == "hamming":
        return _popcount(a ^ b)
    if op == "and":
        return a & b
    if op == "or":
        return a | b
    if op == "xor":
        return a ^ b
    return a & ~b


def _popcount(words: torch.Tensor) -> torch.Tensor:
    place = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> place) & 1).sum(dtype=torch.int64)
