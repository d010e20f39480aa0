from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F

from sparseticket.reference import masked_linear as _reference

from ._dispatch import C, Choice, cap, check_words, define, nthreads
from .apply_mask import apply_mask

__all__ = [
    "check_linear",
    "check_shadow",
    "dense_choice",
    "fused_linear",
    "grad_bias",
    "grad_weight",
    "masked_linear",
    "masked_linear_choice",
    "masked_linear_cpu",
]

# The static table, from the crossover rows of bench/results. Batch rows up to which decoding in the
# kernel beats writing W*mask first at any density.
FUSED_ROWS = {torch.float32: 8, torch.bfloat16: 8}
# Beyond them, the density up to which walking over the live weights does, from how many rows on:
# of x @ W^T and of x @ W.
LIVE_DENSITY = {torch.float32: (0.5, 0.3), torch.bfloat16: (0.1, -1.0)}
LIVE_ROWS = {torch.float32: 9, torch.bfloat16: 9}
# Fewer rows than a panel holds pay for all of it: the density is at most this part of that then.
FEW_ROWS, FEW_PART = 32, 0.4
# And the rows up to which the fused kernel still beats dense at higher densities, where vectors and
# registers are wide enough.
WIDE_ROWS = {("avx512", torch.float32): 128}
# W*mask of up to this size is written where the thread's last one was.
SCRATCH_BYTES = 2**28
_SCRATCH = threading.local()


def check_linear(op, x, rows, k, words, bias, transposed=False):
    """Raise for what a linear op cannot take; ``transposed``: y = x @ W, not x @ W^T."""
    width, outputs = (rows, k) if transposed else (k, rows)
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"{op}: x: got shape {tuple(x.shape)}, need last dimension {width}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: x: got {x.dtype}, need a floating-point dtype")
    check_words(op, words, rows, k)
    if bias is not None and (bias.shape != (outputs,) or bias.dtype != x.dtype):
        raise ValueError(
            f"{op}: bias: got {bias.dtype} {tuple(bias.shape)}, need {x.dtype} ({outputs},)"
        )


def fused_linear(kernel, x, rows, bias):
    """Run ``kernel(x2d, bias or None, y2d)`` on contiguous 2-D input; returns ``[..., rows]``."""
    x2d = _as_matrix(x).contiguous()
    y = x.new_empty(x2d.shape[0], rows)
    kernel(cap(x2d), None if bias is None else cap(bias.contiguous()), cap(y))
    return y if x.ndim == 2 else y.view(*x.shape[:-1], rows)


def grad_weight(grad, x):
    """Dense weight gradient ``[O, K]`` of ``y = x @ W^T``."""
    return _as_matrix(grad).t() @ _as_matrix(x)


def grad_bias(grad):
    return _as_matrix(grad).sum(0)


def _as_matrix(x):
    if x.ndim == 2:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # also without elements


def _check(x, weight, words, bias, transposed, shadow):
    if weight.ndim == 2:
        check_linear("masked_linear", x, *weight.shape, words, bias, transposed)
    if weight.ndim != 2 or (shadow is None and weight.dtype != x.dtype):
        raise ValueError(
            f"masked_linear: weight: got {weight.dtype} {tuple(weight.shape)}, "
            f"need {x.dtype} [O, K]"
        )
    check_shadow("masked_linear", shadow, x, weight)


def check_shadow(op, shadow, x, weight):
    if shadow is not None and (shadow.shape != weight.shape or shadow.dtype != x.dtype):
        raise ValueError(
            f"{op}: shadow: got {shadow.dtype} {tuple(shadow.shape)}, need {x.dtype} "
            f"{tuple(weight.shape)}, the masked weight in the dtype of x"
        )


def _kernel(x, weight, words, transposed):
    """Name of the kernel by the static table, batch rows, and the density if that decided."""
    dtype = x.dtype
    rows = x.shape[0] if x.ndim == 2 else math.prod(x.shape[:-1])
    if dtype not in LIVE_DENSITY:
        return "materialised", rows, None
    if not transposed and rows <= FUSED_ROWS[dtype]:
        return "fused", rows, None
    density = None
    if rows >= LIVE_ROWS[dtype]:
        bits = cap(words.contiguous())
        density = C.mask_count(bits, bits, False, nthreads()) / max(weight.numel(), 1)
        most = LIVE_DENSITY[dtype][transposed] * (FEW_PART if rows < FEW_ROWS else 1)
        if density <= most:
            return "live", rows, density
    if not transposed and rows <= WIDE_ROWS.get((C.isa(), dtype), -1):
        return "fused", rows, density
    return "materialised", rows, density


def masked_linear_choice(op, x, weight, words, transposed=False) -> Choice:
    """How ``x`` meets the masked ``weight``, and why."""
    kernel, rows, density = _kernel(x, weight, words, transposed)
    if kernel == "materialised" and x.dtype not in LIVE_DENSITY:
        return Choice(op, kernel, f"the fused kernels take no {x.dtype}")
    reason = f"{rows} rows" if density is None else f"{rows} rows, density {density:.3f}"
    why = {
        "fused": "masks each weight as it is read",
        "live": "walks over the live weights",
        "materialised": "dense GEMM on W*mask",
    }[kernel]
    name = kernel if kernel == "materialised" else f"{kernel} {C.isa()}"
    return Choice(op, name, f"{reason}: {why}")


def _choose(x, weight, words, bias=None, dense_grad=False, transposed=False, shadow=None):
    if shadow is not None:
        return Choice("masked_linear", "shadow", "the masked weight is at hand: dense GEMM on it")
    return masked_linear_choice("masked_linear", x, weight, words, transposed)


def _choose_cuda(x, weight, words, bias=None, dense_grad=False, transposed=False, shadow=None):
    return dense_choice("masked_linear", "GEMM", shadow)


def dense_choice(op, product, shadow) -> Choice:
    """What masked ops do on CUDA, where a masked product never beats a dense one."""
    if shadow is not None:
        return Choice(op, "shadow", f"the masked weight is at hand: dense {product} on it")
    return Choice(op, "materialised", f"no shadow: Triton writes W*mask, then a dense {product}")


def _cpu(x, weight, words, bias=None, dense_grad=False, transposed=False, shadow=None):
    _check(x, weight, words, bias, transposed, shadow)
    if shadow is not None:
        return _dense(x, shadow, bias, transposed)
    return masked_linear_cpu(x, weight, words, bias, transposed)


def _cuda(x, weight, words, bias=None, dense_grad=False, transposed=False, shadow=None):
    masked = apply_mask(weight, words) if shadow is None else shadow
    return _dense(x, masked, bias, transposed)


def _dense(x, masked, bias, transposed):
    return F.linear(x, masked.t() if transposed else masked, bias)


def masked_linear_cpu(x, weight, words, bias=None, transposed=False):
    """The op's body for checked arguments."""
    kernel, _, _ = _kernel(x, weight, words, transposed)
    if kernel == "materialised":
        return _dense(x, _masked_in_scratch(weight, words), bias, transposed)
    w, m = cap(weight.contiguous()), cap(words.contiguous())
    if kernel == "fused":

        def run(x, b, y):
            C.masked_linear(x, w, m, b, y, nthreads())
    else:

        def run(x, b, y):
            C.masked_linear_live(x, w, m, b, y, transposed, nthreads())

    return fused_linear(run, x, weight.shape[1 if transposed else 0], bias)


def _masked_in_scratch(weight, words):
    """W*mask, valid until this thread's next call: fresh pages from the system would cost more
    than the write."""
    if weight.dtype not in LIVE_DENSITY or weight.nbytes > SCRATCH_BYTES:
        return apply_mask(weight, words)
    held = getattr(_SCRATCH, "held", None)
    if held is None or held.numel() < weight.nbytes:
        held = _SCRATCH.held = torch.empty(weight.nbytes, dtype=torch.uint8)
    out = held[: weight.nbytes].view(weight.dtype).view(weight.shape)
    weight, words = weight.contiguous(), words.contiguous()
    C.apply_mask(cap(weight), cap(words), cap(out), *weight.shape, 1, nthreads())
    return out


def _meta(x, weight, words, bias=None, dense_grad=False, transposed=False, shadow=None):
    _check(x, weight, words, bias, transposed, shadow)
    return x.new_empty(*x.shape[:-1], weight.shape[1 if transposed else 0])


def _setup(ctx, inputs, output):
    x, weight, words, _, ctx.dense_grad, ctx.transposed, shadow = inputs
    ctx.save_for_backward(x, weight, words, shadow)


def _backward(ctx, grad):
    x, weight, words, shadow = ctx.saved_tensors
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    gx = gw = None
    if need_x:
        gx = masked_linear(grad, weight, words, None, False, not ctx.transposed, shadow)
    if need_weight:
        gw = grad_weight(x, grad) if ctx.transposed else grad_weight(grad, x)
        gw = gw.to(weight.dtype) if ctx.dense_grad else apply_mask(gw, words, weight.dtype)
    return gx, gw, None, grad_bias(grad) if need_bias else None, None, None, None


masked_linear = define(
    "masked_linear(Tensor x, Tensor weight, Tensor words, Tensor? bias=None,"
    " bool dense_grad=False, bool transposed=False, Tensor? shadow=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.masked_linear,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
