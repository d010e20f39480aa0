from __future__ import annotations

from collections.abc import Sequence

import torch

from .pack_mask import pack_mask
from .unpack_mask import unpack_mask

__all__ = ["select_mask"]


def select_mask(
    scores: Sequence[torch.Tensor],
    kept: Sequence[int],
    within: Sequence[torch.Tensor] | None = None,
    state: torch.Tensor | None = None,
    scope: str = "layer",
    transform: str = "abs",
    min_keep: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Exactly ``kept`` ones at the largest scores; ties go to the lowest flat index.

    ``scope="layer"``: ``kept[i]`` of tensor i. ``"global"``: ``kept[0]`` over all of them, after
    every tensor's own best ``min_keep``. ``within``: words of the only positions allowed.
    Returns the packed words and an int32 state ``[groups, 2]``: fp32 bits of the smallest kept
    key (after the transform; +inf where nothing is kept) and whether a NaN was seen (ranked last).
    ``state`` as an input is a hint that changes nothing.
    """
    del state
    keys = [_rank_keys(s, transform) for s in scores]
    allowed = [
        torch.ones_like(k, dtype=torch.bool)
        if within is None
        else unpack_mask(within[i], s.shape).flatten()
        for i, (k, s) in enumerate(zip(keys, scores, strict=True))
    ]
    nan = [bool(torch.isnan(s).any()) for s in scores]
    everything = list(range(len(scores)))
    groups = [[i] for i in everything] if scope == "layer" else [everything]
    masks: list[torch.Tensor] = [torch.zeros_like(a) for a in allowed]
    rows = []
    for group, count in zip(groups, kept, strict=True):
        forced = [_top(keys[i], allowed[i], min_keep if scope == "global" else 0) for i in group]
        flat = torch.cat([keys[i] for i in group])
        rest = torch.cat([allowed[i] for i in group]) & ~torch.cat(forced)
        taken = torch.cat(forced)
        chosen = taken | _top(flat, rest, count - int(taken.sum()))
        lowest = flat[chosen].min() if bool(chosen.any()) else torch.tensor(torch.inf)
        rows.append([lowest.to(torch.float32).item(), any(nan[i] for i in group)])
        for i, part in zip(group, chosen.split([keys[i].numel() for i in group]), strict=True):
            masks[i] = part
    words = [pack_mask(m.view(s.shape)) for m, s in zip(masks, scores, strict=True)]
    out = torch.zeros(len(groups), 2, dtype=torch.int32)
    for row, (lowest, flag) in zip(out, rows, strict=True):
        row[0] = torch.tensor(lowest, dtype=torch.float32).view(torch.int32)
        row[1] = flag
    return words, out.to(scores[0].device) if scores else out


def _rank_keys(scores: torch.Tensor, transform: str) -> torch.Tensor:
    keys = scores.detach().flatten()  # logical order, whatever the memory format
    keys = keys.abs() if transform == "abs" else keys
    return torch.where(torch.isnan(keys), -torch.inf, keys.to(torch.float64) + 0.0)  # -0 is +0


def _top(keys: torch.Tensor, allowed: torch.Tensor, count: int) -> torch.Tensor:
    """Bool: the ``count`` largest keys among ``allowed``, ties to the lowest index."""
    index = torch.nonzero(allowed).flatten()
    order = torch.sort(keys[index], descending=True, stable=True).indices
    chosen = torch.zeros_like(allowed)
    chosen[index[order[:count]]] = True
    return chosen
