"""Tickets of generators: Yeo, Jang, Sohn, Han, Yoo, "Can we find strong lottery tickets in
generative models?", AAAI 2023, sections 3 and 4, on the library's own search methods.

A generator with random weights that are never trained learns, by its masks, to make pictures whose
features in a frozen network have the moments of real pictures' features (``moments.py``). Beside
the ticket stand a generator of the same shape whose weights are trained under the same loss and
budget, and the best of some random masks over the ticket's weights.

Deviations from the reference code (LAIT-CVLab/SLT-in-Generative-Models):

- the signed constant is kept; there, a DCGAN initialisation overwrites it;
- no biases, so none have scores;
- a cosine over the whole run; there, one of period 20 steps;
- score and moment learning rates for thousands of steps in place of hundreds of thousands;
- Frechet distances are those of the extractor's last ReLU, averaged over locations.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import ops
from ..io import Ticket
from ..masks import random_mask
from ..nn import ScoreLayer, SparseModule, sparsify_, tickets_, to_form_
from ..optim import PopupAdamW
from ..prng import check_seed, layer_id
from ..tickets import METHODS, EdgePopup
from .checkpoint import load_checkpoint, save_checkpoint
from .data import Dataset, Split, load_dataset
from .experiments import MachineOptions, check_out, circumstances, draw, settings_of
from .extractors import EXTRACTORS, Extractor, build_extractor, flat, pooled
from .generators import GENERATORS, build_generator
from .loop import LoopState, Recipe, keep_masks, masks_of, option, restore, snapshot
from .moments import MomentMatcher, Moments, frechet_distance, moment_distance, moments_of
from .plots import plot_samples
from .report import Progress, format_bytes, format_kept, write_json, write_logs, write_text

__all__ = ["GenerativeOptions", "generative_lines", "latents", "run_generative"]

_BATCH = 500  # pictures at a time where no gradient is needed
_GLANCE = 5  # an epoch is judged by one fifth of the pictures of the final judgement
_JUDGED = 1000  # pictures whose classes are counted
_SURE = 0.9
_GRID = 100
_SETTLE = 50  # batches from which batch norms get their final statistics
_COLUMNS = ("run", "epoch", "lr", "loss", "distance", "mask_change", "seconds")
_RUNS = ("ticket", "dense")
_PICTURES = {"ticket": "samples.png", "dense": "samples-dense.png", "random": "samples-random.png"}
_OUTPUTS = (
    *("config.yaml", "log.csv", "log.jsonl", "report.json", "ticket.safetensors"),
    *(f"checkpoint-{run}.pt" for run in _RUNS),
    *_PICTURES.values(),
)


@dataclass(frozen=True)
class GenerativeOptions(MachineOptions):
    """All of a search for a generator but its method's own fields."""

    experiment: str = option("generative", "what the ticket is for; each has its own flags")
    method: str = option("edge-popup", f"one of {', '.join(METHODS)}")
    dataset: str = option("digits", "digits, mnist or cifar10")
    generator: str = option("mlp", f"one of {', '.join(GENERATORS)}")
    width: int = option(256, "units of a hidden layer, or channels of the first picture")
    latent: int = option(64, "length of a latent, normal numbers")
    extractor: str = option("random", f"frozen network, one of {', '.join(EXTRACTORS)}")
    extractor_file: Path | None = field(
        default=None, metadata={"help": "its weights; default: under the folder of the data"}
    )
    epochs: int = option(15, "parts of a run; each ends with a row of the log and a checkpoint")
    steps: int = option(100, "batches of latents in an epoch")
    batch_size: int = option(128, "pictures per step")
    lr: float = option(3e-3, "learning rate of the scores at its highest (Adam, cosine)")
    dense_lr: float = option(1e-3, "the same of the dense control's weights")
    moment_lr: float = option(5e-3, "learning rate of the Adam moving averages")
    beta1: float = option(0.5, "of every Adam here; beta2 is 0.999")
    samples: int = option(10_000, "pictures that the final distances are taken over")
    controls: bool = option(True, "also train a dense generator and draw random masks")
    random_masks: int = option(8, "draws of random masks, of which the best is the control")
    seed: int = option(0, "of weights, scores, latents and the random extractor")
    out: Path | None = field(default=None, metadata={"help": "folder for the results (required)"})
    overwrite: bool = option(False, "replace the results of an earlier run in that folder")

    def __post_init__(self) -> None:
        check_seed(self.seed)
        least = {"epochs": 0, "steps": 1, "batch_size": 2, "samples": _JUDGED, "random_masks": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least {low}")
        for name in ("lr", "dense_lr", "moment_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, need a finite number, at least 0"
                )
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1: got {self.beta1}, need a number in [0, 1)")

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta1, 0.999


@dataclass(frozen=True)
class _Setting:
    """What all generators of a run share. ``log``: the rows of each training, by its name."""

    options: GenerativeOptions
    dataset: Dataset
    extractor: Extractor
    real: Moments
    log: dict[str, list[dict[str, Any]]]

    def build(self) -> nn.Module:
        """A new dense generator, its weights drawn from the seed."""
        o = self.options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(o.seed)
            shape = self.dataset.in_shape
            model = build_generator(o.generator, in_shape=shape, latent=o.latent, width=o.width)
        return model.to(o.device)

    def latents(self, name: str, draw: int, count: int) -> Tensor:
        return latents(self.options.seed, name, draw, count, self.options.latent).to(
            self.options.device
        )


def latents(seed: int, name: str, draw: int, count: int, length: int) -> Tensor:
    """Normal numbers float32 ``[count, length]`` of the ``latent`` stream; another ``name`` or
    ``draw`` gives others."""
    number = ops.signed64(layer_id(f"latent.{name}"))
    return ops.regenerate(seed, number, (count, length), "normal", 1.0, stream="latent", draw=draw)


def run_generative(options: GenerativeOptions, config: Any) -> dict[str, Any]:
    """Search a generator's ticket, train and draw its controls, and report into ``options.out``.

    An interrupted run continues when it is started again, bit for bit at the same thread count.
    """
    out = check_out(options)
    if getattr(config, "tasks", 1) > 1:
        raise ValueError(f"tasks: got {config.tasks}, a generator has one")
    options.set_up()
    setting, test = _prepare(options)
    for name in _OUTPUTS if options.overwrite else ():
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    if not any((out / f"checkpoint-{run}.pt").exists() for run in _RUNS):
        settings = settings_of(options, config)
        write_text(out / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    ticket, untouched = _search(setting, config)
    ticket.save(out / "ticket.safetensors")
    found = ticket.apply(_adapted(setting.build(), config))
    models = {"ticket": found}
    if options.controls:
        models["dense"] = _dense_control(setting)
        models["random"] = _random_control(setting, config)
    rows = {name: _judge(setting, model, test) for name, model in models.items()}
    missing = draw(*(partial(_show, setting, name, model) for name, model in models.items()))
    report = _facts(setting, ticket) | {
        "weights_untouched": untouched,
        "rows": rows,
        "test_split": _floor(setting, test),
        "distance_ratio": _ratio(rows),
        "seconds": round(sum(row["seconds"] for row in _rows(setting)), 3),
        **circumstances(options),
        "config": settings_of(options, config),
        "missing": missing,
    }
    write_json(out / "report.json", report)
    for run in _RUNS:  # last: until here a rerun continues from them
        (out / f"checkpoint-{run}.pt").unlink(missing_ok=True)
    return report


def _facts(setting: _Setting, ticket: Ticket) -> dict[str, Any]:
    """What a report says of the search and of its ticket's size."""
    options, info = setting.options, ticket.info()
    return {
        "experiment": options.experiment,
        "method": options.method,
        "dataset": setting.dataset.name,
        "generator": options.generator,
        "extractor": options.extractor,
        "features": setting.real.mean.numel(),
        "seed": options.seed,
        **{key: info[key] for key in ("density", "kept", "weights", "dense_bytes")},
        "ticket_bytes": info["file_bytes"],
    }


def generative_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of what a report says to people."""
    labels = {"ticket": "ticket", "dense": "dense, trained", "random": "random masks"}
    lines = []
    for name, row in report["rows"].items():
        text = f"moment distance {row['distance']:.4f}, Frechet {row['frechet']:.2f}"
        if row["classes"] is not None:
            seen = sum(count > 0 for count in row["classes"])
            text += f", {seen} classes, {100 * row['sure']:.1f} % sure"
        lines.append((labels[name], text))
    dense, size = format_bytes(report["dense_bytes"]), format_bytes(report["ticket_bytes"])
    floor, ratio = report["test_split"], report["distance_ratio"]
    return [
        *lines,
        (
            "test pictures",
            f"moment distance {floor['distance']:.4f}, Frechet {floor['frechet']:.2f}",
        ),
        *([("ticket / dense", f"{ratio:.3f} of the moment distance")] if ratio else []),
        ("kept", format_kept(report)),
        ("size", f"{size}, dense weights {dense}"),
        ("training", f"{report['seconds']:.1f} s with {report['threads']} threads"),
    ]


def _ratio(rows: dict[str, dict[str, Any]]) -> float | None:
    return rows["ticket"]["distance"] / rows["dense"]["distance"] if "dense" in rows else None


# Data and judgement -----------------------------------------------------------------------------


def _prepare(options: GenerativeOptions) -> tuple[_Setting, Tensor]:
    """The setting, and what ``pooled`` shows of the test pictures."""
    dataset = load_dataset(options.dataset, options.data, download=options.download, val_fraction=0)
    if not isinstance(dataset.train, Split):
        raise ValueError(f"dataset: {dataset.name}: need one that fits in memory")
    where = {"file": options.extractor_file, "data": options.data, "seed": options.seed}
    extractor = build_extractor(options.extractor, dataset.in_shape, **where).to(options.device)
    real = moments_of(flat(shown) for shown, _ in _shown(dataset, extractor, dataset.train.x))
    setting = _Setting(options, dataset, extractor, real, {})
    setting.build()  # a shape that cannot be built raises before anything is written
    return setting, _pooled_of(dataset, extractor, dataset.test.x)


@torch.no_grad()
def _shown(
    dataset: Dataset, extractor: Extractor, x: Tensor
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The extractor's answers to a split's normalised pictures ``x``."""
    mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (dataset.mean, dataset.std))
    for part in x.split(_BATCH):
        yield extractor((part * std + mean).clamp(0, 1).to(extractor.mean.device))


def _pooled_of(dataset: Dataset, extractor: Extractor, x: Tensor) -> Tensor:
    return torch.cat([pooled(shown) for shown, _ in _shown(dataset, extractor, x)])


def _floor(setting: _Setting, test: Tensor) -> dict[str, float]:
    """What real pictures that were not matched come to."""
    data, extractor = setting.dataset, setting.extractor
    moments = moments_of(flat(shown) for shown, _ in _shown(data, extractor, data.test.x))
    train = _pooled_of(data, extractor, data.train.x[: setting.options.samples])
    return {
        "distance": moment_distance(moments, setting.real),
        "frechet": frechet_distance(train, test),
    }


def _show(setting: _Setting, name: str, model: nn.Module) -> None:
    """Pictures of the same latents for every model, as a grid."""
    with torch.no_grad():
        pictures = _pictures(model.eval(), setting.latents("show", 0, _GRID))
    plot_samples(pictures, setting.options.out / _PICTURES[name])


def _pictures(model: nn.Module, z: Tensor) -> Tensor:
    """In [0, 1], for the extractor."""
    return (model(z) + 1) / 2


@torch.no_grad()
def _generated(
    setting: _Setting, model: nn.Module, count: int
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The extractor's answers to ``count`` pictures of ``model`` in eval mode; its mode is put
    back at the end."""
    training = model.training
    model.eval()
    for i, first in enumerate(range(0, count, _BATCH)):
        z = setting.latents("judge", i, min(_BATCH, count - first))
        yield setting.extractor(_pictures(model, z))
    model.train(training)


def _distance(setting: _Setting, model: nn.Module, count: int) -> float:
    moments = moments_of(flat(shown) for shown, _ in _generated(setting, model, count))
    return moment_distance(moments, setting.real)


def _judge(setting: _Setting, model: nn.Module, test: Tensor) -> dict[str, Any]:
    """A row of the report: distances over ``samples`` pictures, classes of the first 1,000."""
    last, logits = [], []

    def kept() -> Iterator[Tensor]:
        for shown, answer in _generated(setting, model, setting.options.samples):
            last.append(pooled(shown))
            logits.append(answer)
            yield flat(shown)

    distance = moment_distance(moments_of(kept()), setting.real)
    row = {"distance": distance, "frechet": frechet_distance(torch.cat(last), test)}
    if setting.extractor.classes is None:
        return row | {"classes": None, "sure": None}
    chances = torch.cat(logits)[:_JUDGED].softmax(1)
    counts = chances.argmax(1).bincount(minlength=setting.extractor.classes)
    sure = (chances.amax(1) > _SURE).double().mean()
    return row | {"classes": counts.tolist(), "sure": sure.item()}


# Search and controls ----------------------------------------------------------------------------


def _search(setting: _Setting, config: Any) -> tuple[Ticket, bool]:
    """The ticket, and whether every weight still is what its seed gave."""
    options = setting.options
    model = _adapted(setting.build(), config)
    sparsify_(model, config)
    _train(setting, model, "ticket", options.lr, config)
    if complete := getattr(config, "complete", None):
        complete(model)  # may change the masks
    _settle(setting, model)
    untouched = all(
        torch.equal(m.weight, m.recipe.weight(m.weight_shape, m.dtype, m.weight.device))
        for m in model.modules()
        if isinstance(m, SparseModule | ScoreLayer)
    )
    tickets_(model)
    shape = list(setting.dataset.in_shape)
    made = {"name": options.generator, "latent": options.latent, "width": options.width}
    extra = {"generator": made | {"in_shape": shape}, "data": setting.dataset.name}
    extra |= {"extractor": options.extractor, "seed": options.seed}
    return Ticket.from_model(model, config=config, extra=extra), untouched


@torch.no_grad()
def _settle(setting: _Setting, model: nn.Module) -> None:
    """Give batch norms statistics of the model as it is now, averaged over new latents: those of
    training lag behind it."""
    norms = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    model.train()
    for i in range(_SETTLE if norms else 0):
        model(setting.latents("settle", i, setting.options.batch_size))
    for norm, momentum in norms.items():
        norm.momentum = momentum
    model.eval()


def _adapted(model: nn.Module, config: Any) -> nn.Module:
    if adapt := getattr(config, "adapt", None):
        adapt(model)
    return model


def _dense_control(setting: _Setting) -> nn.Module:
    """A generator of the ticket's shape, its weights trained under the same loss and budget."""
    model = setting.build()
    _train(setting, model, "dense", setting.options.dense_lr)
    _settle(setting, model)
    return model


@torch.no_grad()
def _random_control(setting: _Setting, config: Any) -> nn.Module:
    """The ticket's weights under random masks of its density: the best of some, by their moments.

    They are drawn layer by layer.
    """
    best, least = None, math.inf
    same = {name: getattr(config, name) for name in ("density", "weights", "init", "scale")}
    for draw_number in range(setting.options.random_masks):
        model = setting.build()
        sparsify_(model, EdgePopup(seed=config.seed, **same))
        to_form_(model, "masked")
        for name, m in model.named_modules():
            if isinstance(m, SparseModule):
                stream = f"{name}.{draw_number}"
                m.mask = random_mask(config.seed, stream, m.weight_shape, m.mask.kept)
        _settle(setting, model)
        distance = _distance(setting, model, setting.options.samples // _GLANCE)
        if distance < least:
            best, least = model, distance
    if best is None:
        raise FloatingPointError("no random mask gave a finite moment distance")
    return best


def _train(setting: _Setting, model: nn.Module, run: str, lr: float, config: Any = None) -> None:
    """Match the moments: of the scores for a converted ``model``, else of its weights."""
    options = setting.options
    model.train()
    recipe = Recipe(epochs=options.epochs, optimizer="adam", lr=lr, weight_decay=0.0)
    state = LoopState(model, _optimizer(model, lr, options.betas), recipe)
    matcher = MomentMatcher(setting.real, options.moment_lr, options.betas)
    path = options.out / f"checkpoint-{run}.pt"
    description = settings_of(options, config) | {"run": run, "data": setting.dataset.name}
    with contextlib.ExitStack() as stack:
        for hook in keep_masks(state, config):
            stack.callback(hook.remove)
        if path.exists():
            saved = load_checkpoint(path, description)
            restore(state, saved, options.device)
            matcher.load_state_dict(saved["matcher"])
        setting.log[run] = state.history
        bar = stack.enter_context(Progress(run, recipe.epochs, done=state.epoch))
        while state.epoch < recipe.epochs:
            if hasattr(config, "before_epoch"):
                config.before_epoch(model, state.epoch, recipe.epochs)
            row = {"run": run} | _run_epoch(setting, state, matcher)
            state.history.append(row)
            state.epoch += 1
            bar.show(row, f"loss {row['loss']:.4f}, moment distance {row['distance']:.4f}")
            write_logs(options.out, _rows(setting), _COLUMNS)
            content = snapshot(state, options.device) | {"matcher": matcher.state_dict()}
            save_checkpoint(path, description, content)


def _rows(setting: _Setting) -> list[dict[str, Any]]:
    """Of the log, so far."""
    return [row for rows in setting.log.values() for row in rows]


def _run_epoch(setting: _Setting, state: LoopState, matcher: MomentMatcher) -> dict[str, Any]:
    start, options = time.perf_counter(), setting.options
    lr = state.recipe.lr_at(state.epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    before, total = masks_of(state.model), 0.0
    for _ in range(options.steps):
        z = setting.latents("train", state.step, options.batch_size)
        state.optimizer.zero_grad()
        loss = matcher.loss(setting.extractor.features(_pictures(state.model, z)))
        loss.backward()
        state.optimizer.step()  # of scores: with their masks
        state.step += 1
        total += loss.item()
    if not math.isfinite(total):
        raise FloatingPointError(
            f"training diverged in epoch {state.epoch + 1}: the loss is {total}; lower lr "
            f"(now {lr:g})"
        )
    changed = sum(mask.distance(before[name]) for name, mask in masks_of(state.model).items())
    weights = sum(mask.numel for mask in before.values())
    return {
        "epoch": state.epoch + 1,
        "lr": lr,
        "loss": total / options.steps,
        "distance": _distance(setting, state.model, options.samples // _GLANCE),
        "mask_change": changed / weights if weights else None,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _optimizer(model: nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Adam; for layers that are selected by their scores, the one that selects while it steps."""
    if any(isinstance(m, SparseModule) for m in model.modules()):
        return PopupAdamW(model, lr=lr, betas=betas, weight_decay=0.0)
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, betas)
