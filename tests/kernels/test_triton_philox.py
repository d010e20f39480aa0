"""The helpers against the integers of the contract, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from sparseticket import prng
from sparseticket.kernels.philox import decode, interleave, philox_words, sign_word

KEYS = [(0, 0), (1, 2**31), (2**32 - 1, 2**32 - 1), prng.stream_key(5, 7, "sign")]


@triton.jit
def _words(p_out, key, high, first, N: tl.constexpr, SIGNS: tl.constexpr):
    o = tl.arange(0, N)
    a, b = philox_words(key, high, tl.cast(first, tl.uint32) + o.to(tl.uint32))
    if SIGNS:
        a, b = sign_word(a), sign_word(b)
    tl.store(p_out + 2 * o, a.to(tl.int32, bitcast=True))
    tl.store(p_out + 2 * o + 1, b.to(tl.int32, bitcast=True))


def _made(device, key, high, first, n, signs):
    out = torch.empty(2 * n, dtype=torch.int32, device=device)
    _words[(1,)](out, key, high, first, n, signs)
    return out.cpu().numpy().view(np.uint32)


@pytest.mark.parametrize(("key", "high"), KEYS)
@pytest.mark.parametrize("first", [0, 2**31 - 5, 2**32 - 16])
def test_words(device, key, high, first):
    low = np.arange(first, first + 16, dtype=np.uint64)
    expected = np.stack(prng.philox(low, high, key), axis=-1).reshape(-1)
    assert np.array_equal(_made(device, key, high, first, 16, False), expected)


def test_sign_words(device):
    key, high = prng.stream_key(2**63 - 1, 2**64 - 1, "sign")
    expected = prng.sign_words(2**63 - 1, 2**64 - 1, 4, 256).reshape(-1)
    assert np.array_equal(_made(device, key, high, 0, 16, True), expected)


@triton.jit
def _interleaved(p_in, p_out, N: tl.constexpr, TWICE: tl.constexpr):
    o = tl.arange(0, N)
    word = interleave(tl.load(p_in + o).to(tl.uint32, bitcast=True))
    if TWICE:
        word = interleave(word)
    tl.store(p_out + o, word.to(tl.int32, bitcast=True))


def test_interleave(device):
    """Weight k sits at pos(k), and doing it twice changes nothing."""
    bits = np.array([1 << k for k in range(32)], np.uint32).view(np.int32)
    bits, out = torch.from_numpy(bits).to(device), torch.empty(32, dtype=torch.int32, device=device)
    _interleaved[(1,)](bits, out, 32, False)
    place = [16 * (k & 1) + 2 * ((k >> 1) & 7) + ((k >> 4) & 1) for k in range(32)]
    assert out.cpu().numpy().view(np.uint32).tolist() == [1 << p for p in place]
    _interleaved[(1,)](bits, out, 32, True)
    assert torch.equal(out, bits)


@triton.jit
def _decoded(
    p_mask, p_out, key, high, N: tl.constexpr, UNITS: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """A dense [N, 64*UNITS] tile from its mask and its seed, as the ticket kernels make it."""
    o_n, o_word, o_k = tl.arange(0, N), tl.arange(0, 2 * UNITS), tl.arange(0, 64 * UNITS)
    if TRANSPOSED:
        o_n, o_word, o_k = o_n[None, :], o_word[:, None], o_k[:, None]
    else:
        o_n, o_word, o_k = o_n[:, None], o_word[None, :], o_k[None, :]
    o_words, o_out = o_n * 2 * UNITS + o_word, o_n * 64 * UNITS + o_k
    mask = interleave(tl.load(p_mask + o_words).to(tl.uint32, bitcast=True))
    first, second = philox_words(key, high, o_words // 2)
    signs = tl.where(o_words % 2 == 0, first, second)
    tl.store(p_out + o_out, decode(mask, signs, p_out.dtype.element_ty, TRANSPOSED))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode(device, dtype, transposed):
    n, units = 16, 2
    torch.manual_seed(0)
    mask = torch.randint(-(2**31), 2**31, (n, 2 * units), dtype=torch.int64).to(torch.int32)
    out = torch.empty(n, 64 * units, dtype=dtype, device=device)
    _decoded[(1,)](mask.to(device), out, *prng.stream_key(5, 7, "sign"), n, units, transposed)
    place = torch.arange(32, dtype=torch.int32)
    kept = ((mask[:, :, None] >> place) & 1).reshape(n, -1).bool()
    signs = torch.from_numpy(prng.sign_words(5, 7, n, 64 * units).view(np.int32))
    negative = ((signs[:, :, None] >> place) & 1).reshape(n, -1).bool()
    expected = torch.where(kept, torch.where(negative, -2.0, 2.0), 0.0).to(dtype)
    assert torch.equal(out.cpu(), expected)
