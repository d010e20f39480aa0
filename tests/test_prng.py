"""The random-number contract: frozen vectors, and a second implementation from DESIGN 4 alone."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from sparseticket import ops, prng
from sparseticket.reference.regenerate import regenerate

FC1 = 0x966A5919F97E10CB  # layer_id("fc1")
SIGNED_FC1 = FC1 - 2**64  # as op schemas carry it
M64 = 2**64 - 1


# ---------------------------------------------- written from DESIGN 4, in scalars
def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & M64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & M64
    return z ^ z >> 31


def _key(seed: int, layer: int, stream: int, draw: int) -> tuple[int, int]:
    key64 = _mix(_mix(_mix(seed) ^ layer) ^ (stream + 256 * draw))
    return key64 % 2**32, key64 // 2**32


def _philox(low: int, high: int, key: int) -> tuple[int, int]:
    left, right = low, high
    for _ in range(7):
        wide = left * 0xD256D193
        left, right = (wide >> 32) ^ key ^ right, wide % 2**32
        key = (key + 0x9E3779B9) % 2**32
    return left, right


def _position(k: int) -> int:
    """Bit of weight k in the interleaved order: index bits 0 and 4 swapped."""
    return k & 0b01110 | (k & 1) << 4 | k >> 4 & 1


def _sign(seed: int, layer: int, o: int, k: int, row_length: int, draw: int = 0) -> int:
    """Sign bit of weight [o, k]; the interleaved sign bit of a weight is at its position ^ 1."""
    key, high = _key(seed, layer, 0, draw)
    unit = o * math.ceil(row_length / 64) + k // 64
    word = _philox(unit, high, key)[k % 64 // 32]
    return word >> (_position(k % 32) ^ 1) & 1


def _word32(seed: int, layer: int, stream: int, o: int, k: int, row_length: int, draw=0) -> int:
    key, high = _key(seed, layer, stream, draw)
    i = 64 * (o * math.ceil(row_length / 64) + k // 64) + k % 64
    return _philox(i // 2, high, key)[i & 1]


STREAMS = ["sign", "magnitude", "mask", "frozen", "score", "growth"]
STREAMS += ["sampling", "latent", "data_order", "augmentation"]
STREAM_NUMBERS = {name: number for number, name in enumerate(STREAMS)}


# ---------------------------------------------- frozen vectors
def test_layer_ids():
    assert prng.layer_id("fc1") == FC1
    assert prng.layer_id("") == 0x141CFC9842C4B0E3
    assert prng.layer_id("features.0.conv") == 0x70B773E32A11A441
    assert prng.layer_id("layer1.0.conv2") == 0xE16A4A3D1AE11210
    assert int.from_bytes(hashlib.sha256(b"fc1").digest()[:8], "little") == FC1
    for wrapped in ("module.fc1", "_orig_mod.fc1", "_orig_mod.module.fc1"):
        assert prng.layer_id(wrapped) == FC1
    inner = "_fsdp_wrapped_module.a._checkpoint_wrapped_module.b"
    assert prng.layer_id(inner) == prng.layer_id("a.b")
    assert prng.layer_id("module") == prng.layer_id("")
    assert prng.layer_id("modules.fc1") != FC1


def test_stream_keys():
    assert prng.stream_key(0, 0, "sign") == (0x38FCBE91, 0x238275BC)
    assert prng.stream_key(0, 0, "magnitude") == (0x96C67C60, 0x2F32A784)
    assert prng.stream_key(1, FC1, "sign") == (0x9D7A86FC, 0x0650EABA)
    last = prng.stream_key(2**63 - 1, M64, "augmentation", 3)
    assert last == (0x6D5793D3, 0x64F89A98)
    assert prng.stream_key(1, SIGNED_FC1, "sign") == prng.stream_key(1, FC1, "sign")
    assert prng.STREAMS == STREAM_NUMBERS
    assert prng.GENERATOR_VERSION == 1


def test_philox_vectors():
    """The three philox2x32-7 vectors that Random123 publishes, and four counters in a row."""
    for low, high, key, expected in [
        (0, 0, 0, (0x257A3673, 0xCD26BE2A)),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
    ]:
        a, b = prng.philox(np.array([low], dtype=np.uint64), high, key)
        assert (int(a[0]), int(b[0])) == expected
        assert _philox(low, high, key) == expected
    a, b = prng.philox(np.arange(4, dtype=np.uint64), 0, 0)
    assert a.tolist() == [0x257A3673, 0x547C94DB, 0xCBF663F5, 0xB21FDF5C]
    assert b.tolist() == [0xCD26BE2A, 0xD38692F6, 0x5E2BC89B, 0xC089CAC1]


SIGN_WORDS = [
    [0xCF9D1887, 0x0302604D, 0x65CB4ABB, 0x2564BEA9],
    [0x19336B90, 0x02AE686B, 0x4A43DE64, 0xA50D59AF],
]
COLUMNS = [0, 1, 2, 63, 64, 69]
WORDS32 = [
    [0x5391D529, 0xA5CB3F21, 0x00F82E5F, 0xEFBB707F, 0x21B4CB1E, 0x7465FC92],
    [0x2B4FD0A0, 0x2920B370, 0xA1FB27A2, 0x0EDF4D7F, 0xFA40572B, 0x98E02453],
]
VALUES = {  # sigma 0.5, columns 0, 1 and 69
    "uniform": [
        ["-0x1.33d288p-2", "0x1.05d816p-2", "-0x1.41836ep-4"],
        ["-0x1.255e5ep-1", "-0x1.2cef30p-1", "0x1.58af92p-3"],
    ],
    "normal": [
        ["-0x1.cc8ff4p-3", "0x1.840ab4p-3", "-0x1.d26082p-5"],
        ["-0x1.ea30cap-2", "-0x1.fbcabcp-2", "0x1.f7e57ep-4"],
    ],
    "constant": [["0x1p-1"] * 3] * 2,
    "signed_constant": [["-0x1p-1", "-0x1p-1", "-0x1p-1"], ["0x1p-1", "0x1p-1", "-0x1p-1"]],
}


def test_words_of_streams():
    assert prng.sign_words(0, FC1, 2, 70).tolist() == SIGN_WORDS
    kernel = ops.sign_words(0, SIGNED_FC1, (2, 70))
    assert (kernel.numpy().view(np.uint32) == np.array(SIGN_WORDS)).all()
    assert prng.words32(0, FC1, 2, 70, "magnitude")[:, COLUMNS].tolist() == WORDS32


@pytest.mark.parametrize("dist", prng.DISTRIBUTIONS)
def test_values(isa, dist):
    expected = [[float.fromhex(v) for v in row] for row in VALUES[dist]]
    for make in (regenerate, ops.regenerate):
        made = make(0, SIGNED_FC1, (2, 70), dist, 0.5)
        assert made[:, [0, 1, 69]].tolist() == expected


def test_normal_table():
    table = prng.normal_quantiles()
    assert table.dtype == np.float32
    assert table.shape == (65536,)
    frozen = {0: "-0x1.14cb7ap+2", 1: "-0x1.04e092p+2", 32768: "0x1.40d932p-16"}
    for i, value in {**frozen, 40000: "0x1.1efb42p-2"}.items():
        assert float(table[i]) == float.fromhex(value)
    assert (table == -table[::-1]).all()
    assert (np.diff(table) > 0).all()
    exact = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).numpy()
    assert (np.abs(table - exact) <= np.spacing(np.abs(table))).all()


def test_permutations():
    assert prng.permutation(0, "loader", 10).tolist() == [4, 2, 6, 1, 9, 8, 3, 7, 5, 0]
    assert prng.permutation(7, "loader", 10, draw=2).tolist() == [5, 9, 7, 4, 1, 8, 3, 6, 0, 2]
    for n in (0, 1, 1000):
        assert sorted(prng.permutation(3, "x", n).tolist()) == list(range(n))
    made = [
        prng.permutation(0, "loader", 1000),
        prng.permutation(0, "loader", 1000, draw=1),
        prng.permutation(1, "loader", 1000),
        prng.permutation(0, "other", 1000),
        prng.permutation(0, "loader", 1000, stream="sampling"),
    ]
    for i, a in enumerate(made):
        assert all((a == b).sum() < 20 for b in made[:i])  # chance: one fixed point


# ---------------------------------------------- against the second implementation
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (3, 17), (2, 64), (3, 65), (2, 200)])
@pytest.mark.parametrize(("seed", "layer"), [(0, 0), (2**63 - 1, M64), (12345, FC1)])
def test_sign_bits(seed, layer, rows, k):
    words = prng.sign_words(seed, layer, rows, k, draw=1)
    assert words.shape == (rows, 2 * prng.units_per_row(k))
    for o in range(rows):
        for column in range(k):
            bit = int(words[o, column // 32]) >> column % 32 & 1
            assert bit == _sign(seed, layer, o, column, k, draw=1), (o, column)


@pytest.mark.parametrize("stream", STREAM_NUMBERS)
def test_words32(stream):
    for rows, k in [(1, 1), (3, 17), (2, 64), (3, 130)]:
        words = prng.words32(99, FC1, rows, k, stream, draw=5)
        assert words.shape == (rows, k)
        for o in range(rows):
            for column in range(k):
                number = STREAM_NUMBERS[stream]
                assert int(words[o, column]) == _word32(99, FC1, number, o, column, k, draw=5)


def test_values_from_words():
    """uniform and normal as DESIGN 4 writes them, in scalars."""
    uniform = regenerate(3, 4, (2, 70), "uniform", 0.37)
    normal = regenerate(3, 4, (2, 70), "normal", 0.37)
    scale, table = np.float32(math.sqrt(3) * 0.37), prng.normal_quantiles()
    for o in range(2):
        for k in range(70):
            word = _word32(3, 4, 1, o, k, 70)
            centred = np.float32((2 * (word >> 8) + 1 - 2**24) * 2.0**-24)
            assert float(uniform[o, k]) == float(centred * scale)
            assert float(normal[o, k]) == float(table[word >> 16] * np.float32(0.37))


def test_rows_are_padded_to_units():
    wide, narrow = (prng.words32(1, 2, 3, k, "mask") for k in (128, 65))
    assert (wide[:, :65] == narrow).all()
    assert (prng.sign_words(1, 2, 3, 128) == prng.sign_words(1, 2, 3, 65)).all()
    assert (prng.sign_words(1, 2, 3, 128).ravel() == prng.sign_words(1, 2, 6, 64).ravel()).all()
    assert [prng.units_per_row(k) for k in (0, 1, 64, 65)] == [0, 1, 1, 2]


def test_conv_weights_are_made_in_canonical_order():
    shape = (3, 5, 2, 2)
    conv = regenerate(1, 2, shape, "normal", 1.0)
    matrix = regenerate(1, 2, (3, 20), "normal", 1.0)
    for o, c, h, w in [(0, 0, 0, 0), (1, 4, 0, 1), (2, 2, 1, 0)]:
        assert conv[o, c, h, w] == matrix[o, (h * 2 + w) * 5 + c]


# ---------------------------------------------- statistics
def test_nearby_keys_share_no_more_blocks_than_chance():
    """The trap of specs/gpu_kernels.md B.3: hash(index ^ seed) makes neighbours of equal blocks."""
    rows, k = 512, 16384
    n = rows * k // 32
    expected = n * n / 2**32
    ids = [(4, 4), (4, 5), (5, 4), (4, 4 + 2**32)]
    blocks = [np.sort(prng.sign_words(seed, layer, rows, k).ravel()) for seed, layer in ids]
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            shared = np.isin(a, b).sum()  # of 2**18; Poisson with mean 16
            assert expected == 16
            assert 0 < shared < 45


def test_signs_are_balanced():
    for seed, layer in [(0, 0), (1, FC1), (2**63 - 1, 1)]:
        words = prng.sign_words(seed, layer, 1024, 1024).ravel()
        bits = (words[:, None] >> np.arange(32, dtype=np.uint32)) & 1
        n = bits.size
        assert abs(int(bits.sum()) - n / 2) < 5 * math.sqrt(n) / 2
        per_bit = bits.sum(0)  # every bit of the word by itself: 32 bounds of 5 sigma
        assert (np.abs(per_bit - len(words) / 2) < 5 * math.sqrt(len(words)) / 2).all()


@pytest.mark.parametrize(("dist", "kurtosis"), [("uniform", 1.8), ("normal", 3.0)])
def test_moments(dist, kurtosis):
    sigma = 0.25
    values = ops.regenerate(0, 1, (1024, 1024), dist, sigma).double()
    n = values.numel()
    assert abs(float(values.mean())) < 5 * sigma / math.sqrt(n)
    relative = abs(float(values.std()) / sigma - 1)
    assert relative < 5 * math.sqrt((kurtosis - 1) / (4 * n))


def test_uniform_range():
    values = ops.regenerate(0, 1, (1024, 1024), "uniform", 0.25)
    half = math.sqrt(3) * 0.25
    assert half * 0.9999 < float(values.max()) < half
    assert -half < float(values.min()) < -half * 0.9999
    assert not bool((values == 0).any())


# ---------------------------------------------- scalars
def test_seeds():
    for seed in (0, 2**63 - 1, np.int64(5)):
        assert prng.check_seed(seed) == int(seed)
        assert type(prng.check_seed(seed)) is int
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"seed: got {seed}, need an integer in \[0, 2\*\*63"):
            prng.check_seed(seed)
    for seed in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match=r"seed: got .*, need an integer in \[0, 2\*\*63\)"):
            prng.check_seed(seed)


def test_too_many_weights_for_a_stream():
    with pytest.raises(ValueError, match=r"shape: needs .* calls, a stream has 2\*\*32"):
        prng.words32(0, 0, 2**27 + 1, 64, "magnitude")


def test_round_bf16():
    values = [0.0, -0.0, 1.0, 1 / 3, -math.pi, 1e-40, 3e38, 2.0**-133, math.sqrt(2 / 784)]
    values += [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8]  # ties and near ties
    values += torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist()
    for value in values:
        expected = float(torch.tensor(value, dtype=torch.float32).bfloat16())
        got = prng.round_bf16(value)
        assert got == expected
        assert math.copysign(1, got) == math.copysign(1, expected)


def test_kaiming_std():
    assert prng.kaiming_std(8) == 0.5
    assert prng.kaiming_std(0) == 0.0
