"""What ``bench.device`` times on a GPU: per op, cases at full size and small ones for a rehearsal.

A maker takes ``(device, small)`` and yields cases; the first contender is the baseline, and what
"ours" returns is checked against what ``expected`` returns, if it is given. ``bar`` is what the
case was set to reach (H200, bf16), as text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sparseticket import ops, prng

__all__ = ["GPU_CASES", "GpuCase", "cuda_body"]

_SEED, _LAYER = 5, 7
_RECIPE = (_SEED, _LAYER, "signed_constant")
_INSTRUCTIONS = {False: 2.8, True: 3.1}  # a weight, of the decoding kernels: python -m bench.cross


class GpuCase(NamedTuple):
    name: str
    contenders: dict[str, Callable[[], Any]]
    bytes_moved: int  # by the fewest reads and writes that the op needs
    flops: int = 0
    instructions: float = 0  # of one lane, where decoding may be the limit
    expected: Callable[[], Any] | None = None
    tolerance: float = 0.0  # of the largest element of what is expected
    graph: bool = True  # whether it is timed as a CUDA graph too
    bar: str = ""


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


def _bar(n: int, small: bool) -> str:
    bars = {10**8: "<= 0.16 ms", 10**6: "<= 0.03 ms"}
    return "" if small else bars.get(n, "")


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
    bar = _bar(n, kind != "random" or density != 0.5)
    return GpuCase(
        f"{n} keep {density} {kind}", contenders, n * 4 + n // 8, expected=expected, bar=bar
    )


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
    moved = total * 4 + total // 8
    yield GpuCase(f"{len(scores)} layers of ResNet-50", ours, moved, bar="<= 0.08 ms")


def regenerate_many(device, small: bool) -> Iterator[GpuCase]:
    """Frozen layers as the convolutions want them: bits and seeds to dense weights."""
    torch.manual_seed(0)
    shapes, dtype = _shapes(small), _half(small)
    words = [ops.pack_mask(torch.rand(s) < 0.5).to(device) for s in shapes]
    dense = [_last(torch.randn(s, device=device).to(dtype)) for s in shapes]
    masks = [_last((torch.rand(s, device=device) < 0.5).to(dtype)) for s in shapes]
    total, count = sum(t.numel() for t in dense), len(shapes)
    sizes = [size for shape in shapes for size in shape]
    recipes = ([_SEED] * count, list(range(count)), [len(s) for s in shapes], sizes)
    contenders = {
        "weight * mask": lambda: [torch.mul(w, m) for w, m in zip(dense, masks, strict=True)],
        "foreach": lambda: torch._foreach_mul(dense, masks),
        "ours": lambda: cuda_body(ops.regenerate_many, words, *recipes, [0.5] * count, dtype, True),
    }
    yield GpuCase(f"{count} layers of ResNet-50", contenders, total * 2 + total // 8)


def mask_ops(device, small: bool) -> Iterator[GpuCase]:
    words = 1000 if small else 10**8 // 32
    a, b = torch.randint(-(2**31), 2**31, (2, 1, words), device=device).to(torch.int32)
    for op, bytes_moved in (("and", 12 * words), ("hamming", 8 * words)):
        contenders = {"torch": lambda: a & b} if op == "and" else {}
        contenders["ours"] = lambda op=op: cuda_body(ops.mask_ops, a, b, op)
        expected = (lambda: a & b) if op == "and" else None
        yield GpuCase(f"{op} {32 * words}", contenders, bytes_moved, expected=expected)


# ---------------------------------------------------------------- products with frozen weights
def _half(small: bool) -> torch.dtype:
    """bfloat16; the interpreter multiplies float16 only."""
    return torch.float16 if small else torch.bfloat16


def _ticket(device, small: bool, m: int, size: int, transposed: bool, bar: str) -> GpuCase:
    torch.manual_seed(0)
    dtype, sigma = _half(small), prng.round_bf16(0.01)
    x = torch.randn(m, size, device=device).to(dtype)
    words = ops.pack_mask(torch.rand(size, size, device=device) < 0.5)
    signs = ops.sign_words(_SEED, _LAYER, (size, size), device=device)
    options = {"dtype": dtype, "device": device, "words": words}
    dense = ops.regenerate(_SEED, _LAYER, (size, size), "signed_constant", sigma, **options)
    weight = dense.t() if transposed else dense

    def ours(signs=None):
        columns = size if transposed else None
        recipe = (*_RECIPE, sigma)
        return cuda_body(ops.ticket_linear, x, words, None, *recipe, signs, None, None, columns)

    def fused():
        from sparseticket.ops.ticket_linear import ticket_linear_cuda

        columns = size if transposed else None
        return ticket_linear_cuda(x, words, None, None, _SEED, _LAYER, sigma, size, columns)

    def materialised():
        made = ops.regenerate(_SEED, _LAYER, (size, size), "signed_constant", sigma, **options)
        return F.linear(x, made.t() if transposed else made)

    contenders = {"cuBLAS": lambda: F.linear(x, weight), "W*mask, cuBLAS": materialised}
    contenders |= {"ours": ours, "ours, stored signs": lambda: ours(signs), "ours, fused": fused}
    n = size * size
    return GpuCase(
        f"{'dX ' if transposed else ''}{size}x{size} batch {m}",
        contenders,
        n // 8 + 4 * m * size,
        2 * m * n,
        _INSTRUCTIONS[transposed] * n * max(1, m // 128),
        lambda: F.linear(x, weight),
        0.02,
        bar=bar,
    )


def ticket_linear(device, small: bool) -> Iterator[GpuCase]:
    if small:
        yield _ticket(device, small, 3, 128, False, "")
        yield _ticket(device, small, 3, 128, True, "")
        return
    bars = {1: ">= 3.3x", 16: ">= 3.0x", 32: ">= 2.8x", 64: ">= 2.0x"}
    for m, bar in bars.items():
        yield _ticket(device, small, m, 8192, False, bar)
    for m in (256, 1024, 4096):  # fused: 0.85, what the dispatcher takes: 0.95
        yield _ticket(device, small, m, 8192, False, ">= 0.95x, fused >= 0.85x")
    yield _ticket(device, small, 1, 16384, False, ">= 3.3x")
    for m in (16, 4096):
        yield _ticket(device, small, m, 8192, True, "")


def ticket_conv2d(device, small: bool) -> Iterator[GpuCase]:
    """Beside cuDNN on a stored weight, which holds 16 times the memory."""
    shapes = [((8, 64, 3, 3), 4)] if small else [((64, 64, 3, 3), 56), ((512, 512, 3, 3), 7)]
    sigma, geometry = prng.round_bf16(0.01), ((1, 1), (1, 1), (1, 1), 1)
    for shape, size in shapes:
        for batch in (1,) if small else (1, 32, 256):
            torch.manual_seed(0)
            x = _last(torch.randn(batch, shape[1], size, size, device=device).to(_half(small)))
            words = ops.pack_mask(torch.rand(shape, device=device) < 0.5)
            recipe = (_SEED, _LAYER, shape, "signed_constant", sigma)
            options = {"dtype": x.dtype, "device": device, "words": words, "channels_last": True}
            weight = ops.regenerate(*recipe, **options)

            def ours(x=x, words=words, shape=shape):
                recipe = (*_RECIPE, sigma, shape)
                return cuda_body(ops.ticket_conv2d, x, words, None, *recipe, *geometry)

            def cudnn(x=x, weight=weight):
                return F.conv2d(x, weight, None, *geometry)

            yield GpuCase(
                f"{shape[0]}x{shape[1]}x3x3 at {size} batch {batch}",
                {"cuDNN": cudnn, "ours": ours},
                weight.numel() // 8 + 4 * x.numel(),
                2 * weight.numel() * batch * size * size,
                expected=cudnn,
                tolerance=0.02,
                bar=">= 0.95x",
            )


# ---------------------------------------------------------------- searching and training
class SortedMask(torch.autograd.Function):
    """The reference code's way (hidden-networks): sort every step, straight-through."""

    @staticmethod
    def forward(ctx, scores, kept):
        order, mask = scores.flatten().sort().indices, torch.empty_like(scores)
        flat = mask.view(-1)
        flat[order[:-kept]] = 0
        flat[order[-kept:]] = 1
        return mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def popup_linear(device, small: bool) -> Iterator[GpuCase]:
    """A layer's forward and both gradients, and the selection of its mask."""
    torch.manual_seed(0)
    size, batch, dtype = (64, 8, torch.float32) if small else (4096, 4096, torch.bfloat16)
    x, grad = torch.randn(2, batch, size, device=device).to(dtype)
    x = x.detach().requires_grad_()
    scores = torch.randn(size, size, device=device, requires_grad=True)
    sigma, kept = prng.round_bf16(0.01), size * size // 2
    options = {"dtype": dtype, "device": device}
    weight = ops.regenerate(_SEED, _LAYER, (size, size), "signed_constant", sigma, **options)
    _, state = ops.select_mask([scores.detach()], [kept])

    def three():
        plain = x.detach()
        return F.linear(plain, weight), grad @ weight, grad.t() @ plain

    def hidden():
        y = F.linear(x, weight * SortedMask.apply(scores.abs(), kept).to(dtype))
        return torch.autograd.grad(y, [x, scores], grad)

    def ours(given=None):
        (words,), _ = ops.select_mask([scores.detach()], [kept], None, state)
        recipe = ("abs", _SEED, _LAYER, sigma)
        y = ops.popup_linear(x, given, scores, words, None, *recipe)
        return torch.autograd.grad(y, [x, scores], grad)

    contenders = {"three GEMMs": three, "hidden-networks": hidden}
    contenders |= {"ours": ours, "ours, stored weight": lambda: ours(weight)}
    yield GpuCase(
        f"{size}x{size} batch {batch}, fwd + bwd + select",
        contenders,
        12 * batch * size + 8 * size * size,
        6 * batch * size * size,
        bar=">= 0.87x (1.15 times three GEMMs), >= 6x hidden-networks",
    )


def masked_linear(device, small: bool) -> Iterator[GpuCase]:
    """A trained weight and its mask, with and without the optimizer's shadow."""
    torch.manual_seed(0)
    size, dtype = 64 if small else 4096, _half(small)
    weight = torch.randn(size, size, device=device).to(dtype)
    words = ops.pack_mask(torch.rand(size, size, device=device) < 0.1)
    shadow = ops.apply_mask(weight, words)
    for batch in (8,) if small else (1, 4096):
        x = torch.randn(batch, size, device=device).to(dtype)
        yield GpuCase(
            f"{size}x{size} batch {batch} keep .1",
            {
                "cuBLAS": lambda x=x: F.linear(x, weight),
                "ours": lambda x=x: cuda_body(
                    ops.masked_linear, x, weight, words, None, False, False, shadow
                ),
                "ours, no shadow": lambda x=x: cuda_body(ops.masked_linear, x, weight, words),
            },
            2 * weight.numel() + 4 * x.numel(),
            2 * weight.numel() * batch,
            expected=lambda x=x: F.linear(x, shadow),
            tolerance=0.02,
            bar=">= 0.95x",
        )


def masked_step(device, small: bool) -> Iterator[GpuCase]:
    """SGD with momentum on ResNet-50's tensors, with the bf16 shadow."""
    torch.manual_seed(0)
    shapes = _shapes(small)
    weights, grads, held = ([torch.randn(s, device=device) for s in shapes] for _ in range(3))
    masks = [torch.rand(s, device=device) < 0.1 for s in shapes]
    words, floats = [ops.pack_mask(m) for m in masks], [m.float() for m in masks]
    shadows = [w.to(_half(small)) for w in weights]
    total = sum(w.numel() for w in weights)

    def plain():
        torch._foreach_mul_(grads, floats)
        torch._foreach_mul_(held, 0.9)
        torch._foreach_add_(held, grads)
        torch._foreach_add_(weights, held, alpha=-1e-6)
        torch._foreach_copy_(shadows, torch._foreach_mul(weights, floats))

    def ours():
        cuda_body(ops.masked_step, weights, grads, held, [], shadows, words, 1e-6, 0.9)

    yield GpuCase(
        f"SGD, {len(shapes)} layers of ResNet-50, keep .1",
        {"torch foreach": plain, "ours": ours},
        22 * total + total // 8,
    )


def popup_step(device, small: bool) -> Iterator[GpuCase]:
    """SGD with momentum on ResNet-50's scores, and the selection of every layer's mask."""
    torch.manual_seed(0)
    shapes = _shapes(small)
    scores, grads, held = ([torch.randn(s, device=device) for s in shapes] for _ in range(3))
    kept = [s.numel() // 2 for s in scores]
    words, state = cuda_body(ops.select_mask, scores, kept)
    total, none = sum(s.numel() for s in scores), [None] * len(shapes)

    def plain():
        torch._foreach_mul_(held, 0.9)
        torch._foreach_add_(held, grads)
        torch._foreach_add_(scores, held, alpha=-1e-6)
        return [s.abs().flatten().sort().indices for s in scores]

    def ours():
        sigmas, rule = [1.0] * len(shapes), (1e-6, 0.9)
        cuda_body(ops.popup_step, scores, grads, held, [], words, state, kept, none, sigmas, *rule)

    yield GpuCase(
        f"SGD and select, {len(shapes)} layers of ResNet-50",
        {"torch foreach, sort": plain, "ours": ours},
        24 * total + total // 8,
    )


# ---------------------------------------------------------------- compressed weights
def _blocks(device, small: bool, block: int, density: float, batch: int, bar: str) -> GpuCase:
    torch.manual_seed(0)
    size, dtype = 2 * block if small else 4096, _half(small)
    side = size // block
    live = torch.zeros(side * side, dtype=torch.bool)
    live[torch.randperm(side * side)[: max(1, round(density * side * side))]] = True
    full = live.view(side, side).repeat_interleave(block, 0).repeat_interleave(block, 1)
    words, kept = ops.pack_mask(full), int(full.sum())
    pattern = ops.device_pattern(words, size, kept).to(device)
    weight = (torch.randn(size, size) * full).to(device, dtype)
    values, words = weight[full.to(device)], words.to(device)
    x = torch.randn(batch, size, device=device).to(dtype)
    contenders = {"cuBLAS": lambda: F.linear(x, weight)}
    if not small:
        bsr = weight.to_sparse_bsr((block, block))
        contenders["torch BSR"] = lambda: F.linear(x, bsr)
    contenders["ours"] = lambda: cuda_body(ops.sparse_linear, x, values, words, None, pattern)
    contenders["ours, dX"] = lambda: cuda_body(
        ops.sparse_linear_dx, x, values, words, size, pattern
    )
    contenders["ours, dW"] = lambda: cuda_body(ops.sparse_linear_dw, x, x, words, kept, pattern)
    return GpuCase(
        f"{size}x{size} blocks of {block} keep {density} batch {batch}",
        contenders,
        2 * kept + 4 * batch * size,
        2 * batch * kept,
        expected=lambda: F.linear(x, weight),
        tolerance=0.02,
        bar=bar,
    )


def _list(device, small: bool, density: float, batch: int, bar: str) -> GpuCase:
    """Live weights anywhere, few samples."""
    torch.manual_seed(0)
    size, dtype = 128 if small else 8192, _half(small)
    mask = torch.rand(size, size) < density
    words, kept = ops.pack_mask(mask), int(mask.sum())
    pattern = ops.device_pattern(words, size, kept).to(device)
    weight = (torch.randn(size, size) * mask).to(device, dtype)
    values, words = weight[mask.to(device)], words.to(device)
    x = torch.randn(batch, size, device=device).to(dtype)
    contenders = {"cuBLAS": lambda: F.linear(x, weight)}
    if not small:
        csr, column = weight.to_sparse_csr(), x.t().contiguous()
        contenders["torch CSR"] = lambda: csr @ column
    contenders["ours"] = lambda: cuda_body(ops.sparse_linear, x, values, words, None, pattern)
    return GpuCase(
        f"{size}x{size} list keep {density} batch {batch}",
        contenders,
        6 * kept + 4 * batch * size,
        2 * batch * kept,
        expected=lambda: F.linear(x, weight),
        tolerance=0.02,
        bar=bar,
    )


def sparse_linear(device, small: bool) -> Iterator[GpuCase]:
    if small:
        yield _blocks(device, small, 32, 0.5, 3, "")
        yield _list(device, small, 0.05, 1, "")
        return
    bars = {0.2: ">= 3x", 0.1: ">= 5x", 0.05: ">= 8x"}
    for block in (128, 64):
        for density, bar in bars.items():
            yield _blocks(device, small, block, density, 4096, bar)
    for density, bar in ((0.1, ">= 4.5x"), (0.05, ">= 8x"), (0.01, ">= 25x")):
        yield _list(device, small, density, 1, bar)
    yield _blocks(device, small, 32, 0.1, 4096, "")


GPU_CASES = {
    "select_mask": select_mask,
    "ticket_linear": ticket_linear,
    "popup_linear": popup_linear,
    "sparse_linear": sparse_linear,
    "regenerate_many": regenerate_many,
    "masked_linear": masked_linear,
    "masked_step": masked_step,
    "popup_step": popup_step,
    "ticket_conv2d": ticket_conv2d,
    "mask_ops": mask_ops,
}
