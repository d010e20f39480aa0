"""Masks in files: round trips, sizes against the entropy, damage."""

from __future__ import annotations

import math

import pytest
import torch

from sparseticket import ops
from sparseticket.formats import kept_count
from sparseticket.io.codecs import decode_mask, encode_mask

DENSITIES = (0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 1)


def random_words(density: float, shape: tuple[int, ...]) -> torch.Tensor:
    n = math.prod(shape)
    generator = torch.Generator().manual_seed(n + int(1000 * density))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=generator)[: kept_count(density, n)]] = True
    return ops.pack_mask(mask.view(shape))


def round_trip(words: torch.Tensor, shape: tuple[int, ...]) -> tuple[str, int]:
    codec, parameter, payload = encode_mask(words, shape)
    kept = int(ops.mask_ops(words, None, "popcount"))
    decoded = decode_mask(codec, parameter, payload, shape, kept)
    assert decoded.dtype == torch.int32 and torch.equal(decoded, words)
    return codec, len(payload)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 10**6])
@pytest.mark.parametrize("density", DENSITIES)
def test_round_trip(n, density):
    words = random_words(density, (n,))
    _, size = round_trip(words, (n,))
    assert size <= (n + 7) // 8


@pytest.mark.parametrize("shape", [(3, 65), (17, 3, 3, 5), (1, 1), (0, 5), (5, 0), (100, 63)])
@pytest.mark.parametrize("density", [0, 0.05, 0.5, 1])
def test_round_trip_of_matrices_and_convolutions(shape, density):
    round_trip(random_words(density, shape), shape)


@pytest.mark.parametrize("density", [0.5, 0.3, 0.2, 0.1, 0.05])
def test_size_is_within_3_percent_of_the_entropy(density):
    n = 500 * 400
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    codec, size = round_trip(random_words(density, (500, 400)), (500, 400))
    assert 8 * size <= 1.03 * n * entropy + 64
    assert codec == ("bitmap" if density == 0.5 else "rice")


def test_bitmap_bits_run_lsb_first_in_canonical_order_without_row_padding():
    mask = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])
    codec, parameter, payload = encode_mask(ops.pack_mask(mask), mask.shape)
    assert (codec, parameter, payload.tolist()) == ("bitmap", 0, [0b10011101, 0b1])


def test_parameter_is_the_best_of_all_for_a_clustered_mask():
    mask = torch.zeros(1, 10**5, dtype=torch.bool)
    mask[0, :40], mask[0, 50_000::7_000] = True, True  # the mean gap misleads
    words = ops.pack_mask(mask)
    _, _, payload = encode_mask(words, mask.shape)
    sizes = [len(ops.rice_encode(words, 10**5, parameter)) for parameter in range(31)]
    assert len(payload) == min(sizes)


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_damaged_payload_is_refused(density):
    shape = (13, 41)
    words = random_words(density, shape)
    kept = int(ops.mask_ops(words, None, "popcount"))
    codec, parameter, payload = encode_mask(words, shape)
    for damaged in (payload[:-1], torch.cat([payload, payload[:1]])):
        with pytest.raises(ValueError, match="payload"):
            decode_mask(codec, parameter, damaged, shape, kept)
    with pytest.raises(ValueError, match="payload"):
        decode_mask(codec, parameter, payload, shape, kept - 1)
    if codec == "bitmap":  # one flipped bit changes the count; in Rice the masks' hash finds it
        flipped = payload.clone()
        flipped[3] ^= 16
        with pytest.raises(ValueError, match="ones"):
            decode_mask(codec, parameter, flipped, shape, kept)


def test_bad_arguments():
    words = random_words(0.5, (3, 65))
    with pytest.raises(ValueError, match=r"words: got .*\(3, 4\).* need int32 \(3, 2\)"):
        encode_mask(words, (3, 64))
    with pytest.raises(ValueError, match="codec: got 'zip', known: bitmap, rice"):
        decode_mask("zip", 0, torch.zeros(1, dtype=torch.uint8), (8,), 0)
    with pytest.raises(ValueError, match=r"payload: got torch\.int32"):
        decode_mask("bitmap", 0, torch.zeros(1, dtype=torch.int32), (8,), 0)
    with pytest.raises(ValueError, match=r"kept: got 9, need 0\.\.8"):
        decode_mask("bitmap", 0, torch.zeros(1, dtype=torch.uint8), (8,), 9)
