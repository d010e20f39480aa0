from __future__ import annotations

import math

import torch.nn.functional as F

from sparseticket.reference import sparse_linear as _reference

from ._dispatch import define
from .masked_linear import check_linear, grad_bias
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
from .sparse_linear_dx import sparse_linear_dx
from .sparse_pattern import sparse_pattern

__all__ = ["sparse_linear"]


def _checked(x, values, words, bias):
    """``(O, K)``; raises for what the op cannot take."""
    rows, k = words.shape[0], x.shape[-1] if x.ndim else 0
    check_linear("sparse_linear", x, rows, k, words, bias)
    check_values("sparse_linear", values, rows, k)
    if values.dtype != x.dtype:
        raise ValueError(f"sparse_linear: values: got {values.dtype}, need {x.dtype} like x")
    return rows, k


def _choose(x, values, words, bias=None, pattern=None, transposed=None):
    return sparse_choice("sparse_linear", x, words.shape[0], x.shape[-1], values.shape[0])


def _cpu(x, values, words, bias=None, pattern=None, transposed=None):
    rows, k = _checked(x, values, words, bias)
    if not runs_sparse(x, rows, k, values.shape[0]):
        return with_batch_of(x, F.linear(x, scatter_live(values, words, (rows, k)), bias))
    if pattern is None:
        pattern = sparse_pattern(words, k, values.shape[0])
    inner = batch_inner(x)
    y = empty_batch(x, inner, rows)
    run_sparse_linear(x, values, pattern, bias, y, inner)
    return y


def _choose_cuda(x, values, words, bias=None, pattern=None, transposed=None):
    samples, kept = math.prod(x.shape[:-1]), values.shape[0]
    shape = words.shape[0], x.shape[-1]
    return device_choice("sparse_linear", samples, x.dtype, kept, *shape, pattern)


def _cuda(x, values, words, bias=None, pattern=None, transposed=None):
    if _choose_cuda(x, values, words, bias, pattern).kernel == "reference":
        return with_batch_of(x, _reference.sparse_linear(x, values, words, bias))
    from sparseticket.kernels.sparse_linear import sparse_linear as launch

    y = x.new_empty(*x.shape[:-1], words.shape[0])
    bias = None if bias is None else bias.contiguous()
    launch(as_matrix(x), values.contiguous(), pattern, bias, as_matrix(y))
    return with_batch_of(x, y)


def _meta(x, values, words, bias=None, pattern=None, transposed=None):
    rows, _ = _checked(x, values, words, bias)
    return empty_batch(x, batch_inner(x), rows)


def _setup(ctx, inputs, output):
    x, values, words, _, pattern, transposed = inputs
    ctx.save_for_backward(x, values, words, pattern, transposed)


def _backward(ctx, grad):
    x, values, words, *derived = ctx.saved_tensors
    need_x, need_values, _, need_bias, *_ = ctx.needs_input_grad
    grad = with_batch_of(x, grad)  # so that gradients lie as x does, compiled or not
    gx = sparse_linear_dx(grad, values, words, x.shape[-1], *derived) if need_x else None
    gv = sparse_linear_dw(grad, x, words, values.shape[0], *derived) if need_values else None
    return gx, gv, None, grad_bias(grad) if need_bias else None, None, None


sparse_linear = define(
    "sparse_linear(Tensor x, Tensor values, Tensor words, Tensor? bias=None,"
    " Tensor? pattern=None, Tensor? transposed=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.sparse_linear,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
