"""Block sizes per GPU, from the JSON files in ``configs``: chosen by instruction counts of compiled
code (``python -m bench.cross``); none has been timed yet."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Config", "Sizes", "architectures", "configs", "shipped", "targets_of", "tuned"]

_FOLDER = Path(__file__).parent / "configs"
_ANY = "default"  # any other GPU: 64 KB of shared memory


class Config(NamedTuple):
    """Of products with decoded weights. ``most``: batch rows up to which it is taken. Tiles are BM
    batch rows, BO outputs and BR inputs. ``group`` batch tiles run side by side; a sum is split
    until ``programs`` run."""

    name: str
    most: int
    kernel: str
    BM: int
    BO: int
    BR: int
    warps: int
    stages: int
    group: int = 8
    programs: int = 1

    def __str__(self) -> str:
        tiles = f"BM={self.BM} BO={self.BO} BR={self.BR}"
        return f"configuration {self.name}: {tiles}, {self.warps} warps"


class Sizes(NamedTuple):
    """Of all other kernels: their constants by name. ``most``: scores, weights or batch rows up to
    which it is taken."""

    name: str
    most: int
    blocks: dict[str, int]
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"configuration {self.name}: {blocks}, {self.warps} warps"


def architectures() -> list[str]:
    """Names with a file of their own, and the one for all others."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


@functools.cache
def configs(architecture: str) -> dict[str, list[Config | Sizes]]:
    """Configurations by op, in rising order of ``most``."""
    read = json.loads((_FOLDER / f"{architecture}.json").read_text())
    return {
        op: [(Sizes if "blocks" in entry else Config)(**entry) for entry in listed]
        for op, listed in read.items()
    }


def shipped(*ops: str) -> Iterator[tuple[str, str, Config | Sizes]]:
    """(architecture, op, configuration) of all that ship for these."""
    for architecture in architectures():
        for op in ops:
            yield from ((architecture, op, c) for c in configs(architecture)[op])


def targets_of(architecture: str) -> tuple[str, ...]:
    """The targets of bench/cross.py that a file of ``configs`` is for."""
    return ("gfx942",) if architecture == _ANY else (architecture,)


def tuned(op: str, size: int, device: torch.device) -> Config | Sizes:
    """The configuration for ``size`` batch rows, scores or weights; the last serves any more."""
    listed = configs(_architecture(device))[op]
    return next((c for c in listed if size <= c.most), listed[-1])


@functools.cache
def _architecture(device: torch.device) -> str:
    name = _ANY
    if device.type == "cuda" and torch.version.hip is None:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return name if name in architectures() else _ANY
