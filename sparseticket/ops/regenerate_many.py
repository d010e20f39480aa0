from __future__ import annotations

import torch

from sparseticket import prng
from sparseticket.formats import canonical_shape
from sparseticket.reference import regenerate_many as _reference

from ._dispatch import check_words, define
from .regenerate import as_laid_out, check_calls, check_recipe, laid_out, regenerate

__all__ = ["regenerate_many"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cpu(words, seeds, layers, ndims, sizes, sigmas, dtype=None, channels_last=False):
    shapes = _checked(words, seeds, layers, ndims, sizes, sigmas, dtype)
    options = {"dtype": dtype, "device": "cpu", "channels_last": channels_last}
    return [
        regenerate(seed, layer, shape, "signed_constant", sigma, words=mask, **options)
        for mask, seed, layer, shape, sigma in zip(
            words, seeds, layers, shapes, sigmas, strict=True
        )
    ]


def _cuda(words, seeds, layers, ndims, sizes, sigmas, dtype=None, channels_last=False):
    from sparseticket.kernels.regenerate_many import regenerate_many as launch

    dtype = dtype or torch.float32
    kernel_dtype = dtype if dtype in _KERNEL_DTYPES else torch.float32
    shapes = _shapes(ndims, sizes)
    layouts = [laid_out(shape, channels_last) for shape in shapes]
    flat = [
        torch.empty(rows * channels * taps, dtype=kernel_dtype, device=w.device)
        for w, (rows, channels, taps) in zip(words, layouts, strict=True)
    ]
    keys = [prng.stream_key(s, i, "sign") for s, i in zip(seeds, layers, strict=True)]
    launch(flat, [w.contiguous() for w in words], layouts, [float(s) for s in sigmas], keys)
    return [
        as_laid_out(f.to(dtype), shape, channels_last)
        for f, shape in zip(flat, shapes, strict=True)
    ]


def _reference_body(words, seeds, layers, ndims, sizes, sigmas, dtype=None, channels_last=False):
    return _reference.regenerate_many(
        words, seeds, layers, ndims, sizes, sigmas, dtype or torch.float32, channels_last
    )


def _shapes(ndims, sizes):
    starts = [sum(ndims[:i]) for i in range(len(ndims))]
    return [sizes[start : start + ndim] for start, ndim in zip(starts, ndims, strict=True)]


def _checked(words, seeds, layers, ndims, sizes, sigmas, dtype):
    """The shapes; raises for what the op cannot take."""
    lists = {"seeds": seeds, "layers": layers, "ndims": ndims, "sigmas": sigmas}
    for name, given in lists.items():
        if len(given) != len(words):
            raise ValueError(f"regenerate_many: {name}: got {len(given)} for {len(words)} masks")
    if any(n < 0 for n in ndims) or sum(ndims) != len(sizes):
        raise ValueError(
            f"regenerate_many: sizes: got {len(sizes)}, need {list(ndims)}, as many as ndims says"
        )
    shapes = _shapes(ndims, sizes)
    for mask, seed, shape in zip(words, seeds, shapes, strict=True):
        check_recipe("regenerate_many", seed, "signed_constant", dtype=dtype or torch.float32)
        rows, k = canonical_shape(shape)
        check_calls(rows, k, "signed_constant")
        check_words("regenerate_many", mask, rows, k)
    return shapes


def _meta(words, seeds, layers, ndims, sizes, sigmas, dtype=None, channels_last=False):
    shapes = _checked(words, seeds, layers, ndims, sizes, sigmas, dtype)
    return [
        torch.empty(
            shape,
            dtype=dtype or torch.float32,
            device=mask.device,
            memory_format=torch.channels_last
            if channels_last and len(shape) == 4
            else torch.contiguous_format,
        )
        for mask, shape in zip(words, shapes, strict=True)
    ]


regenerate_many = define(
    "regenerate_many(Tensor[] words, int[] seeds, int[] layers, int[] ndims, SymInt[] sizes,"
    " float[] sigmas, ScalarType? dtype=None, bool channels_last=False) -> Tensor[]",
    cpu=_cpu,
    reference=_reference_body,
    meta=_meta,
    cuda=_cuda,
)
