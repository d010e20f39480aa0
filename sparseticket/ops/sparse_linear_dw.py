from __future__ import annotations

import math

import torch

from sparseticket.reference import sparse_linear_dw as _reference

from ._dispatch import C, Choice, cap, check_words, define, nthreads
from .gather_live import gather_live
from .masked_linear import grad_weight
from .sparse_pattern import LIST_ROWS, sparse_pattern

__all__ = [
    "as_matrix",
    "batch_inner",
    "device_choice",
    "empty_batch",
    "run_sparse_linear",
    "runs_sparse",
    "sparse_choice",
    "sparse_linear_dw",
    "with_batch_of",
]

# Up to this density the sparse kernels beat writing the weight out for a dense GEMM, by how many
# samples there are; from the crossover sweeps of bench/cases.py.
SPARSE_DENSITY = {
    (torch.float32, "few"): 1.0,
    (torch.float32, "many"): 0.6,
    (torch.bfloat16, "few"): 0.5,
    (torch.bfloat16, "many"): 0.25,
}
_MANY = 128
_DEVICE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_sparse(x, rows, k, kept) -> bool:
    """The static table. ``x``: ``[..., features]``, the input or the gradient of the output."""
    if not (x.numel() and rows * k):
        return False
    samples = x.numel() // x.shape[-1]
    most = SPARSE_DENSITY.get((x.dtype, "many" if samples >= _MANY else "few"), -1.0)
    return kept <= most * rows * k


def sparse_choice(op, x, rows, k, kept) -> Choice:
    """What :func:`runs_sparse` decides, in words."""
    samples, density = math.prod(x.shape[:-1]), kept / max(rows * k, 1)
    if runs_sparse(x, rows, k, kept):
        if samples == 1:
            return Choice(op, f"sparse rows {C.isa()}", f"1 sample, density {density:.3f}")
        how = "batch-inner as they lie" if batch_inner(x) else "packed into panels"
        return Choice(
            op, f"sparse panels {C.isa()}", f"{samples} samples {how}, density {density:.3f}"
        )
    if (x.dtype, "few") not in SPARSE_DENSITY:
        return Choice(op, "materialised", f"the sparse kernels take no {x.dtype}")
    return Choice(op, "materialised", f"density {density:.3f} of {samples} samples: dense GEMM")


def batch_inner(x) -> bool:
    """Whether the last two dimensions of ``x`` lie transposed in memory: features of one sample
    apart, samples of one feature together. Such a batch is computed, and answered, as it lies."""
    return x.ndim >= 2 and not x.is_contiguous() and x.mT.is_contiguous()


def batch_sizes(x, inner):
    """``(groups, samples, inner)`` for the kernels."""
    if not inner:
        return 1, x.numel() // x.shape[-1], False
    return math.prod(x.shape[:-2]), x.shape[-2], True


def empty_batch(x, inner, features):
    """Uninitialised ``[..., features]`` in the layout of the batch ``x``."""
    if not inner:
        return x.new_empty(*x.shape[:-1], features)  # a tuple takes half as long again
    return x.new_empty(*x.shape[:-2], features, x.shape[-2]).mT


def run_sparse_linear(x, values, pattern, bias, y, inner):
    """Fill ``y`` with the product of the pattern's matrix and the batch ``x`` of its layout."""
    C.sparse_linear(
        *(cap(x.mT if inner else x.contiguous()), cap(values.contiguous()), cap(pattern)),
        None if bias is None else cap(bias.contiguous()),
        cap(y.mT if inner else y),
        *batch_sizes(x, inner),
        nthreads(),
    )


def with_batch_of(x, y):
    """The dense result ``y`` in the layout that the kernels give for ``x``."""
    return y.mT.contiguous().mT if batch_inner(x) else y.contiguous()


def device_choice(op, samples, dtype, kept, rows, k, pattern) -> Choice:
    """Which kernel a product with compressed values gets on CUDA, and why."""
    density = kept / max(rows * k, 1)
    if pattern is None or not kept or dtype not in _DEVICE_DTYPES:
        return Choice(op, "reference", "no list of live blocks or weights: dense product")
    if pattern.ndim == 2:
        from sparseticket.kernels.blocks import block_of, block_sizes

        block = block_of(pattern.numel(), rows, k, kept)
        listed = "sparse_linear_dw" if op == "sparse_linear_dw" else "sparse_linear"
        sizes = block_sizes(listed, block, samples, dtype, pattern.device)
        reason = f"live blocks of {block}, density {density:.3f}; {sizes}"
        return Choice(op, "Triton blocks", reason)
    if op == "sparse_linear" and samples <= LIST_ROWS:
        from sparseticket.kernels.tuning import tuned

        sizes = tuned("sparse_linear list", samples, pattern.device)
        return Choice(op, "Triton list", f"{samples} samples, density {density:.3f}; {sizes}")
    return Choice(op, "reference", f"{samples} samples, live weights in no blocks: dense product")


def as_matrix(x):
    """``x`` as contiguous ``[samples, features]``."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _check(grad, x, words, kept):
    if x.ndim == 0 or grad.shape != (*x.shape[:-1], words.shape[0]) or grad.dtype != x.dtype:
        raise ValueError(
            f"sparse_linear_dw: grad, x: got {grad.dtype} {tuple(grad.shape)}, {x.dtype} "
            f"{tuple(x.shape)}; need [..., {words.shape[0]}], [..., K] of one dtype"
        )
    check_words("sparse_linear_dw", words, words.shape[0], x.shape[-1])
    if not 0 <= kept <= words.shape[0] * x.shape[-1]:
        raise ValueError(f"sparse_linear_dw: kept: got {kept}, need the number of live weights")


def _choose(grad, x, words, kept, pattern=None, transposed=None):
    return sparse_choice("sparse_linear_dw", x, words.shape[0], x.shape[-1], kept)


def _cpu(grad, x, words, kept, pattern=None, transposed=None):
    _check(grad, x, words, kept)
    if not runs_sparse(x, words.shape[0], x.shape[-1], kept):
        return gather_live(grad_weight(grad, x), words, kept)
    if pattern is None:
        pattern = sparse_pattern(words, x.shape[-1], kept)
    inner = batch_inner(x)
    values = x.new_empty(kept)
    g, b = (t.mT.contiguous() if inner else t.contiguous() for t in (grad, x))
    sizes = batch_sizes(x, inner)
    C.sparse_linear_dw(cap(g), cap(b), cap(pattern), cap(values), *sizes, nthreads())
    return values


def _choose_cuda(grad, x, words, kept, pattern=None, transposed=None):
    samples, shape = math.prod(x.shape[:-1]), (words.shape[0], x.shape[-1])
    return device_choice("sparse_linear_dw", samples, x.dtype, kept, *shape, pattern)


def _cuda(grad, x, words, kept, pattern=None, transposed=None):
    if _choose_cuda(grad, x, words, kept, pattern).kernel == "reference":
        return _reference.sparse_linear_dw(grad, x, words, kept)
    from sparseticket.kernels.sparse_linear_dw import sparse_linear_dw as launch

    values = x.new_empty(kept)
    launch(as_matrix(grad), as_matrix(x), pattern, values)
    return values


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
    choose=_choose,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
