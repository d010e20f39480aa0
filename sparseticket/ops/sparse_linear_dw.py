from __future__ import annotations

import torch

from sparseticket.reference import sparse_linear_dw as _reference

from ._dispatch import check_words, define
from .gather_live import gather_live
from .masked_linear import grad_weight

__all__ = ["sparse_linear_dw"]


def _check(grad, x, words, kept):
    if x.ndim == 0 or grad.shape != (*x.shape[:-1], words.shape[0]) or grad.dtype != x.dtype:
        raise ValueError(
            f"sparse_linear_dw: grad, x: got {grad.dtype} {tuple(grad.shape)}, {x.dtype} "
            f"{tuple(x.shape)}; need [..., {words.shape[0]}], [..., K] of one dtype"
        )
    check_words("sparse_linear_dw", words, words.shape[0], x.shape[-1])
    if not 0 <= kept <= words.shape[0] * x.shape[-1]:
        raise ValueError(f"sparse_linear_dw: kept: got {kept}, need the number of live weights")


def _cpu(grad, x, words, kept, pattern=None, transposed=None):
    _check(grad, x, words, kept)
    return gather_live(grad_weight(grad, x), words, kept)


def _meta(grad, x, words, kept, pattern=None, transposed=None):
    _check(grad, x, words, kept)
    return x.new_empty(kept)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*(inputs[i] for i in (0, 1, 2, 4, 5)))


def _backward(ctx, outer):
    grad, x, words, *derived = ctx.saved_tensors
    need_grad, need_x, *_ = ctx.needs_input_grad
    ops = torch.ops.sparseticket  # the three are each other's backwards
    gg = ops.sparse_linear(x, outer, words, None, *derived) if need_grad else None
    gx = ops.sparse_linear_dx(grad, outer, words, x.shape[-1], *derived) if need_x else None
    return gg, gx, None, None, None, None


sparse_linear_dw = define(
    "sparse_linear_dw(Tensor grad, Tensor x, Tensor words, SymInt kept,"
    " Tensor? pattern=None, Tensor? transposed=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.sparse_linear_dw,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
)
