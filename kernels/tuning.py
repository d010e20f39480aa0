"""Block sizes per GPU, from the JSON files in ``configs``: chosen by instruction counts of compiled
code (``python -m bench.cross``); none has been timed yet."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Config", "architectures", "configs", "targets_of", "tuned"]

_FOLDER = Path(__file__).parent / "configs"
_ANY = "default"  # any other GPU: 64 KB of shared memory


class Config(NamedTuple):
    """``rows``: batch rows up to which it is taken. Tiles are BM batch rows, BO outputs and BR
    inputs. ``group`` batch tiles run side by side; a sum is split until ``programs`` run."""

    name: str
    rows: int
    kernel: str
    BM: int
    BO: int
    BR: int
    warps: int
    stages: int
    group: int = 8
    programs: int = 1


def architectures() -> list[str]:
    """Names with a file of their own, and the one for all others."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


@functools.cache
def configs(architecture: str) -> dict[str, list[Config]]:
    """Configurations by op, in rising order of batch rows."""
    read = json.loads((_FOLDER / f"{architecture}.json").read_text())
    return {op: [Config(**entry) for entry in listed] for op, listed in read.items()}


def targets_of(architecture: str) -> tuple[str, ...]:
    """The targets of bench/cross.py that a file of ``configs`` is for."""
    return ("gfx942",) if architecture == _ANY else (architecture,)


def tuned(op: str, rows: int, device: torch.device) -> Config:
    """The configuration for ``rows`` batch rows; the last one serves any more."""
    listed = configs(_architecture(device))[op]
    return next((c for c in listed if rows <= c.rows), listed[-1])


@functools.cache
def _architecture(device: torch.device) -> str:
    name = _ANY
    if device.type == "cuda" and torch.version.hip is None:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return name if name in architectures() else _ANY
