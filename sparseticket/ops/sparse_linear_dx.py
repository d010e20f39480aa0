from __future__ import annotations

import math

import torch

from sparseticket.reference import sparse_linear_dx as _reference

from ._dispatch import check_words, define
from .scatter_live import check_values, scatter_live
from .sparse_linear_dw import (
    as_matrix,
    batch_inner,
    device_choice,
    empty_batch,
    run_sparse_linear,
    runs_sparse,
    sparse_choice,
    sparse_linear_dw,
    with_batch_of,
)
from .sparse_pattern import sparse_pattern

__all__ = ["sparse_linear_dx"]


def _check(grad, values, words, k):
    check_words("sparse_linear_dx", words, words.shape[0], k)
    check_values("sparse_linear_dx", values, words.shape[0], k)
    if grad.ndim == 0 or grad.shape[-1] != words.shape[0]:
        raise ValueError(
            f"sparse_linear_dx: grad: got shape {tuple(grad.shape)}, need last dimension "
            f"{words.shape[0]}"
        )
    if values.dtype != grad.dtype:
        raise ValueError(
            f"sparse_linear_dx: values: got {values.dtype}, need {grad.dtype} like grad"
        )


def _choose(grad, values, words, k, pattern=None, transposed=None):
    return sparse_choice("sparse_linear_dx", grad, words.shape[0], k, values.shape[0])


def _cpu(grad, values, words, k, pattern=None, transposed=None):
    _check(grad, values, words, k)
    if not runs_sparse(grad, words.shape[0], k, values.shape[0]):
        return with_batch_of(grad, grad @ scatter_live(values, words, (words.shape[0], k)))
    if transposed is None:
        transposed = sparse_pattern(words, k, values.shape[0], True)
    inner = batch_inner(grad)
    gx = empty_batch(grad, inner, k)
    run_sparse_linear(grad, values, transposed, None, gx, inner)
    return gx


def _choose_cuda(grad, values, words, k, pattern=None, transposed=None):
    samples, kept = math.prod(grad.shape[:-1]), values.shape[0]
    return device_choice("sparse_linear_dx", samples, grad.dtype, kept, words.shape[0], k, pattern)


def _cuda(grad, values, words, k, pattern=None, transposed=None):
    if _choose_cuda(grad, values, words, k, pattern).kernel == "reference":
        return with_batch_of(grad, _reference.sparse_linear_dx(grad, values, words, k))
    from sparseticket.kernels.sparse_linear_dx import sparse_linear_dx as launch

    out = grad.new_empty(*grad.shape[:-1], k)
    launch(as_matrix(grad), values.contiguous(), pattern, as_matrix(out))
    return with_batch_of(grad, out)


def _meta(grad, values, words, k, pattern=None, transposed=None):
    _check(grad, values, words, k)
    return empty_batch(grad, batch_inner(grad), k)


def _setup(ctx, inputs, output):
    grad, values, words, _, pattern, transposed = inputs
    ctx.save_for_backward(grad, values, words, pattern, transposed)


def _backward(ctx, outer):
    grad, values, words, *derived = ctx.saved_tensors
    need_grad, need_values, *_ = ctx.needs_input_grad
    outer = with_batch_of(grad, outer)
    forward = torch.ops.sparseticket.sparse_linear  # each is the other's backward
    gg = forward(outer, values, words, None, *derived) if need_grad else None
    gv = sparse_linear_dw(grad, outer, words, values.shape[0], *derived) if need_values else None
    return gg, gv, None, None, None, None


sparse_linear_dx = define(
    "sparse_linear_dx(Tensor grad, Tensor values, Tensor words, SymInt k,"
    " Tensor? pattern=None, Tensor? transposed=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.sparse_linear_dx,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
