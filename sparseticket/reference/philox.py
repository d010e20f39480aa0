"""The integers of the random-number contract, in numpy: keys, Philox-2x32-7 units, signs, words.

The kernels repeat them (``csrc/core/philox.h``); golden vectors in ``tests/test_prng.py`` pin both.
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, with 7 rounds.
The key mixing is SplitMix64's finaliser (Steele et al., OOPSLA 2014).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np

__all__ = [
    "DISTRIBUTIONS",
    "GENERATOR_VERSION",
    "STREAMS",
    "check_calls",
    "normal_quantiles",
    "philox",
    "sign_words",
    "stream_key",
    "uniform_scale",
    "units_per_row",
    "words32",
]

GENERATOR_VERSION = 1
DISTRIBUTIONS = ("signed_constant", "uniform", "normal", "constant")
STREAMS = {
    "sign": 0,
    "magnitude": 1,
    "mask": 2,
    "frozen": 3,
    "score": 4,
    "growth": 5,
    "sampling": 6,
    "latent": 7,
    "data_order": 8,
    "augmentation": 9,
}
_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_PHILOX_MULTIPLIER, _PHILOX_WEYL, _PHILOX_ROUNDS = 0xD256D193, 0x9E3779B9, 7


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


@functools.lru_cache(4096)  # asked for at every call of a ticket's kernel
def stream_key(seed: int, layer: int, stream: str, draw: int = 0) -> tuple[int, int]:
    """``(Philox key, counter high word)`` of one stream of one layer; ``layer`` is an id."""
    key = _mix(_mix(_mix(seed) ^ (layer & _MASK64)) ^ (STREAMS[stream] + 256 * draw))
    return key & _MASK32, key >> 32


def philox(low: np.ndarray, high: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Philox-2x32-7 of counters ``(low[i], high)``: two uint32 arrays shaped like ``low``."""
    c0 = np.asarray(low, dtype=np.uint64)
    c1 = np.full_like(c0, high)
    for i in range(_PHILOX_ROUNDS):
        product = c0 * np.uint64(_PHILOX_MULTIPLIER)
        bumped = np.uint64((key + i * _PHILOX_WEYL) & _MASK32)
        c0 = (product >> np.uint64(32)) ^ bumped ^ c1
        c1 = product & np.uint64(_MASK32)
    return c0.astype(np.uint32), c1.astype(np.uint32)


def units_per_row(k: int) -> int:
    """64-weight units in a canonical row of ``k`` weights."""
    return -(-k // 64)


def _plain_order(word: np.ndarray) -> np.ndarray:
    """rot16(interleave(word)): a tile in the GPU's interleaved order uses ``word`` as it is."""
    word = word.copy()
    t = ((word >> 15) ^ word) & np.uint32(0xAAAA)
    word ^= t ^ (t << np.uint32(15))
    return (word << np.uint32(16)) | (word >> np.uint32(16))


def sign_words(seed: int, layer: int, rows: int, k: int, draw: int = 0) -> np.ndarray:
    """uint32 ``[rows, 2*ceil(k/64)]`` sign bits, LSB first, 1 = negative; random padding."""
    key, high = stream_key(seed, layer, "sign", draw)
    check_calls(rows * units_per_row(k))
    first, second = philox(np.arange(rows * units_per_row(k), dtype=np.uint64), high, key)
    words = np.stack([_plain_order(first), _plain_order(second)], axis=-1)
    return words.reshape(rows, 2 * units_per_row(k))


def words32(seed: int, layer: int, rows: int, k: int, stream: str, draw: int = 0) -> np.ndarray:
    """uint32 ``[rows, k]``: one 32-bit word per weight of a canonical ``[rows, k]`` matrix."""
    key, high = stream_key(seed, layer, stream, draw)
    units = units_per_row(k)
    check_calls(rows * units * 32)
    first, second = philox(np.arange(rows * units * 32, dtype=np.uint64), high, key)
    return np.stack([first, second], axis=-1).reshape(rows, units * 64)[:, :k]


def check_calls(calls: int) -> None:
    """ValueError if a stream would repeat: its counter has 2**32 values."""
    if calls > 2**32:
        raise ValueError(
            f"shape: needs {calls} generator calls, a stream has 2**32; split the layer"
        )


def uniform_scale(sigma: float) -> np.float32:
    """fp32(sqrt(3)*sigma): half-width of the uniform distribution with standard deviation sigma."""
    return np.float32(math.sqrt(3.0) * float(sigma))


@functools.cache
def normal_quantiles() -> np.ndarray:
    """The committed fp32 table [65536]: entry i is the normal quantile of (i + 0.5) / 65536."""
    upper = np.frombuffer(
        (Path(__file__).parent.parent / "normal_quantiles.f32").read_bytes(), "<f4"
    )
    if upper.shape != (32768,):
        raise RuntimeError("normal_quantiles.f32 is damaged; reinstall sparseticket")
    table = np.concatenate([-upper[::-1], upper])
    table.flags.writeable = False  # cached
    return table
