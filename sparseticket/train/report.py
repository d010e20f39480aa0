"""What a run tells people: progress while it runs, logs and reports in its folder."""

from __future__ import annotations

import csv
import io
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__
from ..io.files import replacing

__all__ = [
    "Progress",
    "format_bytes",
    "format_kept",
    "format_percent",
    "table",
    "versions",
    "write_json",
    "write_logs",
    "write_text",
]

Row = Mapping[str, float | int | None]


class Progress:
    """Epochs on stderr: a bar on a terminal, else about ten lines; nothing if ``label`` is None."""

    def __init__(self, label: str | None, epochs: int, done: int = 0) -> None:
        self.label, self.epochs = label, epochs
        terminal = label is not None and sys.stderr.isatty()
        self.bar = tqdm(total=epochs, initial=done, desc=label, unit="epoch") if terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, row: Row, text: str | None = None) -> None:
        """One epoch has ended; ``text`` says how, by default as of a classifier."""
        text = _classified(row) if text is None else text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.label is not None:
            every = max(self.epochs // 10, 1)
            if row["epoch"] % every == 0 or row["epoch"] == self.epochs:
                print(f"{self.label}: epoch {row['epoch']}/{self.epochs}: {text}", file=sys.stderr)


def _classified(row: Row) -> str:
    text = f"train loss {row['train_loss']:.4f} accuracy {100 * row['train_accuracy']:.2f} %"
    if row["val_accuracy"] is not None:
        text += f", validation {100 * row['val_accuracy']:.2f} %"
    return text


LOG_COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "mask_change",
    "seconds",
)


def write_logs(folder: Path, history: Sequence[Row], columns: Sequence[str] = LOG_COLUMNS) -> None:
    """log.csv and log.jsonl, whole: a resumed run leaves no doubled rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(folder / "log.csv", text.getvalue())
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; NaN and infinities are errors."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then move into place."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "sparseticket": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def format_bytes(count: int) -> str:
    """1234567 -> '1.23 MB' (powers of ten)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def format_kept(row: Mapping[str, Any]) -> str:
    """Its ``kept`` of its ``weights``."""
    return f"{row['kept']:,} of {row['weights']:,}"


def format_percent(fraction: float | None) -> str:
    """0.5 -> '50.00 %'."""
    return "none" if fraction is None else f"{100 * fraction:.2f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
