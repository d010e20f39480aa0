"""How op tests compare: element by element, with bounds made by the reference itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence

import torch

from sparseticket import _C
from sparseticket.reference.pack_mask import pack_mask

__all__ = [
    "CONVS",
    "FORMATS",
    "assert_bounded",
    "by_threads",
    "check_compiled",
    "compare",
    "compiled",
    "gradients",
    "leaf",
    "module_of",
    "patterns",
    "routes",
    "signed",
]

Op = Callable[..., torch.Tensor]


def module_of(op: str):
    """The module ``sparseticket.ops.<op>``, whose name the package gives to the op itself."""
    return importlib.import_module(f"sparseticket.ops.{op}")


def routes(*fused: torch.dtype) -> list[tuple[str, str, torch.dtype]]:
    """``(path, isa, dtype)``: fused kernels on every ISA, materialised in every dtype."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    return [
        *(("fused", isa, dtype) for isa in _C.isas() for dtype in fused),
        *(("materialised", _C.isas()[-1], dtype) for dtype in dtypes),
    ]


def patterns(shape: Sequence[int], names: str = "half sparse none all rows") -> Iterator:
    """``(name, bool mask, words)``: random densities, density 0 and 1, empty and full rows."""
    shape = tuple(shape)
    for name in names.split():
        density = {"half": 0.5, "sparse": 0.06, "none": 0.0, "all": 1.0, "rows": 0.5}[name]
        mask = torch.rand(shape) < density
        if name == "rows" and len(shape) > 1:
            mask[:1] = False
            mask[1:2] = True
        yield name, mask, pack_mask(mask)


def live(rows: int, k: int, density: float) -> tuple[torch.Tensor, int]:
    """Words of a random mask ``[rows, k]`` of about that density, and its number of ones."""
    torch.manual_seed(0)
    mask = torch.rand(rows, k) < density
    return pack_mask(mask), int(mask.sum())


def signed(words: Sequence[int]) -> torch.Tensor:
    """int32 tensor of unsigned 32-bit words."""
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in words], dtype=torch.int32)


def _sliced(t):
    return torch.stack([t, t.logical_not().to(t.dtype)], -1)[..., 0]


def _swapped(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else _sliced(t)


def _channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.contiguous()


# (x, weight, stride, padding, dilation, groups): odd sizes, rows of more than one vector, groups,
# depthwise with a multiplier, a kernel as large as the input, padding wider than the kernel,
# unbatched input, no elements
CONVS = [
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((1, 3, 17, 33), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 4, 11, 20), (6, 4, 3, 2), (2, 1), (0, 2), (1, 2), 1),
    ((1, 4, 13, 9), (6, 2, 3, 3), (2, 2), (1, 1), (2, 1), 2),
    ((3, 8, 7, 5), (8, 1, 3, 3), (1, 1), (1, 1), (1, 1), 8),
    ((1, 4, 5, 63), (8, 1, 1, 5), (1, 3), (0, 2), (1, 1), 4),
    ((2, 17, 4, 4), (3, 17, 4, 4), (1, 1), (0, 0), (1, 1), 1),
    ((1, 2, 3, 3), (2, 2, 1, 1), (1, 1), (2, 3), (1, 1), 1),
    ((2, 100, 3, 3), (3, 100, 1, 1), (3, 2), (0, 0), (1, 1), 1),
    ((1, 3, 40, 63), (2, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    ((4, 9, 10), (6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((6, 5, 7), (4, 3, 3, 1), (2, 1), (1, 0), (1, 1), 2),
    ((0, 3, 5, 5), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
]

FORMATS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "swapped": _swapped,
    "sliced": _sliced,
}


def by_threads(op: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What ``op()`` gives with one thread and with two."""
    before, made = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(op())
    torch.set_num_threads(before)
    return made


def leaf(t: torch.Tensor | None) -> torch.Tensor | None:
    """A leaf with ``t``'s values and strides."""
    return None if t is None else t.detach().requires_grad_()


def assert_bounded(got, reference, bound, terms, what="output", dtype=None):
    """|got - reference| <= (eps + (1 + sqrt(terms)) * eps_acc) * bound in every element.

    ``bound``: the same sum over absolute values, ``terms``: the number of its products. The first
    eps is the output's rounding (and one more for a bias added apart), the rest is the accumulation
    in float32 or better: rounding errors are as good as independent, so they grow like the square
    root of the number of terms (Higham and Mary, SIAM J. Sci. Comput. 2019), with twice the
    standard constant. ``dtype``: what the op computes in, if coarser than the result.
    """
    assert got.shape == reference.shape, (what, got.shape, reference.shape)
    eps = max(torch.finfo(d).eps for d in (got.dtype, dtype or got.dtype))
    accumulation = min(eps, torch.finfo(torch.float32).eps)
    allowed = (eps + (1 + terms.sqrt()) * accumulation) * bound
    if got.dtype == torch.float64:
        allowed = 2 * allowed  # the reference is no better
    error = (got.double() - reference).abs()
    bad = ~(error <= allowed)  # NaN is bad
    if bool(bad.any()):
        at = tuple(torch.nonzero(bad)[0].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements out of bounds, first {at}: got "
            f"{got[at]:.9g}, reference {reference[at]:.9g}, allowed +-{allowed[at]:.3g}"
        )


def gradients(op: Op, tensors: Sequence[torch.Tensor | None], wrt: Sequence[int], grad=None):
    """``(output, grad of output, gradients of tensors[i] for i in wrt)``."""
    leaves = [leaf(t) for t in tensors]
    y = op(*leaves)
    grad = torch.randn(y.shape, dtype=torch.float64).to(y.dtype) if grad is None else grad
    return y.detach(), grad, torch.autograd.grad(y, [leaves[i] for i in wrt], grad)


def compare(op: Op, reference: Op, tensors: Sequence[torch.Tensor | None], wrt: Sequence[int]):
    """Output and gradients of ``op(*tensors)`` against ``reference`` in float64."""
    wrt = [i for i in wrt if tensors[i] is not None]
    y, grad, grads = gradients(op, tensors, wrt)

    def oracle(change):
        changed = [None if t is None else change(t.double()) for t in tensors]
        return gradients(reference, changed, wrt, change(grad.double()))

    (ref, _, refs), (bound, _, bounds) = oracle(lambda t: t), oracle(torch.abs)
    terms, _, all_terms = oracle(torch.ones_like)
    assert y.dtype == tensors[0].dtype
    assert_bounded(y, ref, bound, terms)
    for i, got, *rest in zip(wrt, grads, refs, bounds, all_terms, strict=True):
        assert got.dtype == tensors[i].dtype
        assert_bounded(got, *rest, what=f"gradient of tensor {i}", dtype=y.dtype)


def compiled(op: Op, backend: str = "aot_eager") -> Op:
    """``op`` compiled from a fresh start: no graph of another test is found or counted."""
    torch._dynamo.reset()
    return torch.compile(lambda *args: op(*args), fullgraph=True, backend=backend)


def check_compiled(op: Op, tensors, wrt, backend: str = "aot_eager") -> None:
    """``torch.compile(op, fullgraph=True)`` gives the eager bits, forward and backward."""
    y, grad, grads = gradients(op, tensors, wrt)
    y2, _, grads2 = gradients(compiled(op, backend), tensors, wrt, grad)
    for a, b in zip((y, *grads), (y2, *grads2), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
