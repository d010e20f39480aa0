"""Pictures of a search, drawn with matplotlib where it is installed (the ``[demo]`` extra)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..formats import to_canonical
from ..io.files import replacing
from ..masks import PackedMask

__all__ = ["new_figure", "plot_curves", "plot_masks", "plot_samples", "save_figure"]

_MAX_PANELS, _MAX_SIDE = 12, 256
_NO_MATPLOTLIB = "pictures need matplotlib: pip install 'sparseticket[demo]'"


def plot_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Accuracy and loss per epoch of labelled runs; ``levels`` are dashed lines of accuracy.

    Validation is drawn where it was measured, else training.
    """
    figure = new_figure(9, 3.6)
    accuracy, loss = figure.subplots(1, 2)
    for label, history in histories.items():
        epochs = [row["epoch"] for row in history]
        for axes, key, scale in ((accuracy, "accuracy", 100), (loss, "loss", 1)):
            measured = bool(history) and history[0][f"val_{key}"] is not None
            part = "val" if measured else "train"
            values = [scale * row[f"{part}_{key}"] for row in history]
            axes.plot(epochs, values, label=label if measured else f"{label} (train)")
    for label, level in (levels or {}).items():
        accuracy.axhline(100 * level, linestyle="--", color="grey", label=label)
    part = (
        "validation " if any(h and h[0]["val_loss"] is not None for h in histories.values()) else ""
    )
    accuracy.set(xlabel="epoch", ylabel=f"{part}accuracy, %")
    loss.set(xlabel="epoch", ylabel=f"{part}cross-entropy", yscale="log")
    accuracy.legend()
    save_figure(figure, path)


def plot_masks(masks: Mapping[str, PackedMask], path: Path) -> None:
    """The masks in canonical [O, K] form, kept weights black; large ones show a corner."""
    shown = list(masks.items())[:_MAX_PANELS]
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure = new_figure(3.2 * columns, 3.2 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (name, mask) in zip(panels, shown, strict=False):
        matrix = to_canonical(mask.to_dense())
        corner = matrix[:_MAX_SIDE, :_MAX_SIDE].to(torch.uint8).cpu().numpy()
        axes.imshow(corner, cmap="binary", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        cut = f" (of {'x'.join(map(str, matrix.shape))})" if matrix.numel() > corner.size else ""
        shape = "x".join(map(str, corner.shape))
        axes.set_title(f"{name}: {shape}{cut}, {100 * mask.density:.3g} % kept", fontsize=8)
    save_figure(figure, path)


def plot_samples(pictures: torch.Tensor, path: Path, zoom: int = 3) -> None:
    """A PNG of a nearly square grid of ``pictures`` ``[N, C, H, W]`` in [0, 1], C 1 or 3, each
    pixel ``zoom`` wide, with lines of one grey pixel between them."""
    try:
        from matplotlib.image import imsave
    except ImportError as error:
        raise ImportError(_NO_MATPLOTLIB) from error
    count, channels = pictures.shape[:2]
    columns = math.isqrt(count - 1) + 1
    big = pictures.detach().cpu().clamp(0, 1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    framed = F.pad(big.expand(-1, 3, -1, -1) if channels == 1 else big, (0, 1, 0, 1), value=0.5)
    blanks = framed.new_ones(-count % columns, *framed.shape[1:])
    rows = torch.cat([framed, blanks]).unflatten(0, (-1, columns))
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [rows*H, columns*W, C]
    with replacing(path) as temporary:
        imsave(temporary, grid.numpy(), format="png")


def new_figure(width: float, height: float) -> Any:
    """A figure that draws to files, apart from pyplot's global state and any display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_NO_MATPLOTLIB) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """As PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
