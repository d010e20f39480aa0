from __future__ import annotations

import functools

import torch

from sparseticket import prng
from sparseticket.formats import canonical_shape, channels_and_taps
from sparseticket.reference import regenerate as _reference

from ._dispatch import C, cap, check_words, define, nthreads
from .apply_mask import apply_mask

__all__ = ["as_laid_out", "check_calls", "check_recipe", "laid_out", "regenerate"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _cpu(seed, layer, shape, dist, sigma, *, dtype=None, device=None, words=None, **options):
    _check(seed, shape, dist, options.get("stream", "magnitude"), dtype or torch.float32, words)
    if dist == "constant":
        return _constant(shape, sigma, dtype, device, words, **options)
    kernel_dtypes = (torch.float32, torch.bfloat16)

    def run(flat, rows, channels, taps, sigma, key, high):
        table = torch.from_numpy(prng.normal_quantiles().copy()) if dist == "normal" else None
        C.regenerate(
            cap(flat),
            None if words is None else cap(words.contiguous()),
            None if table is None else cap(table),
            rows,
            channels,
            taps,
            prng.DISTRIBUTIONS.index(dist),
            sigma,
            key,
            high,
            nthreads(),
        )

    return _made(run, kernel_dtypes, seed, layer, shape, dist, sigma, dtype, device, **options)


def _cuda(seed, layer, shape, dist, sigma, *, dtype=None, device=None, words=None, **options):
    from sparseticket.kernels.regenerate import regenerate as launch

    if dist == "constant":
        return _constant(shape, sigma, dtype, device, words, **options)
    kernel_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def run(flat, rows, channels, taps, sigma, key, high):
        mask = None if words is None else words.contiguous()
        table = _quantiles(flat.device) if dist == "normal" else None
        number = prng.DISTRIBUTIONS.index(dist)
        launch(flat, mask, table, rows, channels, taps, number, sigma, key, high)

    return _made(run, kernel_dtypes, seed, layer, shape, dist, sigma, dtype, device, **options)


@functools.cache
def _quantiles(device):
    """The contract's table on a GPU: a constant of 256 KB, copied there once."""
    return torch.from_numpy(prng.normal_quantiles().copy()).to(device)


def _made(
    run,
    kernel_dtypes,
    seed,
    layer,
    shape,
    dist,
    sigma,
    dtype,
    device,
    stream="magnitude",
    draw=0,
    channels_last=False,
):
    """The tensor that ``run`` fills, in memory order, in one of ``kernel_dtypes``."""
    dtype = dtype or torch.float32
    rows, channels, taps = laid_out(shape, channels_last)
    kernel_dtype = dtype if dtype in kernel_dtypes else torch.float32
    flat = torch.empty(rows * channels * taps, dtype=kernel_dtype, device=device)
    key, high = prng.stream_key(seed, layer, "sign" if dist == "signed_constant" else stream, draw)
    width = float(prng.uniform_scale(sigma)) if dist == "uniform" else float(sigma)
    run(flat, rows, channels, taps, width, key, high)
    return as_laid_out(flat.to(dtype), shape, channels_last)


def laid_out(shape, channels_last):
    """(rows, channels, taps) of a tensor in memory: taps is 1 where that is the canonical order."""
    rows, _ = canonical_shape(shape)
    channels, taps = channels_and_taps(shape)
    return (
        (rows, channels * taps, 1) if channels_last and len(shape) == 4 else (rows, channels, taps)
    )


def as_laid_out(flat, shape, channels_last):
    """``flat``, in that order, as the tensor of ``shape``."""
    if channels_last and len(shape) == 4:
        return flat.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
    return flat.view(shape)


def _constant(shape, sigma, dtype, device, words, channels_last=False, **_generator):
    last = channels_last and len(shape) == 4
    full = torch.full(shape, sigma, dtype=torch.float32, device=device)
    full = full.to(dtype or torch.float32)
    full = full if words is None else apply_mask(full, words)
    return full.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _reference_body(*args, dtype=None, **kwargs):
    return _reference.regenerate(*args, dtype=dtype or torch.float32, **kwargs)


def _check(seed, shape, dist, stream, dtype, words):
    rows, k = canonical_shape(shape)
    check_recipe("regenerate", seed, dist, stream, dtype)
    check_calls(rows, k, dist)
    if words is not None:
        check_words("regenerate", words, rows, k)


def check_calls(rows, k, dist):
    """ValueError if the layer is too large for its stream."""
    prng.check_calls(rows * prng.units_per_row(k) * (1 if dist == "signed_constant" else 32))


def check_recipe(op, seed, dist, stream="magnitude", dtype=torch.float32):
    prng.check_seed(seed)
    if dist not in prng.DISTRIBUTIONS:
        raise ValueError(f"{op}: dist: got {dist!r}, accepted: {', '.join(prng.DISTRIBUTIONS)}")
    if stream not in prng.STREAMS:
        raise ValueError(f"{op}: stream: got {stream!r}, accepted: {', '.join(prng.STREAMS)}")
    if dtype not in _DTYPES:
        raise TypeError(f"{op}: dtype: got {dtype}, accepted: {', '.join(map(str, _DTYPES))}")


def _meta(
    seed,
    layer,
    shape,
    dist,
    sigma,
    *,
    stream="magnitude",
    draw=0,
    dtype=None,
    device=None,
    words=None,
    channels_last=False,
):
    _check(seed, shape, dist, stream, dtype or torch.float32, words)
    last = channels_last and len(shape) == 4
    return torch.empty(
        shape,
        dtype=dtype or torch.float32,
        device=device or (words.device if words is not None else "cpu"),
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


regenerate = define(
    "regenerate(int seed, int layer, SymInt[] shape, str dist, float sigma, *,"
    ' str stream="magnitude", int draw=0, ScalarType? dtype=None, Device? device=None,'
    " Tensor? words=None, bool channels_last=False) -> Tensor",
    cpu=_cpu,
    reference=_reference_body,
    meta=_meta,
    factory=True,
    cuda=_cuda,
)
