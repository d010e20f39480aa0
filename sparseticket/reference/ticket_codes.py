from __future__ import annotations

import torch
import torch.nn.functional as F

from .sign_words import sign_words
from .unpack_mask import unpack_mask

__all__ = ["codes_shape", "ticket_codes"]

_COLUMNS = 16  # of a code word


def codes_shape(rows: int, k: int) -> tuple[int, int]:
    """Shape of the codes of a ``[rows, k]`` matrix: chunks of 16 columns, rows padded to 16."""
    return -(-k // _COLUMNS), -(-rows // 16) * 16


def ticket_codes(
    words: torch.Tensor | None,
    k: int,
    seed: int,
    layer: int,
    signs: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """int32 codes ``[ceil(k/16), O padded to 16]`` of weights in {0, +c, -c}, two bits a weight.

    Digit i of a word is 1 plus the sign of weight ``16*chunk + i`` of its row, 1 where the mask
    drops it and in the padding: of every four digits, ``d0 + 3*d1 + 9*d2`` in bits 5g..5g+4 and
    ``d3`` in bits 20+2g, 21+2g of group g. ``words=None``: all are kept. ``signs``: the layer's
    sign words if the caller has them. ``transposed``: codes of the transpose, ``[ceil(O/16), k
    padded to 16]``.
    """
    rows = (signs if words is None else words).shape[0]
    if signs is None:
        signs = sign_words(seed, layer, (rows, k), device=words.device)
    digits = 1 - 2 * unpack_mask(signs, (rows, k)).long()
    if words is not None:
        digits *= unpack_mask(words, (rows, k))
    digits = digits.t() if transposed else digits
    chunks, padded = codes_shape(*digits.shape)
    tail = (0, _COLUMNS * chunks - digits.shape[1], 0, padded - digits.shape[0])
    groups = 1 + F.pad(digits, tail).reshape(padded, chunks, 4, 4)
    g = torch.arange(4, device=digits.device)
    three = (groups[..., :3] * torch.tensor([1, 3, 9], device=digits.device)).sum(-1)
    code = ((three << 5 * g) + (groups[..., 3] << 20 + 2 * g)).sum(-1)
    return code.t().to(torch.int32).contiguous()
