from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from sparseticket import prng
from sparseticket.reference import ticket_linear as _reference

from ._dispatch import C, Choice, cap, check_words, define, nthreads
from .masked_linear import check_linear, fused_linear, grad_bias
from .regenerate import check_recipe, regenerate
from .ticket_codes import check_codes, planes_of, ticket_codes_cpu

__all__ = [
    "as_stored",
    "cuda_choice",
    "ticket_choice",
    "ticket_linear",
    "ticket_linear_cpu",
    "ticket_linear_cuda",
]

# The static table, from rows of bench/results: looking up beats W*mask and a dense product
LOOKUP_ROWS = {torch.float32: 2**62, torch.bfloat16: 128}  # up to so many batch rows,
LARGE_OUTPUTS = 1000  # or any number from so many outputs on
LOOKUP_OUTPUTS = 64  # that share a table of sums of a panel of batch rows
PLANE_ROWS = 2  # batch rows up to which it does not pay to pack codes for this call
VECTOR_ROWS = 6  # and up to which codes are looked up row by row, as in csrc/core/ticket_linear.cpp

# On a GPU: batch rows up to which decoding in the kernel is faster than writing W*mask first and
# reading it again (4 bytes a weight, 0.9 ps), if the product loses 15 % to cuBLAS; computed, not
# measured yet.
GPU_ROWS = {torch.float16: 2048, torch.bfloat16: 2048, torch.float32: 64}


def ticket_choice(op, x, outputs, dist, words, signs, codes, transposed=False) -> Choice:
    """How ``x[..., inputs]`` meets signed-constant weights with ``outputs`` rows."""
    rows = math.prod(x.shape[:-1])
    most = LOOKUP_ROWS.get(x.dtype)
    if dist != "signed_constant":
        return Choice(op, "materialised", f"only signed_constant sums can be looked up: {dist}")
    if most is None:
        return Choice(op, "materialised", f"the lookup kernels take no {x.dtype}")
    if rows > most and outputs < LARGE_OUTPUTS:
        return Choice(
            op, "materialised", f"{rows} rows > {most}, {outputs} outputs: dense GEMM on W*mask"
        )
    if rows > VECTOR_ROWS and outputs < LOOKUP_OUTPUTS:
        return Choice(
            op, "materialised", f"{outputs} outputs < {LOOKUP_OUTPUTS}: too few to share a table"
        )
    if codes is None and rows <= PLANE_ROWS and not transposed:
        plane = "sign-only" if words is None else "two-plane" if signs is not None else "seed"
        return Choice(
            op, f"lookup gemv {plane} {C.isa()}", f"{rows} rows <= {PLANE_ROWS}, no codes given"
        )
    source = "codes packed for this call" if codes is None else "codes given"
    if rows <= VECTOR_ROWS:
        return Choice(
            op, f"lookup gemv ternary {C.isa()}", f"{rows} rows <= {VECTOR_ROWS}, {source}"
        )
    return Choice(op, f"four-Russians {C.isa()}", f"{rows} rows > {VECTOR_ROWS}, {source}")


def _weight(x, words, rows, k, seed, layer, dist, sigma):
    return regenerate(
        seed, layer, (rows, k), dist, sigma, dtype=x.dtype, device=x.device, words=words
    )


def _choose(
    x,
    words,
    bias,
    seed,
    layer,
    dist,
    sigma,
    signs=None,
    codes=None,
    codes_t=None,
    columns=None,
):
    outputs = (signs if words is None else words).shape[0] if columns is None else columns
    used = codes if columns is None else codes_t
    return ticket_choice("ticket_linear", x, outputs, dist, words, signs, used, columns is not None)


def _shape(x, words, bias, seed, dist, signs, codes, codes_t, columns):
    """(O, K) of the layer; raises for what the op cannot take."""
    op = "ticket_linear"
    check_recipe(op, seed, dist)
    if words is None and signs is None:
        raise ValueError(f"{op}: words: got None, which needs the layer's signs")
    rows = (signs if words is None else words).shape[0]
    k = (x.shape[-1] if x.ndim else 0) if columns is None else columns
    if columns is None:
        check_linear(op, x, rows, k, signs if words is None else words, bias)
    else:
        check_words(op, signs if words is None else words, rows, k)
        _check_transposed(op, x, rows, k, bias)
    if signs is not None:
        check_words(op, signs, rows, k, name="signs")
    if codes is not None:
        check_codes(op, codes, rows, k, "codes")
    if codes_t is not None:
        check_codes(op, codes_t, k, rows, "codes_t")
    return rows, k


def _check_transposed(op, x, rows, k, bias):
    if x.ndim == 0 or x.shape[-1] != rows or not x.dtype.is_floating_point:
        raise ValueError(
            f"{op}: x: got {x.dtype} {tuple(x.shape)}, need a floating-point dtype and, with "
            f"columns, last dimension {rows}"
        )
    if bias is not None and (tuple(bias.shape) != (k,) or bias.dtype != x.dtype):
        raise ValueError(f"{op}: bias: got {bias.dtype} {tuple(bias.shape)}, need {x.dtype} ({k},)")


def _cpu(
    x,
    words,
    bias,
    seed,
    layer,
    dist,
    sigma,
    signs=None,
    codes=None,
    codes_t=None,
    columns=None,
):
    rows, k = _shape(x, words, bias, seed, dist, signs, codes, codes_t, columns)
    used = codes if columns is None else codes_t
    recipe = seed, layer, dist, sigma
    return ticket_linear_cpu(x, words, bias, rows, k, *recipe, signs, used, columns is not None)


def ticket_linear_cpu(
    x, words, bias, rows, k, seed, layer, dist, sigma, signs=None, codes=None, transposed=False
):
    """The op's body for checked arguments; ``codes``: those of this orientation."""
    outputs = k if transposed else rows
    choice = ticket_choice("ticket_linear", x, outputs, dist, words, signs, codes, transposed)
    if choice.kernel == "materialised":
        weight = _weight(x, words, rows, k, seed, layer, dist, sigma)
        return F.linear(x, weight.t() if transposed else weight, bias)
    if not choice.kernel.startswith(("lookup gemv ternary", "four-Russians")):
        return _from_planes(x, words, signs, bias, outputs, seed, layer, sigma)
    if codes is None:
        codes = ticket_codes_cpu(words, k, seed, layer, signs, transposed)
    codes = cap(codes.contiguous())
    return fused_linear(
        lambda x, b, y: C.lookup_linear(x, codes, b, y, sigma, nthreads()), x, outputs, bias
    )


def _from_planes(x, words, signs, bias, outputs, seed, layer, sigma):
    key, high = prng.stream_key(seed, layer, "sign")
    words, signs = planes_of(words, signs)

    def kernel(x, b, y):
        C.ticket_linear(x, words, signs, b, y, sigma, key, high, nthreads())

    return fused_linear(kernel, x, outputs, bias)


def cuda_choice(op, x, dist, transposed=False) -> Choice:
    """How ``x[..., inputs]`` meets frozen weights on a GPU. Computed, not measured yet."""
    from sparseticket.kernels.ticket_linear import ticket_config

    rows = math.prod(x.shape[:-1])
    most = GPU_ROWS.get(x.dtype)
    if dist != "signed_constant":
        return Choice(op, "materialised", f"only signed_constant is decoded in the kernel: {dist}")
    if most is None:
        return Choice(op, "materialised", f"the Triton kernels take no {x.dtype}")
    if rows > most:
        return Choice(op, "materialised", f"{rows} rows > {most}: dense GEMM on W*mask")
    config = ticket_config(rows, x.dtype, x.device, transposed)
    reason = f"{rows} rows: weights decoded in the kernel; {config}"
    return Choice(op, f"Triton {config.kernel}", reason)


def _choose_cuda(
    x,
    words,
    bias,
    seed,
    layer,
    dist,
    sigma,
    signs=None,
    codes=None,
    codes_t=None,
    columns=None,
):
    return cuda_choice("ticket_linear", x, dist, columns is not None)


def _cuda(
    x,
    words,
    bias,
    seed,
    layer,
    dist,
    sigma,
    signs=None,
    codes=None,
    codes_t=None,
    columns=None,
):
    rows, k = _shape(x, words, bias, seed, dist, signs, codes, codes_t, columns)
    if cuda_choice("ticket_linear", x, dist).kernel == "materialised":
        weight = _weight(x, words, rows, k, seed, layer, dist, sigma)
        return F.linear(x, weight if columns is None else weight.t(), bias)
    return ticket_linear_cuda(x, words, signs, bias, seed, layer, sigma, rows, columns)


def ticket_linear_cuda(x, words, signs, bias, seed, layer, sigma, rows, columns=None):
    """The Triton kernels on checked arguments."""
    from sparseticket.kernels.ticket_linear import ticket_linear as launch

    x2d = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    y = x.new_empty(x2d.shape[0], rows if columns is None else columns)
    words, signs, bias = (None if t is None else t.contiguous() for t in (words, signs, bias))
    key, high = prng.stream_key(seed, layer, "sign")
    launch(x2d, words, signs, bias, y, as_stored(sigma, x.dtype), key, high, columns is not None)
    return y.view(*x.shape[:-1], y.shape[1])


@functools.lru_cache(1024)
def as_stored(sigma, dtype):
    """sigma as a weight of this dtype holds it."""
    return float(torch.tensor(sigma, dtype=torch.float32).to(dtype))


def _meta(
    x,
    words,
    bias,
    seed,
    layer,
    dist,
    sigma,
    signs=None,
    codes=None,
    codes_t=None,
    columns=None,
):
    rows, k = _shape(x, words, bias, seed, dist, signs, codes, codes_t, columns)
    return x.new_empty(*x.shape[:-1], rows if columns is None else k)


def _setup(ctx, inputs, output):
    x, words, _, *ctx.recipe, signs, codes, codes_t, columns = inputs
    ctx.columns = x.shape[-1] if columns is None else None  # of the transposed product
    ctx.save_for_backward(words, signs, codes, codes_t)


def _backward(ctx, grad):
    need_x, _, need_bias, *_ = ctx.needs_input_grad
    gx = None
    if need_x:
        words, *derived = ctx.saved_tensors
        gx = ticket_linear(grad, words, None, *ctx.recipe, *derived, ctx.columns)
    return gx, None, grad_bias(grad) if need_bias else None, *[None] * 8


ticket_linear = define(
    "ticket_linear(Tensor x, Tensor? words, Tensor? bias, int seed, int layer, str dist,"
    " float sigma, Tensor? signs=None, Tensor? codes=None, Tensor? codes_t=None,"
    " SymInt? columns=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.ticket_linear,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
