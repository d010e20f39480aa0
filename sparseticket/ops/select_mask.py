from __future__ import annotations

import torch

from sparseticket.formats import canonical_shape, channels_and_taps, words_shape
from sparseticket.reference import select_mask as _reference

from ._dispatch import C, Choice, cap, caps, check_padding, check_words, define, nthreads
from .mask_ops import mask_ops

__all__ = [
    "check_selection",
    "check_static",
    "global_with_floor",
    "memory_order",
    "raise_for_nan",
    "select_mask",
]

_SCOPES = ("layer", "global")
_TRANSFORMS = ("abs", "identity")


def _cpu(scores, kept, within=None, state=None, scope="layer", transform="abs", min_keep=0):
    check_static("select_mask", scores, kept, scope, transform, min_keep)
    check_selection("select_mask", scores, kept, within, scope, min_keep)
    words = [s.new_empty(words_shape(s.shape), dtype=torch.int32) for s in scores]
    if scope == "global" and min_keep:
        out = global_with_floor(scores, words, kept[0], within, transform, min_keep)
    else:
        out = _select(scores, words, kept, within, state, scope, transform)
    raise_for_nan("select_mask", scores, out)
    return words, out


def _cuda(scores, kept, within=None, state=None, scope="layer", transform="abs", min_keep=0):
    """Nothing waits for the device: masks of fewer candidates than ``kept`` keep them all."""
    _check_shapes("select_mask", scores, within)
    _check_counts("select_mask", kept, [s.numel() for s in scores], scope, min_keep)
    words = [s.new_empty(words_shape(s.shape), dtype=torch.int32) for s in scores]
    if scope == "global" and min_keep:
        return words, _floor_on_cuda(scores, words, kept[0], within, transform, min_keep)
    return words, _launch(scores, words, kept, within, state, scope, transform)


def _launch(scores, words, kept, within, state, scope, transform, taken=None):
    from sparseticket.kernels.select_mask import select_mask as launch

    pairs = [memory_order(s) for s in scores]
    device = scores[0].device if scores else "cpu"
    out = torch.empty(len(kept), 2, dtype=torch.int32, device=device)
    launch(
        [flat for flat, _ in pairs],
        [layout for _, layout in pairs],
        words,
        None if within is None else [w.contiguous() for w in within],
        list(kept),
        None if state is None or state.shape != out.shape else state.contiguous(),
        out,
        transform == "abs",
        scope == "global",
        taken,
    )
    return out


def _floor_on_cuda(scores, words, kept, within, transform, min_keep):
    """Every tensor's own best ``min_keep``, then the best of all others."""
    own = [torch.empty_like(w) for w in words]
    counts = [min(min_keep, s.numel()) for s in scores]
    states = _launch(scores, own, counts, within, None, "layer", transform)
    others = (
        [~w for w in own] if within is None else [a & ~b for a, b in zip(within, own, strict=True)]
    )
    taken = sum(mask_ops(w, None, "popcount") for w in own)
    state = _launch(scores, words, [kept], others, None, "global", transform, taken)
    for chosen, floor in zip(words, own, strict=True):
        chosen |= floor
    every = torch.cat([state, states])
    lowest = every[:, 0].view(torch.float32).min().view(torch.int32)
    return torch.stack([lowest, every[:, 1].max()])[None]


def raise_for_nan(op, scores, state):
    if bool(state[:, 1].any()):
        bad = [i for i, s in enumerate(scores) if bool(torch.isnan(s).any())]
        raise ValueError(f"{op}: scores: NaN in tensor {bad[0]} ({len(bad)} with NaN)")


def _select(scores, words, kept, within, state, scope, transform):
    """Fill ``words``; returns the state."""
    out = torch.zeros(len(scores) if scope == "layer" else 1, 2, dtype=torch.int32)
    pairs = [memory_order(s) for s in scores]
    hints = None if state is None or state.shape != out.shape else state.contiguous()
    C.select_mask(
        caps(flat for flat, _ in pairs),
        [layout for _, layout in pairs],
        caps(words),
        [] if within is None else caps(w.contiguous() for w in within),
        list(kept),
        transform == "abs",
        scope == "global",
        None if hints is None else cap(hints),
        cap(out),
        nthreads(),
    )
    return out


def global_with_floor(scores, words, kept, within, transform, min_keep):
    """Global selection in which every tensor keeps at least its own best ``min_keep``.

    A tensor's part of a global mask is its own best few, so only tensors below the floor change:
    they get exactly the floor and leave the group, until nobody is below it.
    """

    def part(indices, counts, scope):
        return _select(
            [scores[i] for i in indices],
            [words[i] for i in indices],
            counts,
            None if within is None else [within[i] for i in indices],
            None,
            scope,
            transform,
        )

    open_ = list(range(len(scores)))
    closed = []  # states of the tensors that left
    while True:
        out = part(open_, [kept], "global")
        if bool(out[:, 1].any()):
            return out  # with a NaN the words mean nothing
        counts = {i: int(mask_ops(words[i], None, "popcount")) for i in open_}
        floors = {i: min(min_keep, _candidates(scores, within, i)) for i in open_}
        low = [i for i in open_ if counts[i] < floors[i]]
        if not low:
            every = torch.cat([out, *closed])
            lowest = every[:, 0].view(torch.float32).min()
            return torch.stack([lowest.view(torch.int32), every[:, 1].max()])[None]
        closed.append(part(low, [floors[i] for i in low], "layer"))
        kept -= sum(floors[i] for i in low)
        open_ = [i for i in open_ if i not in low]


def memory_order(scores, copies=True):
    """(fp32 tensor in memory order, (rows, channels, taps, whether memory order is canonical)).

    None instead of a copy if ``copies`` is false.
    """
    scores = scores.detach()
    rows = canonical_shape(scores.shape)[0]
    channels, taps = channels_and_taps(scores.shape)
    canonical = taps == 1
    if not scores.is_contiguous():
        moved = scores.movedim(1, -1) if scores.ndim > 2 else scores
        if taps > 1 and moved.is_contiguous():
            scores, canonical = moved, True
        elif not copies:
            return None
    if scores.dtype != torch.float32 and not copies:
        return None
    return scores.float().contiguous().view(-1), (rows, channels, taps, canonical)


def check_static(op, scores, kept, scope, transform, min_keep):
    if scope not in _SCOPES:
        raise ValueError(f"{op}: scope: got {scope!r}, accepted: {', '.join(_SCOPES)}")
    if transform not in _TRANSFORMS:
        raise ValueError(f"{op}: transform: got {transform!r}, accepted: {', '.join(_TRANSFORMS)}")
    if min_keep < 0 or (min_keep and scope != "global"):
        raise ValueError(
            f"{op}: min_keep: got {min_keep} with scope={scope!r}, need 0, or with "
            "scope='global' a number >= 0"
        )
    for s in scores:
        if s.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"{op}: scores: got {s.dtype}, need float32 (bfloat16 and float16 are "
                "ranked in float32)"
            )
    groups = len(scores) if scope == "layer" else 1
    if len(kept) != groups:
        raise ValueError(f"{op}: kept: got {len(kept)} counts, need {groups}")


def check_selection(op, scores, kept, within, scope, min_keep):
    """ValueError for masks and counts that do not fit the scores."""
    _check_shapes(op, scores, within)
    if within is not None:
        for w, s in zip(within, scores, strict=True):
            check_padding(op, w, canonical_shape(s.shape)[1], "within")
    candidates = [_candidates(scores, within, i) for i in range(len(scores))]
    _check_counts(op, kept, candidates, scope, min_keep)


def _check_shapes(op, scores, within):
    if within is None:
        return
    if len(within) != len(scores):
        raise ValueError(f"{op}: within: got {len(within)} masks for {len(scores)} tensors")
    for w, s in zip(within, scores, strict=True):
        if w.device != s.device:  # masks in a list have no say in where the op runs
            raise ValueError(f"{op}: within: got {w.device}, need {s.device}")
        check_words(op, w, *canonical_shape(s.shape), name="within")


def _check_counts(op, kept, candidates, scope, min_keep):
    if scope == "global":
        forced = sum(min(min_keep, c) for c in candidates)
        if kept[0] < forced:
            raise ValueError(
                f"{op}: kept: got {kept[0]}, but min_keep={min_keep} a tensor alone keeps {forced}"
            )
        candidates = [sum(candidates)]
    for count, available in zip(kept, candidates, strict=True):
        if not 0 <= count <= available:
            raise ValueError(
                f"{op}: kept: got {count}, need 0 <= kept <= {available}, the number of candidates"
            )


def _candidates(scores, within, i):
    return scores[i].numel() if within is None else int(mask_ops(within[i], None, "popcount"))


def _meta(scores, kept, within=None, state=None, scope="layer", transform="abs", min_keep=0):
    check_static("select_mask", scores, kept, scope, transform, min_keep)
    words = [s.new_empty(words_shape(s.shape), dtype=torch.int32) for s in scores]
    groups = len(scores) if scope == "layer" else 1
    device = scores[0].device if scores else "cpu"
    return words, torch.empty(groups, 2, dtype=torch.int32, device=device)


def _choose_cuda(scores, *rest, **options):
    from sparseticket.kernels.select_mask import select_sizes

    total = sum(s.numel() for s in scores)
    sizes, counting = select_sizes(total, scores[0].device if scores else torch.device("cpu"))
    return Choice(
        "select_mask",
        "Triton one read",
        f"{total} scores in {len(scores)} tensors; passes: {sizes}; counting: {counting}",
    )


select_mask = define(
    "select_mask(Tensor[] scores, SymInt[] kept, Tensor[]? within=None, Tensor? state=None,"
    ' str scope="layer", str transform="abs", int min_keep=0) -> (Tensor[] words, Tensor state)',
    cpu=_cpu,
    reference=_reference.select_mask,
    meta=_meta,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
