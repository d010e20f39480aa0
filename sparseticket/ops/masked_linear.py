from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from sparseticket.reference import masked_linear as _reference

from ._dispatch import C, Choice, cap, check_words, define, nthreads
from .apply_mask import apply_mask

__all__ = [
    "check_linear",
    "fused_linear",
    "grad_bias",
    "grad_weight",
    "linear_choice",
    "masked_linear",
]

# Batch rows up to which decoding in the kernel beats writing W*mask and calling dense, by what is
# decoded; from the crossover rows of bench/results.
FUSED_ROWS = {
    ("dense weight", torch.float32): 8,
    ("dense weight", torch.bfloat16): 4,
}


def linear_choice(op: str, x: torch.Tensor, source: str) -> Choice:
    """Fused or materialised, by the static table. ``x``: ``[..., K]``."""
    rows = math.prod(x.shape[:-1])
    most = FUSED_ROWS.get((source, x.dtype))
    if most is None:
        return Choice(op, "materialised", f"the fused kernel takes no {x.dtype}")
    if rows > most:
        return Choice(op, "materialised", f"{rows} rows > {most}: dense GEMM on W*mask")
    return Choice(op, f"fused {C.isa()}", f"{rows} rows <= {most}: bound by weight bytes")


def check_linear(op, x, rows, k, words, bias):
    """Raise for what a linear op cannot take."""
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"{op}: x: got shape {tuple(x.shape)}, need last dimension {k}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: x: got {x.dtype}, need a floating-point dtype")
    check_words(op, words, rows, k)
    if bias is not None and (tuple(bias.shape) != (rows,) or bias.dtype != x.dtype):
        raise ValueError(
            f"{op}: bias: got {bias.dtype} {tuple(bias.shape)}, need {x.dtype} ({rows},)"
        )


def fused_linear(kernel, x, rows, bias):
    """Run ``kernel(x2d, bias or None, y2d)`` on contiguous 2-D input; returns ``[..., rows]``."""
    x2d = _as_matrix(x).contiguous()
    y = x.new_empty(x2d.shape[0], rows)
    kernel(cap(x2d), None if bias is None else cap(bias.contiguous()), cap(y))
    return y.view(*x.shape[:-1], rows)


def grad_weight(grad, x):
    """Dense weight gradient ``[O, K]`` of ``y = x @ W^T``."""
    return _as_matrix(grad).t() @ _as_matrix(x)


def grad_bias(grad):
    return _as_matrix(grad).sum(0)


def _as_matrix(x):
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # also without elements


def _check(x, weight, words, bias):
    if weight.ndim == 2:
        check_linear("masked_linear", x, *weight.shape, words, bias)
    if weight.ndim != 2 or weight.dtype != x.dtype:
        raise ValueError(
            f"masked_linear: weight: got {weight.dtype} {tuple(weight.shape)}, "
            f"need {x.dtype} [O, K]"
        )


def _choose(x, weight, words, bias=None, dense_grad=False):
    return linear_choice("masked_linear", x, "dense weight")


def _cpu(x, weight, words, bias=None, dense_grad=False):
    _check(x, weight, words, bias)
    if _choose(x, weight, words).kernel == "materialised":
        return F.linear(x, apply_mask(weight, words), bias)
    w, m = weight.contiguous(), words.contiguous()
    return fused_linear(
        lambda x, b, y: C.masked_linear(x, cap(w), cap(m), b, y, nthreads()),
        x,
        weight.shape[0],
        bias,
    )


def _meta(x, weight, words, bias=None, dense_grad=False):
    _check(x, weight, words, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx, inputs, output):
    x, weight, words, _, ctx.dense_grad = inputs
    ctx.save_for_backward(x, weight, words)


def _backward(ctx, grad):
    x, weight, words = ctx.saved_tensors
    need_x, need_weight, _, need_bias, _ = ctx.needs_input_grad
    gx = grad @ apply_mask(weight, words) if need_x else None
    gw = grad_weight(grad, x) if need_weight else None
    if need_weight and not ctx.dense_grad:
        gw = apply_mask(gw, words)
    return gx, gw, None, grad_bias(grad) if need_bias else None, None


masked_linear = define(
    "masked_linear(Tensor x, Tensor weight, Tensor words, Tensor? bias=None,"
    " bool dense_grad=False) -> Tensor",
    cpu=_cpu,
    reference=_reference.masked_linear,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
)
