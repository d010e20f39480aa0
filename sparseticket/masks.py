"""Exact masks: packed storage, selection by score, random masks, regenerated weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from . import ops
from .formats import canonical_shape, check_density, kept_count, words_shape
from .prng import check_seed, layer_id

__all__ = ["PackedMask", "as_mask", "layer_number", "random_mask", "regenerate", "select_mask"]


def layer_number(layer: str | int) -> int:
    """Layer id in [0, 2**64): an int as it is, a qualified module name through its hash."""
    if isinstance(layer, str):
        return layer_id(layer)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer: got {layer!r}, need a module name or an id in [0, 2**64)")
    if not 0 <= layer < 2**64:
        raise ValueError(f"layer: got {layer}, need a module name or an id in [0, 2**64)")
    return layer


def regenerate(
    seed: int,
    layer: str | int,
    shape: Sequence[int],
    dist: str = "signed_constant",
    *,
    sigma: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The random weights of one layer: a tensor of ``shape`` with standard deviation ``sigma``.

    ``layer`` is a module's qualified name or its 64-bit id; ``dist`` is ``signed_constant``,
    ``uniform``, ``normal`` or ``constant`` (+sigma). The same bits on every machine. Values are
    made in float32 and then rounded to ``dtype``; ``sigma`` is used as given (modules round theirs
    to bfloat16).
    """
    if isinstance(sigma, bool) or not isinstance(sigma, numbers.Real):
        raise TypeError(f"regenerate: sigma: got {sigma!r}, need a finite number >= 0")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"regenerate: sigma: got {sigma}, need a finite number >= 0")
    shape = _sizes(shape, "regenerate: shape")
    number = ops.signed64(layer_number(layer))
    return ops.regenerate(
        check_seed(seed), number, shape, dist, float(sigma), dtype=dtype, device=device
    )


def _sizes(shape: Any, where: str) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Iterable):
        raise TypeError(f"{where}: got {shape!r}, need a sequence of sizes")
    sizes = tuple(shape)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"{where}: got {sizes}, need integers >= 0")
        if size < 0:
            raise ValueError(f"{where}: got {sizes}, need integers >= 0")
    return tuple(map(int, sizes))


def random_mask(seed: int, layer: str | int, shape: Sequence[int], kept: int) -> PackedMask:
    """Mask with exactly ``kept`` ones: the largest values of the layer's ``mask`` stream."""
    number = ops.signed64(layer_number(layer))
    shape = _sizes(shape, "random_mask: shape")
    values = ops.regenerate(check_seed(seed), number, shape, "uniform", 1.0, stream="mask")
    return select_mask(values, kept=kept, transform="identity")


def select_mask(
    scores: torch.Tensor | Iterable[torch.Tensor],
    *,
    density: float | Sequence[float] | None = None,
    kept: int | Sequence[int] | None = None,
    scope: str = "layer",
    transform: str = "abs",
    within: Any = None,
    min_keep_per_layer: int = 0,
) -> Any:
    """The exact mask of the largest ``scores``: a :class:`PackedMask`, or a list for a list.

    Give ``density`` (kept fraction) or ``kept`` (count): a number, or one per tensor. With
    ``scope="global"`` it is one number over all tensors together, each tensor first keeping its own
    best ``min_keep_per_layer``. ``transform="abs"`` ranks magnitudes, ``"identity"`` signed values.
    ``within`` (a mask, or one per tensor) limits the choice; density still counts all positions.
    Ties go to the lowest flat index, over a list to the earlier tensor. float32, bfloat16 or
    float16 scores of any shape and layout. ValueError for NaN and for counts out of range.
    """
    single = isinstance(scores, torch.Tensor)
    tensors = [scores] if single else _tensor_list(scores)
    counts = _counts([t.numel() for t in tensors], density, kept, scope)
    if isinstance(min_keep_per_layer, bool) or not isinstance(min_keep_per_layer, int):
        raise TypeError(
            f"select_mask: min_keep_per_layer: got {min_keep_per_layer!r}, need an integer"
        )
    if min_keep_per_layer < 0 or (min_keep_per_layer and scope != "global"):
        raise ValueError(
            f"select_mask: min_keep_per_layer: got {min_keep_per_layer} with scope={scope!r}, "
            "need 0, or with scope='global' a number >= 0"
        )
    if within is not None:
        if not single and (isinstance(within, torch.Tensor) or not isinstance(within, Iterable)):
            raise TypeError(
                f"select_mask: within: got one {type(within).__name__}, need one mask per tensor"
            )
        given = [within] if single else list(within)
        if len(given) != len(tensors):
            raise ValueError(f"select_mask: within: got {len(given)} masks, need {len(tensors)}")
        within = [
            as_mask(w, t.shape, "select_mask: within").words.to(t.device)
            for w, t in zip(given, tensors, strict=True)
        ]
    words, state = ops.select_mask(
        tensors, counts, within, None, scope, transform, min_keep_per_layer
    )
    if not state.is_meta and bool(state[:, 1].any()):
        raise ValueError("select_mask: scores: NaN cannot be ranked; look for a diverged update")
    masks = [PackedMask(w, t.shape) for w, t in zip(words, tensors, strict=True)]
    return masks[0] if single else masks


def _tensor_list(scores: Any) -> list[torch.Tensor]:
    if not isinstance(scores, Iterable):
        raise TypeError(f"select_mask: scores: got {type(scores).__name__}, need tensors")
    tensors = list(scores)
    if not tensors:
        raise ValueError("select_mask: scores: got an empty list, need at least one tensor")
    for t in tensors:
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"select_mask: scores: got a {type(t).__name__}, need tensors")
    if len({t.device for t in tensors}) > 1:
        devices = sorted({str(t.device) for t in tensors})
        raise ValueError(f"select_mask: scores: got devices {', '.join(devices)}, need one")
    return tensors


def _counts(sizes: list[int], density: Any, kept: Any, scope: str) -> list[int]:
    """Number kept in each tensor, or over all of them (``scope="global"``)."""
    if (density is None) == (kept is None):
        raise ValueError("select_mask: density, kept: give exactly one of the two")
    name, value = ("density", density) if kept is None else ("kept", kept)
    if scope == "global":
        sizes = [sum(sizes)]
    value = _number(value)
    if isinstance(value, numbers.Real):
        values = [value] * len(sizes)
    elif isinstance(value, Iterable) and not isinstance(value, str):
        values = [_number(v) for v in value]
    else:
        raise TypeError(f"select_mask: {name}: got {value!r}, need a number, or one per tensor")
    if len(values) != len(sizes):
        raise ValueError(
            f"select_mask: {name}: got {len(values)} numbers, need one or {len(sizes)} "
            f"(scope={scope!r})"
        )
    if name == "density":
        values = [check_density(d, "select_mask: density") for d in values]
        return [kept_count(d, n) for d, n in zip(values, sizes, strict=True)]
    if any(isinstance(k, bool) or not isinstance(k, numbers.Integral) for k in values):
        raise TypeError(f"select_mask: kept: got {kept!r}, need integers")
    return [int(k) for k in values]


def _number(value: Any) -> Any:
    """The Python number in a 0-d tensor or array; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


@dataclass(frozen=True, eq=False, repr=False)
class PackedMask:
    """A mask over a weight of ``shape`` at one bit per position; immutable.

    ``words``: int32 ``[O, 2*ceil(K/64)]`` over the canonical ``[O, K]`` form, lowest bit first,
    padding bits 0; taken without a copy, so hand over ownership. Masks are equal when shape and
    bits are. Combine them with ``&``, ``|``, ``^`` and ``~``.
    """

    words: torch.Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        check_packed(self.words, self.shape, "PackedMask: words")

    @classmethod
    def from_dense(cls, mask: torch.Tensor) -> PackedMask:
        """Pack a bool tensor of any shape."""
        return cls(ops.pack_mask(mask), mask.shape)

    @classmethod
    def full(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> PackedMask:
        """The mask that keeps everything."""
        return cls.from_dense(torch.ones(tuple(shape), dtype=torch.bool, device=device))

    def to_dense(self) -> torch.Tensor:
        """bool tensor of ``shape``."""
        return ops.unpack_mask(self.words, self.shape)

    def to(self, device: torch.device | str) -> PackedMask:
        """The mask on ``device``."""
        return PackedMask(self.words.to(device), self.shape)

    @cached_property
    def kept(self) -> int:
        """Number of ones."""
        return int(ops.mask_ops(self.words, None, "popcount"))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Kept fraction; 1 for a mask over nothing."""
        return self.kept / self.numel if self.numel else 1.0

    def distance(self, other: PackedMask) -> int:
        """Number of positions where the masks differ."""
        return int(ops.mask_ops(self.words, self._words_of(other), "hamming"))

    def __and__(self, other: PackedMask) -> PackedMask:
        return self._combine(other, "and")

    def __or__(self, other: PackedMask) -> PackedMask:
        return self._combine(other, "or")

    def __xor__(self, other: PackedMask) -> PackedMask:
        return self._combine(other, "xor")

    def __invert__(self) -> PackedMask:
        return PackedMask.full(self.shape, self.words.device)._combine(self, "andnot")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedMask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.words.cpu(), other.words.cpu())

    def __hash__(self) -> int:
        return hash((self.shape, self.words.cpu().numpy().tobytes()))

    def __repr__(self) -> str:
        return f"PackedMask(shape={self.shape}, kept={self.kept}, density={self.density:.4g})"

    def _combine(self, other: PackedMask, op: str) -> PackedMask:
        return PackedMask(ops.mask_ops(self.words, self._words_of(other), op), self.shape)

    def _words_of(self, other: PackedMask) -> torch.Tensor:
        if not isinstance(other, PackedMask):
            raise TypeError(f"PackedMask: got a {type(other).__name__}, need another PackedMask")
        if self.shape != other.shape:
            raise ValueError(f"PackedMask: shapes differ: {self.shape} and {other.shape}")
        return other.words.to(self.words.device)


def as_mask(mask: Any, shape: Sequence[int], where: str) -> PackedMask:
    """``mask`` (PackedMask or bool tensor) as a PackedMask; raises unless it has ``shape``."""
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        mask = PackedMask.from_dense(mask)
    if not isinstance(mask, PackedMask):
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"{where}: got {kind}, need a PackedMask or a bool tensor")
    if mask.shape != tuple(shape):
        raise ValueError(f"{where}: got shape {mask.shape}, need {tuple(shape)}")
    return mask


def check_packed(words: torch.Tensor, shape: Sequence[int], where: str) -> None:
    """ValueError unless ``words`` is a packed mask over ``shape`` with its padding bits 0."""
    expected = words_shape(shape)
    if words.dtype != torch.int32 or tuple(words.shape) != expected:
        raise ValueError(
            f"{where}: got {words.dtype} {tuple(words.shape)}, need torch.int32 {expected} for a "
            f"weight of shape {tuple(shape)}"
        )
    tail = canonical_shape(shape)[1] % 64
    if not tail or not words.numel() or words.is_meta:
        return
    padding = ~((1 << tail) - 1)
    halves = [padding & 0xFFFFFFFF, padding >> 32 & 0xFFFFFFFF]
    halves = torch.tensor(halves, dtype=torch.int64, device=words.device).to(torch.int32)
    if bool((words[:, -2:] & halves).any()):
        raise ValueError(f"{where}: bits beyond the weight's {tail} last columns are set")
