"""The CUDA body of select_mask, bit by bit against the reference."""

from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.kernels import select_mask as module
from sparseticket.reference.select_mask import select_mask as reference

TRANSFORMS = ["abs", "identity"]
TINY, NAN = 2.0**-149, float("nan")
SHAPES = [
    *[(), (1,), (5,), (1, 1), (3, 17), (17, 63), (2, 64), (3, 129), (100, 100), (2, 3, 4)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (3, 64, 3, 3), (4, 6, 2, 1, 3)],
    *[(0,), (0, 5), (5, 0), (4, 0, 3, 3)],
]


def _few(*values):
    return lambda shape: torch.tensor(values)[torch.randint(len(values), shape)]


SCORES = {
    "random": torch.randn,
    "uniform": torch.rand,
    "ties": lambda shape: torch.randn(shape).mul(4).round(),
    "constant": lambda shape: torch.full(shape, -0.5),
    "ascending": lambda shape: torch.randn(shape).flatten().sort().values.view(shape),
    "denormal": _few(*(i * TINY for i in range(-9, 10)), 2.0**-126, -(2.0**-126)),
    "inf": _few(torch.inf, -torch.inf, 1.0, -1.0, 3e38, -3e38),
    "zeros": _few(-0.0, 0.0, -TINY, TINY),
    "half": lambda shape: torch.randn(shape, dtype=torch.float16),
    "nan": _few(NAN, -NAN, 1.0, -1.0, torch.inf, -torch.inf, 0.0),
}


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """The interpreter's time goes by tiles, not by scores; some tests take the shipped sizes."""
    _with_blocks(monkeypatch, {"TILE": 64, "UNITS": 64}, {"TILE": 64})
    monkeypatch.setattr(module, "_SAMPLE", 1024)


def _with_blocks(monkeypatch, blocks, counting):
    """Select with these in place of what is shipped."""
    shipped = module.select_sizes

    def changed(scores, device):
        sizes, count = shipped(scores, device)
        merged = count._replace(blocks={**count.blocks, **counting})
        return sizes._replace(blocks={**sizes.blocks, **blocks}), merged

    monkeypatch.setattr(module, "select_sizes", changed)


def _counts(n):
    return sorted({min(1, n), n // 3, n})


@pytest.fixture
def check(device, on_cuda):
    """The CUDA body's words and state are the reference's; returns the state."""

    def run(scores, kept, within=None, state=None, *options, **named):
        def there(tensors):
            return None if tensors is None else [t.to(device) for t in tensors]

        hint = None if state is None else state.to(device)
        args = (there(scores), kept, there(within), hint, *options)
        words, got = on_cuda(ops.select_mask, *args, **named)
        words2, expected = reference(scores, kept, within, None, *options, **named)
        for i, (a, b) in enumerate(zip(words, words2, strict=True)):
            assert torch.equal(a.cpu(), b), f"tensor {i}"
        expected[:, 0] = (expected[:, 0].view(torch.float32) + 0.0).view(torch.int32)
        assert torch.equal(got.cpu(), expected)
        return got

    return run


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", SCORES)
def test_words_and_state(check, kind, transform):
    torch.manual_seed(0)
    shapes = [(17, 63), (17, 63), (4, 70, 3, 2), (30, 64), (30, 64)]
    scores = [SCORES[kind](shape) for shape in shapes]
    check(scores, [400, 1070, 1, 700, 0], None, None, "layer", transform)


@pytest.mark.parametrize("kind", ["random", "ties"])
def test_shapes_and_memory_formats(check, kind):
    torch.manual_seed(0)
    scores = [SCORES[kind](s) for s in SHAPES]
    for part in (0, 2, 3):
        check(scores, [s.numel() * part // 3 for s in scores])
    scores = [change(s) for s in scores if s.ndim > 1 for change in oracle.FORMATS.values()]
    check(scores, [s.numel() // 3 for s in scores])
    check([], [])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_within(check, transform):
    torch.manual_seed(0)
    for name in ("half", "sparse", "none", "all", "rows"):
        patterns = [next(oracle.patterns(s, name)) for s in SHAPES]
        candidates = [int(mask.sum()) for _, mask, _ in patterns]
        scores = [SCORES["ties"](s) for s in SHAPES]
        kept = [c // 2 for c in candidates]
        check(scores, kept, [w for *_, w in patterns], None, "layer", transform)


def _list(kind):
    shapes = [(17, 63), (), (8, 3, 3, 3), (0, 4), (5,), (4, 70, 3, 2), (3, 64), (2, 3, 4)]
    scores = [oracle.FORMATS["channels_last"](SCORES[kind](s)) for s in shapes]
    densities = [0.5, 1.0, 0.1, 0.5, 0.5, 0.9, 0.0, 0.3]
    masks = [torch.rand(s) < d for s, d in zip(shapes, densities, strict=True)]
    return scores, [ops.pack_mask(m) for m in masks], [int(m.sum()) for m in masks]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["random", "ties", "nan"])
def test_global_scope(check, kind, transform):
    torch.manual_seed(0)
    scores, within, candidates = _list(kind)
    for masks, available in ((None, sum(s.numel() for s in scores)), (within, sum(candidates))):
        for kept in _counts(available):
            check(scores, [kept], masks, None, "global", transform)


@pytest.mark.parametrize("kind", ["random", "ties"])
def test_min_keep(check, kind):
    torch.manual_seed(0)
    scores, within, candidates = _list(kind)
    scores = [s * 10.0 ** (-i % 3) for i, s in enumerate(scores)]
    for masks, available in ((None, [s.numel() for s in scores]), (within, candidates)):
        for least, share in ((1, 0.4), (7, 0.7), (100, 0.0), (100, 1.0)):
            forced = sum(min(least, s.numel()) for s in scores)
            kept = max(forced, int(share * sum(available)))
            check(scores, [kept], masks, None, "global", "abs", least)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["random", "denormal"])
def test_a_hint_changes_nothing(check, kind, transform):
    torch.manual_seed(0)
    scores = [SCORES[kind](s) for s in ((17, 63), (8, 3, 3, 3))]
    bits = torch.tensor([NAN, torch.inf, -torch.inf, -0.0, TINY, 3e38, -1.0]).view(torch.int32)
    patterns = [*bits.tolist(), -1, -(2**31), 2**31 - 1, 0x7F80_0001]
    right = check(scores, [300, 7], None, None, "layer", transform).cpu()
    near = right + torch.tensor([3, 0], dtype=torch.int32)
    absurd = [torch.full_like(right, p) for p in patterns]
    unfit = [right[:0], right.flatten()]
    for hint in (right, near, oracle.FORMATS["sliced"](right), *absurd, *unfit):
        check(scores, [300, 7], None, hint, "layer", transform)
    for hint in (near[:1], absurd[0][:1], absurd[-1][:1]):
        check(scores, [300], None, hint, "global", transform)


def test_paths(check, launches, monkeypatch):
    """A hint of the last step, a sample, a band that failed: the same launches, no more."""
    torch.manual_seed(0)
    scores = [torch.randn(300, 437)]
    state = check(scores, [40000])
    first = list(launches)
    counts = [n for n in first if n == "_count"]
    assert first == ["_fill", "_bands", "_pass", *counts, "_settle", "_grant"]
    for hint in (state, state - 2**20):
        launches.clear()
        check([scores[0] + 1e-5 * torch.randn(300, 437)], [40000], None, hint)
        assert launches == first


@pytest.mark.parametrize("chunk", [64, 512])
@pytest.mark.parametrize("kind", ["random", "ties", "constant"])
def test_shipped_sizes(check, monkeypatch, kind, chunk):
    """Several chunks of several tiles each."""
    monkeypatch.undo()
    _with_blocks(monkeypatch, {"UNITS": chunk}, {})
    torch.manual_seed(0)
    scores = [SCORES[kind](s) for s in ((1, chunk * 70), (24, 64, 3, 3), (31, 131))]
    scores[1] = scores[1].contiguous(memory_format=torch.channels_last)
    check(scores, [s.numel() // 3 for s in scores])
    check(scores, [10000], None, None, "global")


def test_unaligned_storage(check):
    torch.manual_seed(0)
    scores = torch.randn(17 * 64 + 1)[1:].view(17, 64)
    within = torch.full((17 * 2 + 1,), -1, dtype=torch.int32)[1:].view(17, 2)
    check([scores], [300], [within])


def test_runs_alike(device, on_cuda):
    torch.manual_seed(0)
    scores = [torch.randn(100, 100).mul(4).round().to(device)]
    one, two = (on_cuda(ops.select_mask, scores, [3000]) for _ in range(2))
    assert torch.equal(one[0][0], two[0][0]) and torch.equal(one[1], two[1])


def test_bad_counts_and_masks(device, on_cuda):
    scores = [torch.randn(5, 9, device=device)]
    for kept in (-1, 46):
        with pytest.raises(ValueError, match="select_mask: kept: got"):
            on_cuda(ops.select_mask, scores, [kept])
    with pytest.raises(ValueError, match="kept: got 3, but min_keep=4"):
        on_cuda(ops.select_mask, scores, [3], None, None, "global", "abs", 4)
    with pytest.raises(ValueError, match="within: got 2 masks"):
        on_cuda(ops.select_mask, scores, [3], [ops.pack_mask(scores[0] > 0)] * 2)
    with pytest.raises(ValueError, match="select_mask: within"):
        on_cuda(ops.select_mask, scores, [3], [torch.zeros(5, 1, dtype=torch.int32).to(device)])
    within = ops.pack_mask(torch.zeros(5, 9, dtype=torch.bool)).to(device)
    words, _ = on_cuda(ops.select_mask, scores, [3], [within])  # counted on the device alone
    assert not words[0].any()
