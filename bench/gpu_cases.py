"""What ``bench.device`` times on a GPU: per op, cases at full size and small ones for a rehearsal.

A maker takes ``(device, small)`` and yields cases; the first contender is the baseline, and what
"ours" returns is checked against what ``expected`` returns, if it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from sparseticket import ops, prng
from sparseticket.formats import canonical_shape

__all__ = ["GPU_CASES", "GpuCase", "cuda_body"]


class GpuCase(NamedTuple):
    name: str
    contenders: dict[str, Callable[[], Any]]
    bytes_moved: int  # by the fewest reads and writes that the op needs
    flops: int = 0
    expected: Callable[[], Any] | None = None


def cuda_body(op, *args, **kwargs):
    """The op as CUDA tensors meet it, also in a rehearsal on CPU tensors in the interpreter."""
    if any(t.is_cuda for t in _tensors(args)):
        return op(*args, **kwargs)
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)


def _tensors(args) -> Iterator[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


def _resnet50_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return [*shapes, (1000, 2048)]


def _shapes(small: bool) -> list[tuple[int, ...]]:
    return [(16, 64, 1, 1), (7, 64, 3, 3), (5, 70)] if small else _resnet50_shapes()


def _last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def _flat_select(device, n: int, density: float, kind: str) -> GpuCase:
    torch.manual_seed(0)
    scores = torch.randn(1, n, device=device)
    if kind == "constant":
        scores.fill_(0.5)
    kept = int(density * n)
    _, state = cuda_body(ops.select_mask, [scores], [kept])
    moved = scores + 1e-4 * torch.randn_like(scores) if kind == "random" else scores
    flat = moved.view(-1)

    def by_sort():
        mask = torch.zeros_like(flat)
        mask[flat.abs().sort(descending=True).indices[:kept]] = 1
        return mask

    def by_topk():
        return torch.zeros_like(flat).scatter_(0, flat.abs().topk(kept).indices, 1.0)

    def by_kthvalue():
        return flat.abs() >= flat.abs().kthvalue(n - kept + 1).values

    def expected():
        index = flat.abs().sort(descending=True, stable=True).indices[:kept]
        mask = torch.zeros(1, n, dtype=torch.bool, device=device)
        mask[0, index] = True
        return ops.pack_mask(mask)

    contenders = {"sort": by_sort, "topk": by_topk}
    if n <= 10**7:
        contenders["kthvalue"] = by_kthvalue
    contenders["ours"] = lambda: cuda_body(ops.select_mask, [moved], [kept], None, state)[0][0]
    contenders["ours, no state"] = lambda: cuda_body(ops.select_mask, [moved], [kept])[0][0]
    return GpuCase(f"{n} keep {density} {kind}", contenders, n * 4 + n // 8, expected=expected)


def select_mask(device, small: bool) -> Iterator[GpuCase]:
    sizes = [5000] if small else [10**8, 10**6, 10**7, 10**5]
    for n in sizes:
        yield _flat_select(device, n, 0.5, "random")
    yield _flat_select(device, 4096 if small else 10**7, 0.5, "constant")
    if not small:
        for density in (0.01, 0.1, 0.3, 0.9):
            yield _flat_select(device, 10**7, density, "random")
    torch.manual_seed(0)
    scores = [_last(torch.randn(s, device=device)) for s in _shapes(small)]
    kept = [s.numel() // 2 for s in scores]
    total = sum(s.numel() for s in scores)
    _, state = cuda_body(ops.select_mask, scores, kept)

    def by_sort():
        for s, k in zip(scores, kept, strict=True):
            flat = s.abs().flatten()
            torch.zeros_like(flat)[flat.sort(descending=True).indices[:k]] = 1

    ours = {
        "sort": by_sort,
        "ours": lambda: cuda_body(ops.select_mask, scores, kept, None, state)[0],
        "ours, no state": lambda: cuda_body(ops.select_mask, scores, kept)[0],
    }
    yield GpuCase(f"{len(scores)} layers of ResNet-50", ours, total * 4 + total // 8)


def regenerate(device, small: bool) -> Iterator[GpuCase]:
    """Frozen layers as the convolutions want them: bits and a seed to dense weights."""
    from sparseticket.kernels.regenerate import regenerate_many

    torch.manual_seed(0)
    shapes = _shapes(small)
    layouts = [(*canonical_shape(s), 1) for s in shapes]
    words = [ops.pack_mask(torch.rand(s) < 0.5).to(device) for s in shapes]
    outs = [
        torch.empty(math.prod(s), dtype=torch.float16 if small else torch.bfloat16, device=device)
        for s in shapes
    ]
    seeds = [prng.stream_key(5, i, "sign") for i in range(len(shapes))]
    dense = [torch.randn_like(o) for o in outs]
    masks = [(torch.rand(o.shape, device=device) < 0.5).to(o.dtype) for o in outs]
    total = sum(o.numel() for o in outs)

    def ours():
        regenerate_many(outs, words, layouts, [0.5] * len(shapes), seeds)
        return outs

    contenders = {
        "weight * mask": lambda: [torch.mul(w, m) for w, m in zip(dense, masks, strict=True)],
        "foreach": lambda: torch._foreach_mul(dense, masks),
        "ours": ours,
    }
    yield GpuCase(f"{len(shapes)} layers of ResNet-50", contenders, total * 2 + total // 8)


def mask_ops(device, small: bool) -> Iterator[GpuCase]:
    words = 1000 if small else 10**8 // 32
    a, b = torch.randint(-(2**31), 2**31, (2, 1, words), device=device).to(torch.int32)
    for op, bytes_moved in (("and", 12 * words), ("hamming", 8 * words)):
        contenders = {"torch": lambda: a & b} if op == "and" else {}
        contenders["ours"] = lambda op=op: cuda_body(ops.mask_ops, a, b, op)
        expected = (lambda: a & b) if op == "and" else None
        yield GpuCase(f"{op} {32 * words}", contenders, bytes_moved, expected=expected)


GPU_CASES = {"select_mask": select_mask, "regenerate": regenerate, "mask_ops": mask_ops}
