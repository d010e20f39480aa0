"""The frozen pattern of a layer: weights that a search never touches, regenerated from the seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from sparseticket import ops
from sparseticket.formats import canonical_shape
from sparseticket.masks import PackedMask, layer_number

__all__ = ["FrozenPattern"]


@dataclass(frozen=True)
class FrozenPattern:
    """Exactly ``pruned`` weights that are never used and ``locked`` ones that always are.

    Which ones, the layer's ``frozen`` stream says: its ``pruned`` largest values, then its
    ``locked`` next ones. The rest is free. ValueError for counts that exceed the layer.
    """

    seed: int
    layer: int
    shape: tuple[int, ...]
    pruned: int
    locked: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "layer", layer_number(self.layer))
        if min(self.pruned, self.locked) < 0 or self.pruned + self.locked > self.numel:
            raise ValueError(
                f"FrozenPattern: pruned, locked: got {self.pruned} and {self.locked}, need counts "
                f"of at most {self.numel} together"
            )

    @property
    def numel(self) -> int:
        rows, k = canonical_shape(self.shape)
        return rows * k

    @property
    def free_count(self) -> int:
        return self.numel - self.pruned - self.locked

    @cached_property
    def _words(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(free, locked) words."""
        number = ops.signed64(self.layer)
        values = ops.regenerate(self.seed, number, self.shape, "uniform", 1.0, stream="frozen")
        counts = [self.pruned, self.pruned + self.locked]
        (dropped, frozen), _ = ops.select_mask(
            [values, values], counts, None, None, "layer", "identity", 0
        )
        every = ops.pack_mask(torch.ones(self.shape, dtype=torch.bool))
        return ops.mask_ops(every, frozen, "andnot"), ops.mask_ops(frozen, dropped, "andnot")

    @property
    def free(self) -> PackedMask:
        return PackedMask(self._words[0], self.shape)

    @property
    def locked_mask(self) -> PackedMask:
        return PackedMask(self._words[1], self.shape)

    def compact(self, dense: torch.Tensor) -> torch.Tensor:
        """1-D: what ``dense`` holds at the free positions, in canonical order."""
        return ops.gather_live(dense, self._words[0].to(dense.device), self.free_count)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`compact`, zero at the frozen positions; differentiable."""
        return ops.scatter_live(values, self._words[0].to(values.device), self.shape)

    def expand(self, chosen: PackedMask) -> PackedMask:
        """The layer's mask, of which ``chosen`` is the free part."""
        kept = self.spread(chosen.to_dense().float()) != 0
        return PackedMask.from_dense(kept) | self.locked_mask.to(kept.device)

    def restrict(self, mask: PackedMask) -> PackedMask:
        """The free part of ``mask``, 1-D; ValueError unless the rest is as frozen."""
        dense = mask.to_dense()
        chosen = PackedMask.from_dense(self.compact(dense.float()) != 0)
        if self.expand(chosen) != mask:
            raise ValueError("FrozenPattern: mask: differs from the pattern in frozen places")
        return chosen
