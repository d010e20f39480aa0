"""Random shapes, strides, densities, dtypes, ISA levels and thread counts; leaks; threads."""

from __future__ import annotations

import gc
import random
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch

from sparseticket import _C, ops
from sparseticket.reference.apply_mask import apply_mask
from sparseticket.reference.masked_linear import masked_linear
from sparseticket.reference.pack_mask import pack_mask
from sparseticket.reference.regenerate import regenerate

SECONDS = 5.0


@pytest.fixture(autouse=True)
def restored():
    isa, threads = _C.isa(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)


def _shape(draw: random.Random) -> tuple[int, ...]:
    sizes = (0, 1, 2, 3, 17, 63, 64, 65, 100)
    if draw.random() < 0.5:
        return draw.choice(sizes), draw.choice((*sizes, 200, 300))
    taps = draw.choice([(1, 1), (3, 3), (2, 3), (5, 5), (9, 8), (7, 11)])
    return draw.choice(sizes[:6]), draw.choice(sizes), *taps


def _masks(draw: random.Random) -> None:
    shape, layout = _shape(draw), draw.choice(list(oracle.FORMATS.values()))
    mask = torch.rand(shape) < draw.choice((0.0, 0.05, 0.5, 1.0))
    words = pack_mask(mask)
    assert torch.equal(ops.pack_mask(layout(mask)), words)
    assert torch.equal(ops.unpack_mask(words, shape), mask)
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float64))
    dense = torch.randn(shape, dtype=dtype)
    assert torch.equal(ops.apply_mask(layout(dense), words), apply_mask(dense, words))
    dist = draw.choice(("signed_constant", "uniform", "normal"))
    recipe = (draw.randrange(2**63), draw.randrange(2**62), shape, dist, 0.1)
    options = {"dtype": dtype, "words": draw.choice((None, words))}
    assert torch.equal(ops.regenerate(*recipe, **options), regenerate(*recipe, **options))


def _linear(draw: random.Random) -> None:
    batch, rows, k = (draw.choice((1, 2, 3, 4, 5, 9, 17, 33, 70, 130)) for _ in range(3))
    words = pack_mask(torch.rand(rows, k) < draw.choice((0.0, 0.05, 0.5, 1.0)))
    dtype, transposed = draw.choice((torch.float32, torch.bfloat16)), draw.random() < 0.5
    x = torch.randn(batch, rows if transposed else k, dtype=dtype)
    weight = draw.choice(list(oracle.FORMATS.values()))(torch.randn(rows, k, dtype=dtype))
    oracle.compare(
        lambda x, w: ops.masked_linear(x, w, words, None, False, transposed),
        lambda x, w: masked_linear(x, w, words, None, False, transposed),
        [x, weight],
        [0, 1],
    )


@pytest.mark.parametrize("trial", [_masks, _linear])
def test_random_calls(trial):
    torch.manual_seed(0)
    draw, deadline = random.Random(0), time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        _C.set_isa(draw.choice(_C.isas()))
        torch.set_num_threads(draw.choice((1, 2)))
        trial(draw)


def _calls():
    """What several threads, or a thousand turns, may call."""
    torch.manual_seed(0)
    mask, weight = torch.rand(64, 300) < 0.3, torch.randn(64, 300)
    words = ops.pack_mask(mask)
    return [
        lambda: ops.masked_linear(weight[:40], weight, words),
        lambda: ops.masked_linear(weight[:2], weight, words),
        lambda: ops.rice_encode(words, 300, 1),
        lambda: ops.pack_mask(mask),
        lambda: ops.regenerate(0, 1, (64, 300), "signed_constant", 0.1, words=words),
        lambda: ops.select_mask([weight], [500])[0][0],
    ]


def test_no_leak_over_a_thousand_calls():
    calls = _calls()

    def turns(n):
        for _ in range(n):
            for call in calls:
                call()
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    before = turns(100)
    assert turns(1000) - before < 4096


def test_several_threads_at_once():
    calls = _calls()
    expected = [call() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda _: [call() for call in calls], range(100)):
            assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
