from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops, prng
from sparseticket.reference.regenerate import regenerate as reference

DISTS = prng.DISTRIBUTIONS
SHAPES = [
    *[(), (5,), (1, 1), (3, 17), (17, 63), (2, 64), (3, 1090), (0, 5), (5, 0)],  # 1090: two chunks
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (2, 3, 4), (2, 130, 3, 3), (0, 3, 3, 3)],
]


def _same(a, b):
    assert a.dtype == b.dtype
    for memory in (torch.contiguous_format, torch.channels_last)[: 1 + (a.ndim == 4)]:
        same = a.is_contiguous(memory_format=memory) == b.is_contiguous(memory_format=memory)
        assert same or not a.numel()
    assert torch.equal(a, b)
    assert torch.equal(a.double().signbit(), b.double().signbit())  # +0 where dropped


@pytest.mark.parametrize("dist", DISTS)
def test_bit_identical_to_the_reference(isa, dist):
    torch.manual_seed(0)
    for shape in SHAPES:
        _, _, half = next(iter(oracle.patterns(shape, "half")))
        for dtype in (torch.float32, torch.bfloat16):
            for words in (None, half):
                for last in (False, True):
                    kwargs = {"dtype": dtype, "words": words, "channels_last": last}
                    recipe = (5, 7, shape, dist, 0.37)
                    _same(ops.regenerate(*recipe, **kwargs), reference(*recipe, **kwargs))


@pytest.mark.parametrize("dist", DISTS)
def test_threads(threads, dist):
    for shape in SHAPES:
        _same(ops.regenerate(5, 7, shape, dist, 0.37), reference(5, 7, shape, dist, 0.37))


@pytest.mark.parametrize("dist", DISTS)
def test_masks_and_dtypes(dist):
    torch.manual_seed(0)
    shape = (9, 5, 3, 3)
    for _, mask, words in oracle.patterns(shape):
        dense = ops.regenerate(5, 7, shape, dist, 0.37)
        masked = ops.regenerate(5, 7, shape, dist, 0.37, words=words)
        assert torch.equal(masked, torch.where(mask, dense, 0))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = ops.regenerate(5, 7, shape, dist, 0.37, dtype=dtype)
        assert torch.equal(got, ops.regenerate(5, 7, shape, dist, 0.37).to(dtype))


@pytest.mark.parametrize("dist", ["uniform", "normal"])
def test_streams_and_draws_differ(dist):
    made = [
        ops.regenerate(seed, layer, (64, 64), dist, 1.0, stream=stream, draw=draw)
        for seed, layer, stream, draw in [
            *[(0, 0, stream, 0) for stream in prng.STREAMS],
            *[(0, 0, "magnitude", 1), (1, 0, "magnitude", 0), (0, 1, "magnitude", 0)],
            *[(0, -1, "magnitude", 0), (2**63 - 1, 0, "magnitude", 0)],
        ]
    ]
    for i, a in enumerate(made):
        for b in made[:i]:
            assert float((a == b).float().mean()) < 0.01


def test_sign_stream_serves_signed_constant():
    shape = (20, 70)
    constant = ops.regenerate(5, 7, shape, "signed_constant", 1.0)
    assert torch.equal(ops.regenerate(5, 7, shape, "signed_constant", 1.0, stream="mask"), constant)
    assert not torch.equal(ops.regenerate(5, 7, shape, "signed_constant", 1.0, draw=1), constant)


def test_channels_last_holds_the_same_values():
    shape = (6, 5, 3, 3)
    for dist in DISTS:
        plain = ops.regenerate(1, 2, shape, dist, 0.5)
        last = ops.regenerate(1, 2, shape, dist, 0.5, channels_last=True)
        assert torch.equal(plain, last)
        assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sigma", [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 2.0**-134])
def test_bfloat16_rounds_ties_to_even(isa, sigma):
    got = ops.regenerate(0, 1, (3, 70), "signed_constant", sigma, dtype=torch.bfloat16)
    assert torch.equal(got.abs(), torch.full((3, 70), sigma).bfloat16())


def test_zero_and_subnormal_sigma():
    assert not ops.regenerate(0, 0, (4, 70), "uniform", 0.0).any()
    assert not ops.regenerate(0, 0, (4, 70), "signed_constant", 0.0).any()
    assert torch.equal(
        ops.regenerate(0, 0, (4, 70), "signed_constant", 1e-40),  # subnormal in float32
        reference(0, 0, (4, 70), "signed_constant", 1e-40),
    )


@pytest.mark.parametrize("dist", DISTS)
def test_opcheck_and_compiled(dist):
    words = ops.pack_mask(torch.rand(5, 6, 3, 3) < 0.5)
    torch.library.opcheck(ops.regenerate, (3, 4, (5, 70), dist, 0.5))
    torch.library.opcheck(
        ops.regenerate,
        (3, 4, (5, 6, 3, 3), dist, 0.5),
        {"dtype": torch.bfloat16, "words": words, "channels_last": True},
    )
    torch.library.opcheck(ops.regenerate, (3, 4, (5, 6, 1, 1), dist, 0.5), {"channels_last": True})
    double = oracle.compiled(lambda x: x + ops.regenerate(3, 4, (5, 70), dist, 0.5))
    assert torch.equal(double(torch.zeros(5, 70)), reference(3, 4, (5, 70), dist, 0.5))


def test_errors():
    good = (3, 4, (5, 70), "normal", 0.5)
    with pytest.raises(ValueError, match=r"regenerate: dist: got 'cauchy', accepted: signed_const"):
        ops.regenerate(3, 4, (5, 70), "cauchy", 0.5)
    with pytest.raises(ValueError, match=r"regenerate: stream: got 'x', accepted: sign, magnitude"):
        ops.regenerate(*good, stream="x")
    with pytest.raises(ValueError, match=r"seed: got -3, need an integer in \[0, 2\*\*63\)"):
        ops.regenerate(-3, *good[1:])
    with pytest.raises(TypeError, match=r"regenerate: dtype: got torch\.int32, accepted: torch"):
        ops.regenerate(*good, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"regenerate: words: .*\(5, 2\), need int32 \(5, 4\)"):
        ops.regenerate(*good, words=torch.zeros(5, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"regenerate: words: .*\(5, 2\), need int32 \(5, 4\)"):
        ops.regenerate(*good, words=torch.zeros(5, 2, dtype=torch.int32, device="meta"))
