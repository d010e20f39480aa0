from __future__ import annotations

import torch

from sparseticket.reference import rice_encode as _reference

from ._dispatch import C, cap, check_words, define, nthreads

__all__ = ["rice_bits", "rice_encode"]


def rice_bits(words: torch.Tensor, k: int, parameter: int) -> int:
    """Length in bits of the Rice code of a CPU mask, without making it."""
    check_words("rice_bits", words, words.shape[0], k)
    return C.rice_encode(cap(words.contiguous()), k, parameter, None)


def _check(words, k, parameter):
    check_words("rice_encode", words, words.shape[0], k)
    if not 0 <= parameter <= 30:
        raise ValueError(f"rice_encode: parameter: got {parameter}, need 0..30")


def _cpu(words, k, parameter):
    _check(words, k, parameter)
    rows, words = words.shape[0], cap(words.contiguous())
    kept = C.mask_count(words, words, False, nthreads())
    # All quotients together are at most the last position's; the kernel wants 8 bytes to spare.
    most = kept * (1 + parameter) + (rows * k >> parameter)
    payload = torch.empty(most // 8 + 9, dtype=torch.uint8)
    bits = C.rice_encode(words, k, parameter, cap(payload))
    return payload[: (bits + 7) // 8].clone()


def _meta(words, k, parameter):
    _check(words, k, parameter)
    if words.device.type == "meta":
        raise NotImplementedError("rice_encode: words: the code of a meta tensor has no known size")
    return words.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


rice_encode = define(
    "rice_encode(Tensor words, SymInt k, int parameter) -> Tensor",
    cpu=_cpu,
    reference=_reference.rice_encode,
    meta=_meta,
    check=_check,
)
