"""Text as characters: a file in three parts; training windows are drawn, others in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import prng

__all__ = ["DrawnWindows", "Text", "Windows", "load_text"]

Batches = Iterator[tuple[Tensor, Tensor]]
_KNOWN = {"tinyshakespeare": Path("tinyshakespeare") / "input.txt"}
_HELD_OUT = 0.05  # validation and test, each


@dataclass(frozen=True)
class Text:
    """Characters as int64 indices into ``vocabulary``: the first 90 % of the file to train on, the
    next 5 % to choose by, the last 5 % to test on."""

    name: str
    vocabulary: str
    train: Tensor
    val: Tensor
    test: Tensor


def load_text(name: str, data_dir: str | os.PathLike[str] | None = None) -> Text:
    """``tinyshakespeare``, looked for under ``data_dir``, else SPARSETICKET_DATA; or
    ``file:PATH``, any UTF-8 text."""
    kind, _, path = name.partition(":")
    if kind == "file" and path:
        source, name = Path(path), "text file"
    elif name in _KNOWN:
        root = data_dir if data_dir is not None else os.environ.get("SPARSETICKET_DATA")
        if root is None:
            raise ValueError(f"data: {name} needs a folder: --data DIR, or SPARSETICKET_DATA")
        source = Path(root) / _KNOWN[name]
    else:
        known = ", ".join(_KNOWN)
        raise ValueError(f"load_text: name: got {name!r}, known: {known}, file:PATH")
    if not source.is_file():
        raise FileNotFoundError(f"data: there is no {source}")
    text = source.read_text(encoding="utf-8")
    vocabulary = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(vocabulary)}
    tokens = torch.tensor([index[character] for character in text])
    held = int(_HELD_OUT * len(text))
    parts = tokens.split([len(text) - 2 * held, held, held])
    return Text(name, vocabulary, *parts)


class DrawnWindows:
    """``steps`` batches an epoch of ``(x [batch, context], y [batch * context])``, y the character
    after each of x, at places drawn for (seed, epoch)."""

    def __init__(self, tokens: Tensor, context: int, batch: int, steps: int, seed: int) -> None:
        _check(tokens, context, batch=batch, steps=steps)
        self.tokens, self.context, self.batch, self.steps = tokens, context, batch, steps
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Batches:
        shape = (self.steps, self.batch)
        layer = prng.layer_id("text windows")
        words = prng.words32(self.seed, layer, *shape, "data_order", self.epoch)[:, : self.batch]
        places = len(self.tokens) - self.context
        starts = (words.astype(np.uint64) * places >> 32).astype(np.int64)  # uniform, to 2^-32
        for row in torch.from_numpy(starts):
            yield _windows(self.tokens, row, self.context)


class Windows:
    """Every character but the first as a target once: windows one after another, as batches; an
    incomplete window at the end is left out."""

    def __init__(self, tokens: Tensor, context: int, batch: int) -> None:
        _check(tokens, context, batch=batch)
        self.tokens, self.context, self.batch = tokens, context, batch

    def __len__(self) -> int:
        return -(-((len(self.tokens) - 1) // self.context) // self.batch)

    def __iter__(self) -> Batches:
        count = (len(self.tokens) - 1) // self.context
        for rows in (torch.arange(count) * self.context).split(self.batch):
            yield _windows(self.tokens, rows, self.context)


def _windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    place = starts[:, None] + torch.arange(context)
    return tokens[place], tokens[place + 1].flatten()


def _check(tokens: Tensor, context: int, **counts: int) -> None:
    for name, value in {"context": context, **counts}.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, need at least 1")
    if len(tokens) <= context:
        raise ValueError(
            f"context: got {context}, a part of the text has {len(tokens)} characters only"
        )
