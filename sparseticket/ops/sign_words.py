from __future__ import annotations

import torch

from sparseticket import prng
from sparseticket.formats import canonical_shape, words_shape
from sparseticket.reference import sign_words as _reference

from ._dispatch import C, cap, define, nthreads
from .regenerate import check_calls, check_recipe

__all__ = ["sign_words"]


def _cpu(seed, layer, shape, *, device=None):
    words = _meta(seed, layer, shape, device=device)
    key, high = prng.stream_key(seed, layer, "sign")
    C.sign_words(cap(words), key, high, nthreads())
    return words


def _cuda(seed, layer, shape, *, device=None):
    from sparseticket.kernels.sign_words import sign_words as launch

    words = _meta(seed, layer, shape, device=device)
    launch(words, *prng.stream_key(seed, layer, "sign"))
    return words


def _meta(seed, layer, shape, *, device=None):
    check_recipe("sign_words", seed, "signed_constant")
    check_calls(*canonical_shape(shape), "signed_constant")
    return torch.empty(words_shape(shape), dtype=torch.int32, device=device or "cpu")


sign_words = define(
    "sign_words(int seed, int layer, SymInt[] shape, *, Device? device=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.sign_words,
    meta=_meta,
    factory=True,
    cuda=_cuda,
)
