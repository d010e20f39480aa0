"""Does head_dim^(1/4) on query and key weights help the tickets of a small language model?

For every width and seed: a ticket with the factor, one without, a dense-trained and a random-mask
control, through the same loop, data and number of steps. Choices and table are by validation loss;
the test part of the text is not read.

Source: Otsuka, Chijiwa, Okoshi, Fujiki, Motomura, "The strong lottery ticket hypothesis for
multi-head attention mechanisms", AAAI 2026, section 5 (GPT-2 on WikiText-103). Deviations:
characters and a model of minutes; no biases, non-affine norms; Kaiming signed constants divided by
sqrt(density) instead of N(0, 0.02); output projections are not scaled by the depth.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from ..io import Ticket
from ..nn import sparsify_, to_form_
from .experiments import MachineOptions, check_out, circumstances, draw, settings_of
from .loop import Recipe, evaluate, option, search, train_dense
from .plots import plot_curves, plot_masks
from .report import format_bytes, format_kept, write_json, write_text
from .text import DrawnWindows, Text, Windows, load_text
from .transformers import Decoder

__all__ = ["AttentionOptions", "TextRecipe", "attention_lines", "run_attention"]

_KINDS = {
    "scaled": "ticket, scaled",
    "unscaled": "ticket, unscaled",
    "random": "random masks",
    "dense": "dense, trained",
}
_TICKETS = ("scaled", "unscaled")
_EVAL_BATCH = 64


@dataclass(frozen=True)
class AttentionOptions(MachineOptions):
    """Text and model, and which widths and seeds to compare."""

    experiment: str = option("attention", "what the ticket is for; each has its own flags")
    method: str = option("edge-popup", "one whose config has qk_scale")
    text: str = option("tinyshakespeare", "tinyshakespeare or file:PATH, as characters")
    widths: str = option("64,128", "embedding widths to compare, like 64,128")
    layers: int = option(2, "blocks")
    heads: int = option(4, "attention heads, at every width")
    context: int = option(64, "characters a window")
    batch_size: int = option(16, "windows a step")
    steps: int = option(100, "steps an epoch")
    seeds: int = option(3, "number of seeds, from --seed on")
    dense_lr: float = option(3e-3, "learning rate of the dense control")
    seed: int = option(0, "the first one, of weights, scores and windows")
    out: Path | None = field(default=None, metadata={"help": "folder for the results (required)"})
    overwrite: bool = option(False, "replace the results of an earlier run in that folder")

    def widths_listed(self) -> list[int]:
        try:
            widths = [int(part) for part in self.widths.split(",")]
        except ValueError as error:
            raise ValueError(f"widths: got {self.widths!r}, need numbers like 64,128") from error
        if self.seeds < 1 or len(set(widths)) < len(widths):
            raise ValueError(
                f"seeds, widths: got {self.seeds}, {self.widths!r}, need at least one seed and "
                "different widths"
            )
        return widths


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """How to train scores and, but for the learning rate, the dense control."""

    epochs: int = option(6, "times --steps steps, each followed by validation")
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = option(
        "adamw", "SGD with momentum, Adam, AdamW, or RMSProp"
    )
    lr: float = option(1e-2, "learning rate of the scores at its highest")


@dataclass(frozen=True)
class _Run:
    """One cell of the table."""

    width: int
    seed: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.kind}-width{self.width}-seed{self.seed}"


@dataclass(frozen=True)
class _Setting:
    """What all runs share."""

    options: AttentionOptions
    recipe: TextRecipe
    config: Any
    text: Text

    def build(self, run: _Run) -> Decoder:
        """The dense model; torch's generator stays as it was."""
        o = self.options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            return Decoder(len(self.text.vocabulary), o.context, run.width, o.layers, o.heads)

    def config_of(self, run: _Run) -> Any:
        return dataclasses.replace(self.config, seed=run.seed, qk_scale=run.kind != "unscaled")

    def training(self, run: _Run) -> DrawnWindows:
        o = self.options
        return DrawnWindows(self.text.train, o.context, o.batch_size, o.steps, run.seed)

    def validation(self) -> Windows:
        return Windows(self.text.val, self.options.context, _EVAL_BATCH)


def run_attention(options: AttentionOptions, recipe: TextRecipe, config: Any) -> dict[str, Any]:
    """All runs, tables and pictures into ``options.out``; returns the report.

    An interrupted run continues when it is started again, bit for bit at the same thread count:
    finished cells of the table are kept, the one at work goes on from its last epoch.
    """
    out, widths = check_out(options), options.widths_listed()
    if not hasattr(config, "qk_scale"):
        raise ValueError(f"method: got {options.method!r}, need one whose config has qk_scale")
    options.set_up()
    setting = _Setting(options, recipe, config, load_text(options.text, options.data))
    runs = [
        _Run(width, options.seed + i, kind)
        for width in widths
        for i in range(options.seeds)
        for kind in _KINDS
    ]
    for run in runs:
        setting.build(run)  # a shape that cannot be built raises before anything is written
    resolved = settings_of(options, recipe, config)
    _claim(out, resolved, options.overwrite)
    results = {run: _result(setting, run, out / "runs" / run.name) for run in runs}
    best = min((r for r in runs if r.kind in _TICKETS), key=lambda r: results[r]["val_loss"])
    ticket = Ticket.load(out / "runs" / best.name / "ticket.safetensors")
    ticket.save(out / "ticket.safetensors")
    info = ticket.info()
    report = {
        "experiment": options.experiment,
        "method": options.method,
        "text": setting.text.name,
        "vocabulary": len(setting.text.vocabulary),
        "rows": [_row(results, width, kind) for width in widths for kind in _KINDS],
        "scaled_minus_unscaled": {str(width): _gains(results, width) for width in widths},
        "reloads_identical": all(r.get("reload_identical", True) for r in results.values()),
        "best": best.name,
        **{key: info[key] for key in ("density", "kept", "weights", "dense_bytes")},
        "ticket_bytes": info["file_bytes"],
        "not_weight_free": info["not_weight_free"],
        "seconds": round(sum(result["seconds"] for result in results.values()), 3),
        **circumstances(options),
        "config": resolved,
        "missing": draw(
            lambda: plot_curves(_curves(results, options.seed), out / "curves.png"),
            lambda: plot_masks(ticket.masks, out / "masks.png"),
        ),
    }
    write_json(out / "report.json", report)
    return report


def attention_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of what a report says to people; losses are nats a character."""
    lines = []
    for row in report["rows"]:
        each = ", ".join(f"{loss:.3f}" for loss in row["val_loss"])
        label = f"width {row['width']}, {_KINDS[row['kind']]}"
        lines.append((f"{label:<28}", f"validation loss {row['mean']:.3f} ({each})"))
    for width, differences in report["scaled_minus_unscaled"].items():
        each = ", ".join(f"{d:+.3f}" for d in differences)
        lines.append((f"{f'width {width}, the factor':<28}", f"changes the loss by {each}"))
    dense, size = format_bytes(report["dense_bytes"]), format_bytes(report["ticket_bytes"])
    same = "identical" if report["reloads_identical"] else "NOT identical"
    return [
        *lines,
        ("reloaded", f"logits of every ticket file: {same}"),
        ("best ticket", f"{report['best']}, kept {format_kept(report)}"),
        ("size", f"{size}, dense weights {dense}"),
        ("training", f"{report['seconds']:.1f} s with {report['threads']} threads"),
    ]


def _claim(out: Path, resolved: dict[str, Any], overwrite: bool) -> None:
    """Make ``out`` the folder of this run, or find it to be; ValueError if it is another's."""
    stored, text = out / "config.yaml", yaml.safe_dump(resolved, sort_keys=False)
    if overwrite:
        (out / "report.json").unlink(missing_ok=True)
        for path in (out / "runs").glob("*/*"):
            path.unlink()
    elif stored.exists() and stored.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"out: {stored} is of a run with other settings; use another folder or --overwrite"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(stored, text)


def _result(setting: _Setting, run: _Run, folder: Path) -> dict[str, Any]:
    """The cell's result: read where it is finished, else trained and written."""
    path = folder / "result.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    print(f"* {run.name}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    make = {"random": _random_control, "dense": _dense_control}.get(run.kind, _search)
    result = make(setting, run, folder)
    write_json(path, result)
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # last: until here a rerun continues
    return result


def _search(setting: _Setting, run: _Run, folder: Path) -> dict[str, Any]:
    o, config = setting.options, setting.config_of(run)
    shape = {"context": o.context, "width": run.width, "layers": o.layers, "heads": o.heads}
    result = search(
        setting.build(run),
        setting.training(run),
        setting.validation(),
        config,
        **dataclasses.asdict(setting.recipe),
        device=o.device,
        seed=run.seed,
        out=folder,
        extra={"decoder": {"vocabulary": setting.text.vocabulary} | shape, "seed": run.seed},
    )
    path = folder / "ticket.safetensors"
    result.ticket.save(path)
    loaded = Ticket.load(path).apply(setting.build(run)).to(o.device)
    to_form_(result.model, "ticket")
    same = torch.equal(_logits(setting, loaded), _logits(setting, result.model))
    row = _judged(setting, loaded, result.history)
    return row | {"reload_identical": same, "ticket_bytes": len(result.ticket.raw)}


def _dense_control(setting: _Setting, run: _Run, folder: Path) -> dict[str, Any]:
    o = setting.options
    recipe = dataclasses.replace(setting.recipe, lr=o.dense_lr)
    batches = setting.training(run), setting.validation()
    place = {"device": o.device, "seed": run.seed, "out": folder}
    result = train_dense(setting.build(run), *batches, recipe, **place)
    return _judged(setting, result.model, result.history)


def _random_control(setting: _Setting, run: _Run, folder: Path) -> dict[str, Any]:
    """The scaled ticket before its search: masks that rank random scores are random masks."""
    model = setting.build(run)
    sparsify_(model, setting.config_of(run))
    return _judged(setting, model.to(setting.options.device), [])


def _judged(setting: _Setting, model: nn.Module, history: list[dict[str, Any]]) -> dict[str, Any]:
    accuracy, loss = evaluate(model, setting.validation(), setting.options.device)
    seconds = sum(row["seconds"] for row in history)
    return {"val_loss": loss, "val_accuracy": accuracy, "seconds": seconds, "history": history}


@torch.no_grad()
def _logits(setting: _Setting, model: nn.Module) -> Tensor:
    x, _ = next(iter(setting.validation()))
    return model.eval()(x.to(setting.options.device))


def _losses(results: dict[_Run, dict[str, Any]], width: int, kind: str) -> list[float]:
    return [r["val_loss"] for run, r in results.items() if (run.width, run.kind) == (width, kind)]


def _row(results: dict[_Run, dict[str, Any]], width: int, kind: str) -> dict[str, Any]:
    losses = _losses(results, width, kind)
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    row = {"width": width, "kind": kind, "val_loss": losses, "mean": statistics.mean(losses)}
    return row | {"std": spread}


def _gains(results: dict[_Run, dict[str, Any]], width: int) -> list[float]:
    """What the factor changes, seed by seed; below 0: it helps."""
    pairs = zip(*(_losses(results, width, kind) for kind in _TICKETS), strict=True)
    return [scaled - unscaled for scaled, unscaled in pairs]


def _curves(results: dict[_Run, dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Of the first seed."""
    return {
        f"{run.width}: {_KINDS[run.kind]}": result["history"]
        for run, result in results.items()
        if run.seed == seed and result["history"]
    }
