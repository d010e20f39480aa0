"""The random-number contract as users of it see it: seeds, layer ids, streams, permutations.

Everything random in this library comes from here. Changing a value is a new ``GENERATOR_VERSION``.
"""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np

from .reference.philox import (
    DISTRIBUTIONS,
    GENERATOR_VERSION,
    STREAMS,
    check_calls,
    normal_quantiles,
    philox,
    sign_words,
    stream_key,
    uniform_scale,
    units_per_row,
    words32,
)

__all__ = [
    "DISTRIBUTIONS",
    "GENERATOR_VERSION",
    "STREAMS",
    "check_calls",
    "check_seed",
    "kaiming_std",
    "layer_id",
    "normal_quantiles",
    "permutation",
    "philox",
    "round_bf16",
    "sign_words",
    "stream_key",
    "uniform_scale",
    "units_per_row",
    "words32",
]

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def check_seed(seed: int) -> int:
    """Return ``seed`` as an int; ValueError unless it is in [0, 2**63)."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed: got {seed!r}, need an integer in [0, 2**63)")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, need an integer in [0, 2**63)")
    return int(seed)


def layer_id(name: str) -> int:
    """Layer id in [0, 2**64): first 8 bytes, little-endian, of SHA-256 of the qualified name.

    Wrapper prefixes (DDP's ``module``, ``_orig_mod``, FSDP's) are dropped wherever they stand.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return int.from_bytes(hashlib.sha256(".".join(parts).encode()).digest()[:8], "little")


def permutation(seed: int, name: str, n: int, stream: str = "data_order", draw: int = 0):
    """int64 permutation of ``range(n)``: positions sorted by their 32-bit words, ties by index."""
    words = words32(seed, layer_id(name), 1, n, stream, draw)[0]
    return np.argsort(words, kind="stable")


def round_bf16(value: float) -> float:
    """The nearest bfloat16 (ties to even), as a Python float. Finite input only."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def kaiming_std(fan_in: int) -> float:
    """Kaiming fan-in standard deviation for ReLU, sqrt(2 / fan_in); 0 for an empty fan."""
    return math.sqrt(2.0 / fan_in) if fan_in else 0.0
