"""The size of one ticket as each paper counts it, beside the bytes of our file.

No paper but ours counts the statistics of normalisation layers, which inference needs; and every
paper has its own megabyte. Sources of the formulas: hidden-networks (README), hidden-fold networks
(``estimate_params_size``), multicoated supermasks (``calc_model_size``), frozen networks (free bits
and seeds), SupSup (CSC matrices with 16-bit indices), IteRand (a seed and a mask for every draw).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .ticket import Ticket

__all__ = ["Account", "accounts"]

_MB, _MIB = 8_000_000, 8 * 1024**2  # bits
_SEED = 32


@dataclass(frozen=True)
class Account:
    """One way to count: whose, what is counted, how many bits, and those in the paper's unit."""

    method: str
    counted: str
    bits: int
    size: str


def accounts(ticket: Ticket) -> list[Account]:
    """Every account that fits the ticket, the papers' first, then entropy and our file."""
    info = ticket.info()
    layers, weights, kept = info["layers"], info["weights"], info["kept"]
    seeds = len({layer["seed"] for layer in layers})
    channels = sum(
        tensor.numel() for name, tensor in ticket.tensors.items() if name.endswith("running_mean")
    )
    kinds = {layer["planes"]["kind"] for layer in layers if "planes" in layer}
    rows = [
        _account("dense", "32 bits a weight", 32 * weights, _MB, "MB"),
        _account("edge-popup", "32 bits a kept weight (its 'params')", 32 * kept, _MB, "MB"),
        _account("edge-popup", "seed, 1 bit a weight", _SEED * seeds + weights, _MB, "MB"),
        _account(
            *("hidden-fold", "seed, 1 bit a weight, 64 bits a norm channel"),
            *(_SEED + weights + 64 * channels, _MB, "MB"),
        ),
        _account(
            *("supsup", "seed, 16 bits a kept weight of each task"),
            *(_SEED + 16 * sum(_plane_counts(layer, "tasks") for layer in layers), _MB, "MB"),
        ),
    ]
    if "sum" in kinds:
        bits = info["raw_bits"] + 32 * channels
        text = "1 bit a weight and coat that the coat before keeps, 32 bits a norm channel"
        rows.append(_account("multicoat", text, bits, _MIB, "MiB"))
    if "draws" in kinds:
        draws = max(len(layer.get("planes", {"codes": ()})["codes"]) + 1 for layer in layers)
        text = f"{draws} draws: a seed and 1 bit a weight for each"
        rows.append(_account("iterand", text, draws * (_SEED + weights), _MB, "MB"))
    if any("frozen" in layer for layer in layers):
        bits = sum(layer["weights"] - sum(layer.get("frozen", ())) for layer in layers)
        text = "2 seeds, 1 bit a free weight"
        rows.append(_account("frozen", text, 2 * _SEED + bits, _MIB, "MiB"))
    entropy = math.ceil(sum(_entropy_bits(layer) for layer in layers))
    rows += [
        _account("entropy", "of the masks at each layer's density, no code", entropy, _MB, "MB"),
        _account("this file", "masks, as coded", info["coded_bits"], _MB, "MB"),
        _account("this file", "norm statistics", info["normalisation_bits"], _MB, "MB"),
        _account("this file", "not weight-free", info["not_weight_free_bits"], _MB, "MB"),
        _account("this file", "all of it", 8 * info["file_bytes"], _MB, "MB"),
    ]
    return rows


def _account(method: str, counted: str, bits: int, unit: int, name: str) -> Account:
    return Account(method, counted, bits, f"{bits / unit:.4g} {name}")


def _plane_counts(layer: Mapping[str, Any], kind: str) -> int:
    """Kept weights of a layer, of all its planes if they are of this kind."""
    planes = layer.get("planes", {"kind": None})
    return layer["kept"] + (
        sum(code["kept"] for code in planes["codes"]) if planes["kind"] == kind else 0
    )


def _entropy_bits(layer: Mapping[str, Any]) -> float:
    """n * H(density) of each mask, over the weights that it says something of."""
    free = layer["weights"] - sum(layer.get("frozen", ()))
    kept = layer["kept"] - layer.get("frozen", (0, 0))[1]
    bits, outer = _bits(free, kept), layer["kept"]
    planes = layer.get("planes", {"kind": None, "codes": ()})
    for code in planes["codes"]:
        bits += _bits(layer["weights"] if planes["kind"] == "tasks" else outer, code["kept"])
        outer = code["kept"]
    return bits


def _bits(n: int, kept: int) -> float:
    return sum(m * math.log2(n / m) for m in (kept, n - kept) if m)
