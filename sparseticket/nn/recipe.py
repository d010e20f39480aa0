"""What a layer's frozen weights are made from: five numbers instead of a tensor."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sparseticket import ops
from sparseticket.formats import canonical_shape
from sparseticket.masks import layer_number
from sparseticket.prng import DISTRIBUTIONS, check_seed, kaiming_std, round_bf16

__all__ = ["INITS", "WeightRecipe"]

INITS = ("kaiming", "xavier", "torch")


@dataclass(frozen=True)
class WeightRecipe:
    """Seed, layer id in [0, 2**64), distribution, unscaled Kaiming ``std``, final ``sigma``.

    Both deviations are finite, >= 0 and exact in float32; ``sigma`` is exact in bfloat16, so every
    dtype and device holds the same weights.
    """

    seed: int
    layer: int
    dist: str
    std: float
    sigma: float

    def __post_init__(self) -> None:
        check_seed(self.seed)
        layer_number(self.layer)
        if self.dist not in DISTRIBUTIONS:
            known = ", ".join(DISTRIBUTIONS)
            raise ValueError(f"weights: got {self.dist!r}, accepted: {known}")
        for name, value in (("std", self.std), ("sigma", self.sigma)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: got {value}, need a finite number >= 0")

    @classmethod
    def initial(
        cls,
        seed: int,
        layer: str | int,
        dist: str,
        shape: Sequence[int],
        init: str = "kaiming",
        gain: float = 1.0,
    ) -> WeightRecipe:
        """Unscaled weights of a layer of ``shape`` with the deviation that ``init`` names, one of
        ``INITS``: sqrt(2 / fan_in), sqrt(2 / (fan_in + fan_out)) or torch's sqrt(1 / (3 fan_in));
        times ``gain``.
        """
        if init not in INITS:
            raise ValueError(f"init: got {init!r}, accepted: {', '.join(INITS)}")
        fan_in = canonical_shape(shape)[1]
        fan_out = shape[0] * math.prod(shape[2:])
        std = kaiming_std(fan_in)
        if init == "xavier":
            std = kaiming_std(fan_in + fan_out)
        elif init == "torch":
            std = kaiming_std(6 * fan_in)
        std = _float_from_bits(_float_bits(gain * std))
        return cls(seed, layer_number(layer), dist, std, round_bf16(std))

    def scaled(self, density: float) -> WeightRecipe:
        """The recipe with sigma = std / sqrt(density); unscaled where nothing is kept."""
        return replace(self, sigma=round_bf16(self.std / math.sqrt(density or 1.0)))

    def weight(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        words: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weights, contiguous; zero where the mask ``words`` drops them."""
        return ops.regenerate(*self.arguments(shape), dtype=dtype, device=device, words=words)

    def arguments(self, *shape: Sequence[int]) -> tuple:
        """``(seed, layer, [shape,] dist, sigma)`` as the ops take them."""
        return (self.seed, ops.signed64(self.layer), *shape, self.dist, self.sigma)

    def to_tensor(self) -> torch.Tensor:
        """int64 ``[5]``: seed, signed layer id, distribution index, float32 bits of std, sigma."""
        dist = DISTRIBUTIONS.index(self.dist)
        bits = (_float_bits(self.std), _float_bits(self.sigma))
        return torch.tensor([self.seed, ops.signed64(self.layer), dist, *bits], device="cpu")

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> WeightRecipe:
        """Inverse of :meth:`to_tensor`; ValueError for anything it cannot have written."""
        if tensor.dtype != torch.int64 or tuple(tensor.shape) != (5,):
            raise ValueError(f"got {tensor.dtype} {tuple(tensor.shape)}, need torch.int64 (5,)")
        seed, layer, dist, std, sigma = tensor.tolist()
        if not 0 <= dist < len(DISTRIBUTIONS):
            raise ValueError(f"got distribution {dist}, need 0 to {len(DISTRIBUTIONS) - 1}")
        if not (0 <= std < 2**32 and 0 <= sigma < 2**32):
            raise ValueError(f"got std {std}, sigma {sigma}, need the bits of two float32 numbers")
        layer %= 2**64
        floats = map(_float_from_bits, (std, sigma))
        return cls(seed, layer, DISTRIBUTIONS[dist], *floats)


def _float_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _float_from_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]
