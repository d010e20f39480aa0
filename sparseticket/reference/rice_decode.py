from __future__ import annotations

import torch

from .pack_mask import pack_mask

__all__ = ["rice_decode"]


def rice_decode(
    payload: torch.Tensor, rows: int, k: int, kept: int, parameter: int
) -> torch.Tensor:
    """Packed words ``[rows, 2*ceil(k/64)]`` of a Rice code; ValueError unless it holds exactly
    ``kept`` ones inside rows*k weights and ends with its last bit's byte, zero-padded."""
    bits = [(byte >> i) & 1 for byte in payload.tolist() for i in range(8)]
    mask = torch.zeros(rows * k, dtype=torch.bool)
    cursor, position = 0, -1
    for _ in range(kept):
        quotient = 0
        while cursor < len(bits) and bits[cursor]:
            quotient, cursor = quotient + 1, cursor + 1
        cursor += 1
        if cursor + parameter > len(bits):
            raise ValueError("payload: the Rice code ends too early")
        low = sum(bits[cursor + i] << i for i in range(parameter))
        cursor += parameter
        position += (quotient << parameter) + low + 1
        if position >= rows * k:
            raise ValueError("payload: the Rice code runs past the mask")
        mask[position] = True
    if len(bits) - cursor >= 8 or any(bits[cursor:]):
        raise ValueError("payload: the Rice code has bytes left over")
    return pack_mask(mask.view(rows, k)).to(payload.device)
