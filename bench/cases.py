"""The registry of kernel benchmarks: one entry per op, each with its cases.

A case builds its inputs once and returns contenders by name, ``ours`` among them. The first is the
baseline that rows report everyone against: dense torch, or what people run today where there is no
dense way.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import sparseticket as st
from bench.peers import sparseprop_linear, subset_sum_solvers
from sparseticket import ops
from sparseticket.reference.subset_sum import subset_sum as subset_sum_reference
from sparseticket.train.models import build_model

__all__ = ["CASES", "Case", "SWEEPS", "Sweep"]

Contenders = dict[str, Callable[[], object]]
_SIGMA, _SEED, _LAYER = 0.0625, 0, 1


@dataclass(frozen=True)
class Case:
    """``make()`` gives the contenders; ``bytes_moved``: the least that ours must read and write."""

    name: str
    make: Callable[[], Contenders]
    bytes_moved: int


@dataclass(frozen=True)
class Sweep:
    """Densities at which ours meets dense: ``make(density)`` gives contenders ours and dense."""

    name: str
    make: Callable[[float], Contenders]
    densities: tuple[float, ...] = (0.5, 0.1, 0.05, 0.01)


def _mask(shape, density):
    torch.manual_seed(0)
    return torch.rand(shape) < density


# ---------------------------------------------------------------- selection and masks
def _select(n_rows, n_columns, density):
    torch.manual_seed(0)
    scores = torch.randn(n_rows, n_columns)
    kept = int(density * scores.numel())
    return {
        "sort": lambda: scores.abs().flatten().sort(),
        "kthvalue": lambda: scores.abs().flatten().kthvalue(scores.numel() - kept),
        "topk": lambda: scores.abs().flatten().topk(kept, sorted=False),
        "ours": lambda: ops.select_mask([scores], [kept]),
    }


_INPUTS = {  # what makes ties or order: no slower than random scores
    "constant": lambda s: torch.full_like(s, 0.5),
    "sorted": lambda s: s.flatten().sort().values.view_as(s),
    "7 values": lambda s: s.round().clamp(-3, 3),
    "90 % zeros": lambda s: torch.where(torch.rand_like(s) < 0.9, 0.0, s),
}


def _select_inputs(n_rows, n_columns, density):
    torch.manual_seed(0)
    scores = torch.randn(n_rows, n_columns)
    kept = int(density * scores.numel())
    contenders = {"random": lambda: ops.select_mask([scores], [kept])}
    for name, change in _INPUTS.items():
        changed = change(scores)
        contenders[name] = lambda s=changed: ops.select_mask([s], [kept])
    return {**contenders, "ours": contenders["random"]}


def _select_long(n):
    """Against the memory: a copy of the scores, and one pure read of them."""
    torch.manual_seed(0)
    scores = torch.randn(n)
    kept, copy = n // 2, torch.empty(n)
    _, state = ops.select_mask([scores], [kept])
    return {
        "memcpy": lambda: copy.copy_(scores),
        "sum (a read)": scores.sum,
        "ours": lambda: ops.select_mask([scores], [kept]),
        "ours, last threshold": lambda: ops.select_mask([scores], [kept], None, state),
    }


def _resnet50_scores():
    with torch.device("meta"):
        model = build_model("resnet50", in_shape=(3, 224, 224), num_classes=1000)
    torch.manual_seed(0)
    weights = [
        m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    ]
    return [torch.randn(w.shape) / math.sqrt(w[0].numel()) for w in weights]


def _select_resnet50(scope):
    scores = _resnet50_scores()
    kept = [s.numel() * 3 // 10 for s in scores]
    total, everything = [sum(kept)], sum(s.numel() for s in scores)

    def by_sort():
        if scope == "layer":
            return [s.abs().flatten().sort() for s in scores]
        return torch.cat([s.abs().flatten() for s in scores]).sort()

    def by_kthvalue():
        if scope == "layer":
            pairs = zip(scores, kept, strict=True)
            return [s.abs().flatten().kthvalue(s.numel() - k) for s, k in pairs]
        return torch.cat([s.abs().flatten() for s in scores]).kthvalue(everything - total[0])

    counts, one = kept if scope == "layer" else total, torch.randn(everything)
    last = [s.contiguous(memory_format=torch.channels_last) if s.ndim == 4 else s for s in scores]
    return {
        "sort": by_sort,
        "kthvalue": by_kthvalue,
        "ours, one tensor": lambda: ops.select_mask([one], total),
        "ours, channels-last": lambda: ops.select_mask(last, counts, scope=scope),
        "ours": lambda: ops.select_mask(scores, counts, scope=scope),
    }


def _masked_step(shapes, adam=False):
    """The optimizer pass beside torch's own and the two masking passes that it then needs."""
    torch.manual_seed(0)
    lr = 1e-4
    masks = [torch.rand(s) < 0.1 for s in shapes]
    words = [ops.pack_mask(m) for m in masks]
    factors = [m.float() for m in masks]

    def torch_step(**options):
        parameters = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
        grads = [torch.randn(s) for s in shapes]
        if adam:
            optimizer = torch.optim.AdamW(parameters, lr=lr, **options)
        else:
            optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, **options)

        def step():
            with torch.no_grad():
                for p, g, m in zip(parameters, grads, factors, strict=True):
                    p.grad = g * m
                optimizer.step()
                torch._foreach_mul_(parameters, factors)

        return step

    weights = [torch.randn(s) for s in shapes]
    grads = [torch.randn(s) for s in shapes]
    held = [torch.zeros(s) for s in shapes]
    squares = [torch.zeros(s) for s in shapes] if adam else []

    def ours(shadows=()):
        ops.masked_step(weights, grads, held, squares, list(shadows), words, lr, 0.9)

    shadows = [w.bfloat16() for w in weights]
    return {
        "foreach, g*mask, w*mask": torch_step(foreach=True),
        "fused, g*mask, w*mask": torch_step(fused=True),
        "ours, with a bf16 shadow": lambda: ours(shadows),
        "ours": ours,
    }


def _popup_step(shapes, adam=False, scope="layer"):
    """The optimizer pass beside torch's fused one, without and with a selection after it."""
    torch.manual_seed(0)
    lr = 1e-4
    parameters = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    if adam:
        fused = torch.optim.AdamW(parameters, lr=lr, fused=True)
    else:
        fused = torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True)
    scores = [p.detach().clone() for p in parameters]
    grads = [p.grad for p in parameters]
    held = [torch.zeros_like(s) for s in scores]
    squares = [torch.zeros_like(s) for s in scores] if adam else []
    signs = [ops.sign_words(_SEED, i, s) for i, s in enumerate(shapes)]
    words = [torch.zeros_like(s) for s in signs]
    kept = [s.numel() // 2 for s in scores]
    kept = kept if scope == "layer" else [sum(kept)]
    state = torch.zeros(len(kept), 2, dtype=torch.int32)

    def ours():
        sigmas = [_SIGMA] * len(scores)
        args = (scores, grads, held, squares, words, state, kept, signs, sigmas, lr, 0.9)
        ops.popup_step(*args, scope=scope)

    def both(select):
        fused.step()
        return select()

    return {
        "fused torch": fused.step,
        "fused torch + sort": lambda: both(
            lambda: [p.detach().abs().flatten().sort() for p in parameters]
        ),
        "fused torch + select_mask": lambda: both(
            lambda: ops.select_mask(parameters, kept, scope=scope)
        ),
        "ours": ours,
    }


def _pack(shape):
    mask = _mask(shape, 0.3)
    return {
        "numpy.packbits": lambda: np.packbits(mask.numpy(), axis=1, bitorder="little"),
        "ours": lambda: ops.pack_mask(mask),
    }


def _unpack(shape):
    words = ops.pack_mask(_mask(shape, 0.3))
    packed = words.numpy().view(np.uint8)
    return {
        "numpy.unpackbits": lambda: np.unpackbits(
            packed, axis=1, count=shape[1], bitorder="little"
        ),
        "ours": lambda: ops.unpack_mask(words, shape),
    }


def _mask_ops(shape, op):
    a, b = _mask(shape, 0.3), _mask(shape, 0.5)
    words = ops.pack_mask(a), ops.pack_mask(b)
    dense = (lambda: a & b) if op == "and" else (lambda: (a ^ b).sum())
    return {"bool tensors": dense, "ours": lambda: ops.mask_ops(*words, op)}


def _apply(shape, density=0.3, dtype=torch.float32):
    weight, mask = torch.randn(shape, dtype=dtype), _mask(shape, density)
    floats, words = mask.to(dtype), ops.pack_mask(mask)
    return {"float mask": lambda: weight * floats, "ours": lambda: ops.apply_mask(weight, words)}


def _popup_weight(shape):
    """Forward and backward, beside the straight-through trick in plain torch."""
    mask = _mask(shape, 0.3)
    words, floats = ops.pack_mask(mask), mask.float()
    weight, grad = torch.randn(shape), torch.randn(shape)
    scores = torch.randn(shape, requires_grad=True)

    def detached():
        value = scores.abs() + (floats - scores.abs()).detach()
        return torch.autograd.grad(weight * value, scores, grad)

    def ours():
        return torch.autograd.grad(ops.popup_weight(weight, scores, words, "abs"), scores, grad)

    return {"straight-through in plain torch": detached, "ours": ours}


def _rice(shape, density, decode):
    mask = _mask(shape, density)
    words = ops.pack_mask(mask)
    parameter = max(0, round(math.log2(0.69 / density)))
    raw = np.packbits(mask.numpy()).tobytes()
    zipped, payload = zlib.compress(raw), ops.rice_encode(words, shape[1], parameter)
    if decode:
        kept = int(mask.sum())
        return {
            "zlib": lambda: zlib.decompress(zipped),
            "ours": lambda: ops.rice_decode(payload, *shape, kept, parameter),
        }
    return {
        "zlib": lambda: zlib.compress(raw),
        "ours": lambda: ops.rice_encode(words, shape[1], parameter),
    }


# ---------------------------------------------------------------- regenerated weights
def _regenerate(shape, dist, masked=False):
    words = ops.pack_mask(_mask(shape, 0.3)) if masked else None
    dense = torch.empty(shape)
    fill = {
        "signed_constant": lambda: dense.bernoulli_(0.5).mul_(2 * _SIGMA).sub_(_SIGMA),
        "uniform": lambda: dense.uniform_(-1, 1),
        "normal": lambda: dense.normal_(),
    }[dist]
    return {
        "torch generator": fill,
        "ours": lambda: ops.regenerate(_SEED, _LAYER, shape, dist, _SIGMA, words=words),
    }


def _regenerate_many(shapes):
    """Masked bf16 weights of a network, as its convolutions want them."""
    layers = range(len(shapes))
    words = [ops.pack_mask(_mask(shape, 0.3)) for shape in shapes]
    dense = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    masks = [_mask(shape, 0.3).bfloat16() for shape in shapes]
    sizes = [size for shape in shapes for size in shape]
    recipes = ([_SEED] * len(shapes), list(layers), [len(s) for s in shapes], sizes)
    sigmas = [_SIGMA] * len(shapes)
    return {
        "weight * mask": lambda: [w * m for w, m in zip(dense, masks, strict=True)],
        "ours": lambda: ops.regenerate_many(words, *recipes, sigmas, torch.bfloat16, True),
    }


def _signs(shape):
    return {
        "torch.randint": lambda: torch.randint(
            0, 2**31, (shape[0], shape[1] // 32), dtype=torch.int32
        ),
        "ours": lambda: ops.sign_words(_SEED, _LAYER, shape),
    }


# ---------------------------------------------------------------- linear layers
def _linear_inputs(shape, batch, density, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(batch, shape[1], dtype=dtype), torch.randn(shape, dtype=dtype)
    mask = _mask(shape, density)
    return x, weight, mask, ops.pack_mask(mask)


def _masked_linear(shape, batch, density, dtype=torch.float32):
    x, weight, mask, words = _linear_inputs(shape, batch, density, dtype)
    floats = mask.to(dtype)
    contenders = {
        "dense": lambda: F.linear(x, weight),
        "float mask": lambda: F.linear(x, weight * floats),
        "ours": lambda: ops.masked_linear(x, weight, words),
    }
    if dtype == torch.float32:
        csr, xt = (weight * floats).to_sparse_csr(), x.t().contiguous()
        contenders["torch CSR"] = lambda: csr @ xt
    return contenders


def _ticket_linear(shape, batch, density, dtype=torch.float32, keep=""):
    """``keep``: what the caller holds besides the mask: signs, codes, or signs and no mask."""
    x, weight, mask, words = _linear_inputs(shape, batch, density, dtype)
    floats, recipe = mask.to(dtype), (_SEED, _LAYER, "signed_constant", _SIGMA)
    signs = ops.sign_words(_SEED, _LAYER, shape) if "signs" in keep else None
    codes = ops.ticket_codes(words, shape[1], _SEED, _LAYER) if keep == "codes" else None
    used = None if keep == "signs only" else words
    contenders = {
        "dense": lambda: F.linear(x, weight),
        "float mask": lambda: F.linear(x, weight * floats),
        "ours": lambda: ops.ticket_linear(x, used, None, *recipe, signs, codes),
    }
    if dtype == torch.float32:
        csr, xt = (weight * floats).to_sparse_csr(), x.t().contiguous()
        x16, weight16 = x.bfloat16(), weight.bfloat16()
        contenders["torch CSR"] = lambda: csr @ xt
        contenders["dense bf16"] = lambda: F.linear(x16, weight16)
    return contenders


def _ticket_grad(shape, batch, density):
    """dX of a ticket: the transposed product."""
    _, weight, _, words = _linear_inputs(shape, batch, density, torch.float32)
    grad = torch.randn(batch, shape[0])
    recipe = (_SEED, _LAYER, "signed_constant", _SIGMA)
    return {
        "dense": lambda: grad @ weight,
        "regenerated": lambda: grad @ ops.regenerate(*recipe[:2], shape, *recipe[2:], words=words),
        "ours": lambda: ops.ticket_linear(grad, words, None, *recipe, columns=shape[1]),
    }


def _ticket_codes(shape, transposed):
    words = ops.pack_mask(_mask(shape, 0.5))
    return {
        "regenerate": lambda: ops.regenerate(
            _SEED, _LAYER, shape, "signed_constant", _SIGMA, words=words
        ),
        "ours": lambda: ops.ticket_codes(words, shape[1], _SEED, _LAYER, None, transposed),
    }


class _SortedMask(torch.autograd.Function):
    """The reference code's way (hidden-networks): sort every step, straight-through."""

    @staticmethod
    def forward(ctx, scores, kept):
        out = scores.clone()
        order = scores.flatten().sort().indices
        flat = out.flatten()
        flat[order[: -kept or None]] = 0
        flat[order[-kept:]] = 1
        return flat.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _popup_linear(shape, batch, density, seeded=False):
    """A whole step: exact top-k, forward, both gradients, SGD with momentum."""
    x, _, _, _ = _linear_inputs(shape, batch, density, torch.float32)
    x.requires_grad_()
    weight = ops.regenerate(_SEED, _LAYER, shape, "signed_constant", _SIGMA)
    trained = weight.clone().requires_grad_()
    scores = torch.randn(shape, requires_grad=True)
    kept = int(density * scores.numel())
    grad = torch.randn(batch, shape[0])
    given, recipe = None if seeded else weight, ("abs", _SEED, _LAYER, _SIGMA)

    def step(y, leaf, optimizer):
        x.grad = leaf.grad = None
        y.backward(grad)
        optimizer.step()

    sgd = {
        leaf: torch.optim.SGD([leaf], lr=1e-4, momentum=0.9, fused=True)
        for leaf in (trained, scores)
    }

    def ours():
        (words,), _ = ops.select_mask([scores.detach()], [kept])
        step(ops.popup_linear(x, given, scores, words, None, *recipe), scores, sgd[scores])

    # What PopupSGD does: raw gradients, one pass for update and selection.
    held, state = torch.zeros(shape), torch.zeros(1, 2, dtype=torch.int32)
    signs = ops.sign_words(_SEED, _LAYER, shape)
    kept_words = ops.select_mask([scores.detach()], [kept])[0][0]

    def ours_fused():
        x.grad = scores.grad = None
        y = ops.popup_linear(x, given, scores, kept_words, None, *recipe, raw_grad=True)
        y.backward(grad)
        sgd_step = ([held], [], [kept_words], state, [kept], [signs], [_SIGMA], 1e-4, 0.9)
        ops.popup_step([scores.detach()], [scores.grad], *sgd_step)

    return {
        "dense": lambda: step(F.linear(x, trained), trained, sgd[trained]),
        "sort + float mask": lambda: step(
            F.linear(x, weight * _SortedMask.apply(scores.abs(), kept)), scores, sgd[scores]
        ),
        "ours": ours,
        "ours, popup_step": ours_fused,
    }


def _compressed(shape, density, bias=False):
    """A dense layer, its compressed form, and the same weights as torch's CSR tensor."""
    torch.manual_seed(0)
    mask, dense = _mask(shape, density), torch.nn.Linear(*reversed(shape), bias=bias)
    sparse = st.SparseLinear.from_dense(dense, mask=mask, form="compressed")
    return dense, sparse, (dense.weight.detach() * mask).to_sparse_csr()


def _sparse_linear(shape, batch, density, dtype=torch.float32, resident=False, module=True):
    dense, sparse, csr = _compressed(shape, density)
    dense, sparse = dense.to(dtype), sparse.to(dtype)
    x = torch.randn(batch, shape[1], dtype=dtype)
    ours = x.unflatten(0, (-1, min(batch, 64))).mT.contiguous().mT if resident else x
    values, words, pattern = sparse.values.detach(), sparse.mask_words, sparse.pattern
    weight, xt = dense.weight.detach(), x.t().contiguous()

    def by_module():
        with torch.no_grad():
            return sparse(ours)

    def by_op():
        return ops.sparse_linear(ours, values, words, None, pattern)

    contenders = {"dense": lambda: F.linear(x, weight), "ours": by_module if module else by_op}
    if dtype == torch.float32:
        contenders["torch CSR"] = lambda: csr @ xt
        for name, layer in sparseprop_linear(csr.to_dense()).items():
            contenders[name] = _without_grad(lambda layer=layer: layer(x))
    return contenders


def _sparse_step(shape, batch, density):
    """Forward, input gradient and weight gradient, through the modules."""
    dense, sparse, csr = _compressed(shape, density)
    x, grad = torch.randn(batch, shape[1], requires_grad=True), torch.randn(batch, shape[0])

    def step(layer, parameters=()):
        x.grad = None
        for p in parameters:
            p.grad = None
        layer(x).backward(grad)

    contenders = {
        "dense": lambda: step(dense, dense.parameters()),
        "ours": lambda: step(sparse, sparse.parameters()),
    }
    for name, layer in sparseprop_linear(csr.to_dense()).items():
        contenders[name] = lambda layer=layer: step(layer, layer.parameters())
    return contenders


def _sparse_backward(shape, batch, density, which):
    dense, sparse, csr = _compressed(shape, density)
    x, grad = torch.randn(batch, shape[1]), torch.randn(batch, shape[0])
    values, words, weight = sparse.values.detach(), sparse.mask_words, dense.weight.detach()
    transposed = ops.sparse_pattern(words, shape[1], values.numel(), True)
    if which == "dx":
        csr_t, grad_t = csr.to_dense().t().to_sparse_csr(), grad.t().contiguous()
        return {
            "dense": lambda: grad @ weight,
            "ours": lambda: ops.sparse_linear_dx(
                grad, values, words, shape[1], sparse.pattern, transposed
            ),
            "torch CSR": lambda: csr_t @ grad_t,
        }
    grad_t = grad.t().contiguous()
    return {
        "dense": lambda: grad.t() @ x,
        "ours": lambda: ops.sparse_linear_dw(grad, x, words, values.numel(), sparse.pattern),
        "sampled_addmm": lambda: torch.sparse.sampled_addmm(csr, grad_t, x, beta=0.0),
    }


def _live(shape, density, scatter):
    dense, sparse, _ = _compressed(shape, density)
    values, words, weight = sparse.values.detach(), sparse.mask_words, dense.weight.detach()
    mask = sparse.mask.to_dense()
    if scatter:
        return {
            "masked_scatter": lambda: torch.zeros(shape).masked_scatter_(mask, values),
            "ours": lambda: ops.scatter_live(values, words, shape),
        }
    return {
        "weight[mask]": lambda: weight[mask],
        "ours": lambda: ops.gather_live(weight, words, values.numel()),
    }


def _sparse_pattern(shape, density, transposed):
    _, sparse, csr = _compressed(shape, density)
    dense, words, kept = csr.to_dense(), sparse.mask_words, sparse.values.numel()
    return {
        "to_sparse_csr": lambda: (dense.t() if transposed else dense).to_sparse_csr(),
        "ours": lambda: ops.sparse_pattern(words, shape[1], kept, transposed),
    }


def _popup_linear_ds(shape, batch):
    x, weight, _, _ = _linear_inputs(shape, batch, 0.5, torch.float32)
    grad, scores = torch.randn(batch, shape[0]), torch.randn(shape)
    recipe = ("abs", _SEED, _LAYER, _SIGMA)
    return {
        "dense weight gradient": lambda: grad.t() @ x,
        "torch": lambda: grad.t() @ x * weight * scores.sign(),
        "ours": lambda: ops.popup_linear_ds(grad, x, scores, *recipe),
    }


# ---------------------------------------------------------------- subset sums
def _subset_inputs(count, n, product, shared=1):
    torch.manual_seed(0)
    base = torch.rand(count, n) * 2 - 1
    base = base * (torch.rand(count, n) * 2 - 1) if product else base
    return base, torch.rand(count, shared) * 2 - 1


def _subset_sum(count, n, objective="min_card", product=False, shared=1):
    """``count`` bases a call; peers solve the first few, so that theirs is the time of as many:
    ``ours, as many`` is the row to hold beside them."""
    base, target = _subset_inputs(count, n, product, shared)
    eps = torch.tensor(0.01, dtype=torch.float64)
    few = 2 if objective == "min_error" else 10
    part = base[:few].contiguous(), target[:few, :1].contiguous()
    contenders = {
        name: lambda solve=solve: [solve(a, t, 0.01, objective) for a, t in zip(*part, strict=True)]
        for name, solve in subset_sum_solvers().items()
    }
    contenders["reference"] = lambda: subset_sum_reference(*part, eps, None, objective)
    contenders["ours, as many"] = lambda: ops.subset_sum(*part, eps, None, objective)
    return {**contenders, "ours": lambda: ops.subset_sum(base, target, eps, None, objective)}


# ---------------------------------------------------------------- convolutions
def _conv_inputs(shape, size, batch, density):
    torch.manual_seed(0)
    x, weight = torch.randn(batch, shape[1], size, size), torch.randn(shape)
    mask = _mask(shape, density)
    geometry = ((1, 1), (shape[2] // 2, shape[3] // 2), (1, 1), 1)
    return x, weight, mask, ops.pack_mask(mask), geometry


def _masked_conv(shape, size, batch, density):
    x, weight, mask, words, geometry = _conv_inputs(shape, size, batch, density)
    floats = mask.float()
    return {
        "dense": lambda: F.conv2d(x, weight, None, *geometry),
        "float mask": lambda: F.conv2d(x, weight * floats, None, *geometry),
        "ours": lambda: ops.masked_conv2d(x, weight, words, None, *geometry),
    }


def _ticket_conv(shape, size, batch, density):
    x, weight, mask, words, geometry = _conv_inputs(shape, size, batch, density)
    floats = mask.float()
    return {
        "dense": lambda: F.conv2d(x, weight, None, *geometry),
        "float mask": lambda: F.conv2d(x, weight * floats, None, *geometry),
        "ours": lambda: ops.ticket_conv2d(
            x, words, None, _SEED, _LAYER, "signed_constant", _SIGMA, shape, *geometry
        ),
    }


def _compressed_conv(shape, size, batch, density):
    """Input, a dense conv, and its compressed module after a first call."""
    x, weight, mask, _, (stride, padding, dilation, groups) = _conv_inputs(
        shape, size, batch, density
    )
    dense = torch.nn.Conv2d(
        shape[1], shape[0], shape[2:], stride, padding, dilation, groups, bias=False
    )
    dense.weight.data = weight
    sparse = st.SparseConv2d.from_dense(dense, mask=mask, form="compressed")
    with torch.no_grad():
        sparse(x)
    return x, dense, sparse


def _dense_layouts(call, x, weight):
    """``call(x, weight)`` in both of torch's memory formats: the faster one is the bar."""
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight)]
    return {"dense": lambda: call(x, weight), "dense channels_last": lambda: call(*last)}


def _sparse_conv(shape, size, batch, density):
    x, dense, sparse = _compressed_conv(shape, size, batch, density)
    weight = dense.weight.detach()
    place = (None, shape, sparse.stride, sparse.padding, sparse.dilation, sparse.groups)
    values, words = sparse.values.detach(), sparse.mask_words
    taps = ops.conv2d_taps(words, shape, x.shape[-2:], *place[2:])
    code = ops.compile_conv2d(words, shape, x.shape[-2:], *place[2:])
    return {
        **_dense_layouts(lambda x, w: F.conv2d(x, w, None, 1, sparse.padding), x, weight),
        "ours": _without_grad(lambda: sparse(x)),
        "ours portable": lambda: ops.sparse_conv2d(x, values, words, *place, taps),
        "ours machine code": lambda: ops.sparse_conv2d(x, values, words, *place, taps, None, code),
    }


def _without_grad(call):
    def run():
        with torch.no_grad():
            return call()

    return run


def _sparse_conv_dw(shape, size, batch, density):
    x, dense, sparse = _compressed_conv(shape, size, batch, density)
    grad = torch.randn(batch, shape[0], size, size)
    place = (sparse.stride, sparse.padding, sparse.dilation, sparse.groups)

    def whole(x, w):
        return torch.ops.aten.convolution_backward(
            grad, x, w, None, *place[:3], False, [0, 0], 1, [False, True, False]
        )

    words, live = sparse.mask_words, sparse.values.numel()
    return {
        **_dense_layouts(whole, x, dense.weight.detach()),
        "ours": lambda: ops.sparse_conv2d_dw(x, grad, words, live, shape, *place),
    }


def _conv_pattern(shape, flip):
    words = ops.pack_mask(_mask(shape, 0.1))
    place = ((1, 1), (1, 1), (1, 1), 1)
    live = int(ops.mask_ops(words, None, "popcount"))
    mask = ops.unpack_mask(words, shape)
    return {
        "torch.nonzero": lambda: mask.nonzero(),
        "ours": (lambda: ops.conv2d_flip(words, shape, 1, live))
        if flip
        else (lambda: ops.conv2d_taps(words, shape, (14, 14), *place)),
    }


def _inference(name, in_shape, density, folded):
    """A whole network at batch 1, every layer compressed; ``folded``: with the batch norms in the
    convolutions, the dense ones too."""
    torch.manual_seed(0)
    dense = build_model(name, in_shape=in_shape, num_classes=1000).eval()
    sparse = copy.deepcopy(dense)
    st.sparsify_(sparse, _Compressed(density))
    for model in (dense, sparse) if folded else ():
        st.fuse_batchnorm_(model)
    x = torch.randn(1, *in_shape)
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    return {
        "dense": _without_grad(lambda: dense(x)),
        "dense channels_last": _without_grad(lambda: last(x_last)),
        "ours": _without_grad(lambda: sparse(x)),
    }


def _sparse_training(name, in_shape, batch, density):
    """Step times of a whole network trained under a fixed mask, SGD with momentum."""
    torch.manual_seed(0)
    dense = build_model(name, in_shape=in_shape, num_classes=10)
    sparse = copy.deepcopy(dense)
    st.sparsify_(sparse, _Compressed(density))
    x, y = torch.randn(batch, *in_shape), torch.randint(0, 10, (batch,))
    return {"dense": _trainer(dense, x, y), "ours": _trainer(sparse, x, y)}


@dataclass(frozen=True)
class _Compressed:
    """Every convolution and linear layer at one density, by magnitude."""

    density: float

    def plan(self, name, module):
        return {"density": self.density, "form": "compressed"}


def _popup_conv(shape, size, batch, density):
    x, _, _, _, geometry = _conv_inputs(shape, size, batch, density)
    x.requires_grad_()
    weight = ops.regenerate(_SEED, _LAYER, shape, "signed_constant", _SIGMA)
    trained = weight.clone().requires_grad_()
    scores = torch.randn(shape, requires_grad=True)
    kept = int(density * scores.numel())
    grad = torch.randn(batch, shape[0], size, size)

    def step(y, leaf):
        x.grad = leaf.grad = None
        y.backward(grad)

    def ours():
        (words,), _ = ops.select_mask([scores.detach()], [kept])
        recipe = ("abs", _SEED, _LAYER, _SIGMA)
        step(ops.popup_conv2d(x, weight, scores, words, None, *recipe, *geometry), scores)

    return {
        "dense": lambda: step(F.conv2d(x, trained, None, *geometry), trained),
        "sort + float mask": lambda: step(
            F.conv2d(x, weight * _SortedMask.apply(scores.abs(), kept), None, *geometry), scores
        ),
        "ours": ours,
    }


def _trainer(model, x, y, update=lambda model: None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        update(model)

    return step


def _search_step(model_name, in_shape, batch):
    """A whole training step through the modules, exact top-k every step, SGD with momentum."""
    torch.manual_seed(0)
    dense = build_model(model_name, in_shape=in_shape, num_classes=10)
    popup = build_model(model_name, in_shape=in_shape, num_classes=10)
    st.sparsify_(popup, st.EdgePopup(density=0.5))
    x, y = torch.randn(batch, *in_shape), torch.randint(0, 10, (batch,))

    return {"dense": _trainer(dense, x, y), "ours": _trainer(popup, x, y, st.update_masks)}


_SQUARE, _FC, _LARGE = (2048, 2048), (512, 4608), (4096, 4096)
_N = 2048 * 2048
_BITS = _N // 8  # bytes of one mask
_DENSITIES = (0.2, 0.1, 0.05, 0.02, 0.01)
_CONVS = (((64, 64, 3, 3), 56), ((256, 256, 3, 3), 14), ((512, 512, 3, 3), 7))


_RESNET_3X3 = (((64, 64, 3, 3), 56), ((128, 128, 3, 3), 28), *_CONVS[1:])
_NETWORKS = (
    ("ResNet-18 CIFAR", "cresnet18", (3, 32, 32), 11.2e6),
    ("ResNet-50", "resnet50", (3, 224, 224), 25.5e6),
)
_RESNET_1X1 = (((64, 256, 1, 1), 56), ((256, 64, 1, 1), 56))


def _conv_name(shape, size):
    return f"{shape[2]}x{shape[3]} {shape[1]}->{shape[0]} at {size}^2"


CASES: dict[str, list[Case]] = {
    "select_mask": [
        Case("2048x2048 keep .5", lambda: _select(*_SQUARE, 0.5), 4 * _N + _N // 8),
        Case("2048x2048 keep .05", lambda: _select(*_SQUARE, 0.05), 4 * _N + _N // 8),
        Case(
            "2048x2048 keep .5 kinds of input",
            lambda: _select_inputs(*_SQUARE, 0.5),
            4 * _N + _N // 8,
        ),
        Case("1e8 keep .5", lambda: _select_long(10**8), 10**8 * 33 // 8),
        Case("ResNet-50 54 layers keep .3", lambda: _select_resnet50("layer"), 25502912 * 33 // 8),
        Case("ResNet-50 global keep .3", lambda: _select_resnet50("global"), 25502912 * 33 // 8),
    ],
    "pack_mask": [
        Case("2048x2048", lambda: _pack(_SQUARE), _N + _N // 8),
        Case("2048x2000, ragged rows", lambda: _pack((2048, 2000)), 2048 * 2250),
    ],
    "unpack_mask": [
        Case("2048x2048", lambda: _unpack(_SQUARE), _N + _N // 8),
        Case("2048x2000, ragged rows", lambda: _unpack((2048, 2000)), 2048 * 2250),
    ],
    "mask_ops": [
        Case("and 2048x2048", lambda: _mask_ops(_SQUARE, "and"), 3 * _N // 8),
        Case("hamming 2048x2048", lambda: _mask_ops(_SQUARE, "hamming"), 2 * _N // 8),
    ],
    "apply_mask": [
        Case("2048x2048 fp32", lambda: _apply(_SQUARE), 8 * _N + _N // 8),
        Case("2048x2048 bf16", lambda: _apply(_SQUARE, dtype=torch.bfloat16), 4 * _N + _N // 8),
        Case("512x512x3x3 fp32", lambda: _apply((512, 512, 3, 3)), 2359296 * 65 // 8),
    ],
    "popup_weight": [
        Case("2048x2048 fp32, with score gradient", lambda: _popup_weight(_SQUARE), 24 * _N)
    ],
    "rice_encode": [Case("2048x2048 keep .1", lambda: _rice(_SQUARE, 0.1, False), _N // 8)],
    "rice_decode": [Case("2048x2048 keep .1", lambda: _rice(_SQUARE, 0.1, True), _N // 8)],
    "regenerate": [
        Case("signed_constant 2048^2", lambda: _regenerate(_SQUARE, "signed_constant"), 4 * _N),
        Case(
            "signed_constant 2048^2 masked",
            lambda: _regenerate(_SQUARE, "signed_constant", True),
            4 * _N + _N // 8,
        ),
        Case("uniform 2048^2", lambda: _regenerate(_SQUARE, "uniform"), 4 * _N),
        Case("normal 2048^2", lambda: _regenerate(_SQUARE, "normal"), 4 * _N),
    ],
    "regenerate_many": [
        Case(
            "3x3 layers of ResNet-50 bf16",
            lambda: _regenerate_many([shape for shape, _ in _RESNET_3X3]),
            sum(math.prod(shape) for shape, _ in _RESNET_3X3) * 17 // 8,
        )
    ],
    "sign_words": [Case("2048x2048", lambda: _signs(_SQUARE), _N // 8)],
    "masked_linear": [
        *(
            Case(
                f"2048x2048 batch {b} keep {str(d)[1:]}",
                lambda b=b, d=d: _masked_linear(_SQUARE, b, d),
                4 * _N,
            )
            for d in (0.1, 0.5, 0.9)
            for b in (1, 4, 16, 128)
        ),
        Case("call overhead: 8x8 batch 1", lambda: _masked_linear((8, 8), 1, 0.5), 256),
    ],
    "ticket_codes": [
        Case("2048x2048", lambda: _ticket_codes(_SQUARE, False), 3 * _BITS),
        Case("2048x2048 transposed", lambda: _ticket_codes(_SQUARE, True), 3 * _BITS),
    ],
    "ticket_linear": [
        *(
            Case(f"2048x2048 batch {b} keep .1", lambda b=b: _ticket_linear(_SQUARE, b, 0.1), _BITS)
            for b in (1, 4, 16, 128)
        ),
        *(
            Case(
                f"4096x4096 batch 1 {name}",
                lambda keep=keep, d=d: _ticket_linear(_LARGE, 1, d, keep=keep),
                bits * 4 * _BITS,
            )
            for name, keep, d, bits in (
                ("keep .5, codes", "codes", 0.5, 2),
                ("keep .5, stored signs", "signs", 0.5, 2),
                ("keep 1, signs only", "signs only", 1.0, 1),
                ("keep .5, seed", "", 0.5, 1),
            )
        ),
        *(
            Case(
                f"4096x4096 batch {b} keep {d}, codes",
                lambda b=b, d=d: _ticket_linear(_LARGE, b, d, keep="codes"),
                8 * _BITS,
            )
            for b, d in (
                (4, 0.5),
                (8, 0.5),
                (16, 0.5),
                (16, 0.05),
                (64, 0.5),
                (64, 0.05),
                (256, 0.5),
            )
        ),
        *(
            Case(
                f"4096x4096 batch {b} keep .5 bf16, codes",
                lambda b=b: _ticket_linear(_LARGE, b, 0.5, torch.bfloat16, "codes"),
                8 * _BITS,
            )
            for b in (1, 16, 64, 128)
        ),
        Case("4096x4096 batch 64 keep .5", lambda: _ticket_linear(_LARGE, 64, 0.5), 4 * _BITS),
        Case("4096x4096 batch 64 keep .5, dX", lambda: _ticket_grad(_LARGE, 64, 0.5), 4 * _BITS),
    ],
    "popup_linear": [
        *(
            Case(
                f"step {o}x{k} batch {b} keep {d}{', seed' if seeded else ''}",
                lambda o=o, k=k, b=b, d=d, seeded=seeded: _popup_linear((o, k), b, d, seeded),
                16 * o * k,
            )
            for o, k, b, d in (
                (*_SQUARE, 64, 0.5),
                (*_SQUARE, 128, 0.5),
                (*_SQUARE, 256, 0.5),
                (*_FC, 128, 0.3),
                (*_LARGE, 256, 0.5),
            )
            for seeded in (False, True)
        ),
        Case(
            "LeNet-300-100 whole step batch 128",
            lambda: _search_step("lenet300", (1, 28, 28), 128),
            16 * 266200,
        ),
    ],
    "gather_live": [Case("2048x2048 keep .1", lambda: _live(_SQUARE, 0.1, False), _BITS + _N)],
    "scatter_live": [Case("2048x2048 keep .1", lambda: _live(_SQUARE, 0.1, True), _BITS + 4 * _N)],
    "sparse_pattern": [
        Case(
            f"2048x2048 keep .1{', transposed' if t else ''}",
            lambda t=t: _sparse_pattern(_SQUARE, 0.1, t),
            _BITS + _N // 5,
        )
        for t in (False, True)
    ],
    "subset_sum": [
        *(
            Case(
                f"100,000 {'product' if p else 'uniform'} n={n} eps .01 min_card",
                lambda n=n, p=p: _subset_sum(100_000, n, product=p),
                100_000 * (4 * n + 29),
            )
            for p in (False, True)
            for n in (15, 21)
        ),
        Case(
            "397,000 uniform n=21 eps .01 min_card",
            lambda: _subset_sum(397_000, 21),
            397_000 * (4 * 21 + 29),
        ),
        Case(
            "500 uniform n=21 shared by 784 eps .01 min_card",
            lambda: _subset_sum(500, 21, shared=784),
            500 * 784 * 29,
        ),
        *(
            Case(
                f"1,000 uniform n={n} min_error",
                lambda n=n: _subset_sum(1000, n, "min_error"),
                1000 * (4 * n + 29),
            )
            for n in (15, 21)
        ),
    ],
    "sparse_linear": [
        *(
            Case(
                f"2048x2048 batch {b} keep {d}",
                lambda b=b, d=d: _sparse_linear(_SQUARE, b, d),
                int(6 * d * _N),
            )
            for b in (1, 16, 64, 256)
            for d in _DENSITIES
        ),
        *(
            Case(
                f"2048x2048 batch 256 keep {d}, resident",
                lambda d=d: _sparse_linear(_SQUARE, 256, d, resident=True),
                int(6 * d * _N),
            )
            for d in _DENSITIES
        ),
        *(
            Case(
                f"2048x2048 batch {b} keep .1, op alone",
                lambda b=b: _sparse_linear(_SQUARE, b, 0.1, module=False),
                int(0.6 * _N),
            )
            for b in (1, 16)
        ),
        *(
            Case(
                f"2048x2048 batch {b} keep .1 bf16",
                lambda b=b: _sparse_linear(_SQUARE, b, 0.1, torch.bfloat16),
                int(0.4 * _N),
            )
            for b in (1, 256)
        ),
        *(
            Case(
                f"step 2048x2048 batch 256 keep {d}",
                lambda d=d: _sparse_step(_SQUARE, 256, d),
                int(18 * d * _N),
            )
            for d in _DENSITIES
        ),
        Case("call overhead: 8x8 batch 1", lambda: _sparse_linear((8, 8), 1, 0.5), 256),
        Case(
            "call overhead: 8x8 batch 1, op alone",
            lambda: _sparse_linear((8, 8), 1, 0.5, module=False),
            256,
        ),
    ],
    "sparse_linear_dx": [
        Case(
            f"2048x2048 batch 256 keep {d}",
            lambda d=d: _sparse_backward(_SQUARE, 256, d, "dx"),
            int(10 * d * _N),
        )
        for d in (0.2, 0.05)
    ],
    "sparse_linear_dw": [
        Case(
            f"2048x2048 batch 256 keep {d}",
            lambda d=d: _sparse_backward(_SQUARE, 256, d, "dw"),
            int(6 * d * _N),
        )
        for d in (0.2, 0.05)
    ],
    "popup_linear_ds": [
        Case("2048x2048 batch 128", lambda: _popup_linear_ds(_SQUARE, 128), 12 * _N)
    ],
    "masked_step": [
        Case("SGD 2048x2048 keep .1", lambda: _masked_step([_SQUARE]), 20 * _N + _N // 8),
        Case("AdamW 2048x2048 keep .1", lambda: _masked_step([_SQUARE], True), 28 * _N + _N // 8),
        Case(
            "SGD ResNet-50 keep .1",
            lambda: _masked_step([s.shape for s in _resnet50_scores()]),
            25502912 * 161 // 8,
        ),
    ],
    "popup_step": [
        Case("SGD 2048x2048 keep .5", lambda: _popup_step([_SQUARE]), 20 * _N + _N // 4),
        Case("SGD 4096x4096 keep .5", lambda: _popup_step([(4096, 4096)]), 4 * (20 * _N + _N // 4)),
        Case("AdamW 2048x2048 keep .5", lambda: _popup_step([_SQUARE], True), 28 * _N + _N // 4),
        Case(
            "SGD ResNet-50 global keep .5",
            lambda: _popup_step([s.shape for s in _resnet50_scores()], scope="global"),
            25502912 * 81 // 4,
        ),
    ],
    "masked_conv2d": [
        Case(
            f"{_conv_name(shape, size)} batch {b} keep .05",
            lambda shape=shape, size=size, b=b: _masked_conv(shape, size, b, 0.05),
            4 * math.prod(shape),
        )
        for shape, size in _CONVS
        for b in (1, 16)
    ],
    "ticket_conv2d": [
        Case(
            f"{_conv_name(shape, size)} batch 1 keep .05",
            lambda shape=shape, size=size: _ticket_conv(shape, size, 1, 0.05),
            math.prod(shape) // 8,
        )
        for shape, size in _CONVS
    ],
    "sparse_conv2d": [
        *(
            Case(
                f"{_conv_name(shape, size)} batch {b} keep {d}",
                lambda shape=shape, size=size, b=b, d=d: _sparse_conv(shape, size, b, d),
                4 * b * size * size * (shape[0] + shape[1]),
            )
            for b in (1, 32)
            for shape, size in (*_RESNET_3X3, *_RESNET_1X1)
            for d in (0.1, 0.05, 0.02)
        ),
        *(
            Case(
                f"{label} inference batch 1 keep {d}{', folded' if folded else ''}",
                lambda d=d, f=folded, name=name, shape=shape: _inference(name, shape, d, f),
                round(8 * weights * d),
            )
            for label, name, shape, weights in _NETWORKS
            for folded in (False, True)
            for d in (0.1, 0.05)
        ),
        Case(
            "ResNet-18 CIFAR whole step batch 32 keep 0.05",
            lambda: _sparse_training("cresnet18", (3, 32, 32), 32, 0.05),
            round(24 * 11.2e6 * 0.05),
        ),
    ],
    "sparse_conv2d_dw": [
        Case(
            f"{_conv_name(shape, size)} batch 32 keep {d}",
            lambda shape=shape, size=size, d=d: _sparse_conv_dw(shape, size, 32, d),
            4 * 32 * size * size * (shape[0] + shape[1]),
        )
        for shape, size in _RESNET_3X3
        for d in (0.1, 0.05)
    ],
    "conv2d_taps": [
        Case("256x256x3x3 keep .1", lambda: _conv_pattern((256, 256, 3, 3), False), 8 * 58982)
    ],
    "conv2d_flip": [
        Case("256x256x3x3 keep .1", lambda: _conv_pattern((256, 256, 3, 3), True), 8 * 58982)
    ],
    "popup_conv2d": [
        Case(
            f"step {_conv_name(*_CONVS[1])} batch 32 keep .5",
            lambda: _popup_conv(*_CONVS[1], 32, 0.5),
            16 * math.prod(_CONVS[1][0]),
        ),
        Case(
            "Conv-4 whole step batch 32",
            lambda: _search_step("conv4", (3, 32, 32), 32),
            16 * 2425024,
        ),
    ],
}

SWEEPS: list[Sweep] = [
    *(
        Sweep(
            f"{op} {_conv_name(shape, size)} batch {b}",
            lambda d, f=f, shape=shape, size=size, b=b: f(shape, size, b, d),
        )
        for op, f in (("sparse_conv2d", _sparse_conv), ("sparse_conv2d_dw", _sparse_conv_dw))
        for shape, size in (*_RESNET_3X3, *_RESNET_1X1)
        for b in (1, 32)
    ),
    *(
        Sweep(
            f"sparse_linear 2048x2048 batch {b} {name}",
            lambda d, b=b, t=t: _sparse_linear(_SQUARE, b, d, t),
            (1.0, 0.8, 0.6, 0.4, 0.2),
        )
        for name, t in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for b in (1, 2, 4, 16, 64, 256)
    ),
    *(
        Sweep(f"{op} 2048x2048 batch {b} {name}", lambda d, f=f, b=b, t=t: f(_SQUARE, b, d, t))
        for op, f in (("masked_linear", _masked_linear), ("ticket_linear", _ticket_linear))
        for name, t in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for b in (1, 4, 8, 12, 16, 128)
    ),
    *(
        Sweep(
            f"{op} {_conv_name(shape, size)} batch {b}",
            lambda d, f=f, shape=shape, size=size, b=b: f(shape, size, b, d),
        )
        for op, f in (("masked_conv2d", _masked_conv), ("ticket_conv2d", _ticket_conv))
        for shape, size in _CONVS
        for b in (1, 8, 32)
    ),
]
