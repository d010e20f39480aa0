from __future__ import annotations

import torch

from sparseticket.formats import canonical_shape
from sparseticket.reference import sparse_conv2d_dw as _reference

from ._dispatch import C, Choice, cap, define, nthreads
from .conv2d_taps import output_size
from .gather_live import gather_live
from .masked_conv2d import check_conv, conv_backward

__all__ = ["narrow_groups", "sparse_conv2d_dw"]

# Above this density, and with fewer outputs a group (depthwise), dense kernels are faster; from the
# crossover rows of bench/results.
DW_DENSITY, GROUP_OUTPUTS = 0.2, 16


def narrow_groups(weight_shape, groups):
    """Why groups make the dense way faster, None if they do not."""
    outputs = weight_shape[0] // groups
    if groups > 1 and outputs < GROUP_OUTPUTS:
        return f"{outputs} outputs a group < {GROUP_OUTPUTS}: dense conv"
    return None


def _check(x, grad, words, live, weight_shape, *geometry):
    check_conv("sparse_conv2d_dw", x, weight_shape, words, None, *geometry)
    size = output_size(x.shape[-2:], weight_shape, *geometry[:3])
    shape = (*x.shape[:-3], weight_shape[0], *size)
    if tuple(grad.shape) != shape or grad.dtype != x.dtype:
        raise ValueError(
            f"sparse_conv2d_dw: grad: got {grad.dtype} {tuple(grad.shape)}, need {x.dtype} "
            f"{shape}, that of the output"
        )


def _choose(x, grad, words, live, weight_shape, *geometry):
    rows, k = canonical_shape(weight_shape)
    density = live / max(rows * k, 1)
    if x.dtype != torch.float32:
        return Choice("sparse_conv2d_dw", "dense", f"the sparse kernel takes no {x.dtype}")
    if reason := narrow_groups(weight_shape, geometry[-1]):
        return Choice("sparse_conv2d_dw", "dense", reason)
    if density > DW_DENSITY:
        reason = f"density {density:.3f} > {DW_DENSITY}"
        return Choice("sparse_conv2d_dw", "dense", reason)
    return Choice("sparse_conv2d_dw", f"sparse {C.isa()}", f"density {density:.3f}")


def _cpu(x, grad, words, live, weight_shape, stride, padding, dilation, groups):
    geometry = (stride, padding, dilation, groups)
    _check(x, grad, words, live, weight_shape, *geometry)
    if _choose(x, grad, words, live, weight_shape, *geometry).kernel == "dense":
        like = x.new_empty(1).expand(tuple(weight_shape))  # its shape is read, its values are not
        _, full, _ = conv_backward(grad, x, like, None, *geometry, [False, True, False])
        return gather_live(full, words, live)
    out = x.new_empty(live)
    x, grad = (t.reshape(-1, *t.shape[-3:]).contiguous() for t in (x, grad))
    flat = (*weight_shape[2:], *stride, *padding, *dilation, groups)
    C.sparse_conv2d_dw(cap(x), cap(grad), cap(words.contiguous()), cap(out), flat, nthreads())
    return out


def _meta(x, grad, words, live, weight_shape, stride, padding, dilation, groups):
    _check(x, grad, words, live, weight_shape, stride, padding, dilation, groups)
    return x.new_empty(live)


def _setup(ctx, inputs, output):
    x, grad, words, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, grad, words)


def _backward(ctx, values):
    from .sparse_conv2d import conv2d_input_grad, sparse_conv2d  # each is the other's backward

    x, grad, words = ctx.saved_tensors
    need_x, need_grad, *_ = ctx.needs_input_grad
    gx = conv2d_input_grad(grad, x, values, words, *ctx.geometry) if need_x else None
    gg = sparse_conv2d(x, values, words, None, *ctx.geometry) if need_grad else None
    return gx, gg, *[None] * 7


sparse_conv2d_dw = define(
    "sparse_conv2d_dw(Tensor x, Tensor grad, Tensor words, SymInt live, SymInt[] weight_shape,"
    " SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
    cpu=_cpu,
    reference=_reference.sparse_conv2d_dw,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
)
