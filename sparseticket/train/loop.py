"""The training loop: searches for tickets, and the dense control that runs through the same code.

Nothing here is needed to use the library: ``sparsify_``, ``PopupSGD`` and ``Ticket`` serve a loop
of your own. The recipe is that of hidden-networks: cosine per epoch,
lr(e) = lr/2 * (1 + cos(pi e/E)).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..io import Ticket
from ..masks import PackedMask
from ..nn import (
    Report,
    ScoreLayer,
    SparseModule,
    Superposed,
    attach,
    sparsify_,
    tickets_,
    update_masks,
)
from ..optim import PopupAdamW, PopupSGD
from ..prng import check_seed
from .checkpoint import load_checkpoint, save_checkpoint
from .report import Progress, write_logs

__all__ = [
    "Callback",
    "LoopState",
    "Recipe",
    "SearchResult",
    "TrainResult",
    "check_device",
    "evaluate",
    "keep_masks",
    "masks_of",
    "option",
    "restore",
    "search",
    "snapshot",
    "train_dense",
    "validation",
]

Batches = Iterable[tuple[Tensor, Tensor]]


def option(default: Any, text: str) -> Any:
    """A dataclass field with the help text that the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """How to train: what is optimised is the caller's business."""

    epochs: int = option(30, "passes over the training data")
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = option(
        "sgd", "SGD with momentum, Adam, AdamW, or RMSProp"
    )
    lr: float = option(0.1, "learning rate at its highest")
    momentum: float = option(0.9, "of SGD")
    weight_decay: float = option(1e-4, "on the scores (or weights, in a dense control)")
    schedule: Literal["cosine", "constant"] = option("cosine", "learning rate, set per epoch")
    warmup_epochs: int = option(0, "epochs of linear warm-up before the schedule")
    label_smoothing: float = option(0.0, "of the cross-entropy, in [0, 1)")
    amp: bool = option(False, "run layers in bfloat16 by autocast; scores stay float32")
    select: Literal["last", "best"] = option(
        "last", "keep the last epoch, or the best by validation accuracy"
    )

    def __post_init__(self) -> None:
        accepted = {
            "epochs": (self.epochs >= 0, "at least 0"),
            "optimizer": (
                self.optimizer in ("sgd", "adam", "adamw", "rmsprop"),
                "sgd, adam, adamw or rmsprop",
            ),
            "lr": (0 <= self.lr < math.inf, "a finite number, at least 0"),
            "momentum": (0 <= self.momentum < 1, "a number in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a finite number, at least 0"),
            "schedule": (self.schedule in ("cosine", "constant"), "cosine or constant"),
            "warmup_epochs": (0 <= self.warmup_epochs <= self.epochs, "0 to epochs"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "a number in [0, 1)"),
            "select": (self.select in ("last", "best"), "last or best"),
        }
        for name, (fine, need) in accepted.items():
            if not fine:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, need {need}")

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1) / self.warmup_epochs
        if self.schedule == "constant":
            return self.lr
        done = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * done)) * self.lr


@dataclass
class LoopState:
    """What callbacks see. ``history`` has one row per finished epoch; ``step`` counts batches."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    epoch: int = 0
    step: int = 0
    loss: Tensor | None = None
    history: list[dict[str, float | int | None]] = field(default_factory=list)
    best: dict[str, Any] | None = None  # accuracy, epoch and state_dict, with select="best"


class Callback(Protocol):
    """Inherit and override what you need; an exception ends the run, which can be resumed."""

    def on_step_end(self, state: LoopState) -> None:
        """After the optimizer's step and the mask update of each batch."""

    def on_epoch_end(self, state: LoopState) -> None:
        """After validation, before the epoch is checkpointed."""


@dataclass(frozen=True)
class TrainResult:
    """``val_accuracy`` (a fraction) belongs to the epoch that was kept; None without validation."""

    model: nn.Module
    history: list[dict[str, float | int | None]]
    val_accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class SearchResult(TrainResult):
    """``report`` is sparsify_'s, or None if the model came with sparse layers."""

    ticket: Ticket
    report: Report | None


def search(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches | None,
    config: Any,
    *,
    epochs: int,
    optimizer: str = "sgd",
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    schedule: str = "cosine",
    warmup_epochs: int = 0,
    label_smoothing: float = 0.0,
    amp: bool = False,
    select: str = "last",
    device: str | torch.device = "cpu",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    checkpoint_every: int = 1,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Find a ticket in ``model``, in place; a dense model is first converted with ``config``,
    which for a model with sparse layers must be the config that made them.

    Trains every parameter that requires a gradient (the scores) and updates the masks after each
    step. Only ``val_loader`` is ever selected on, with ``select="best"``; it may be None.

    ``seed`` seeds torch's generators inside the call; outside they stay as they were. ``out`` is a
    folder for log.csv, log.jsonl and, every ``checkpoint_every`` epochs, checkpoint.pt: calling
    again with the same arguments and a freshly built model continues from there, bit for bit at
    the same thread count. ``extra`` goes into the ticket as it is.
    """
    recipe = Recipe(
        epochs=epochs,
        optimizer=optimizer,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup_epochs=warmup_epochs,
        label_smoothing=label_smoothing,
        amp=amp,
        select=select,
    )
    # All of it before the model changes.
    val_loader = _check_run(val_loader, recipe, device, seed, checkpoint_every)
    _check_converted(model, config)
    folder = Path(out) if out is not None else None
    stored = folder is not None and resume and (folder / "checkpoint.pt").exists()
    if stored and not masks_of(model):
        trial = copy.deepcopy(model)
        _convert(trial, config)
        description = _description(trial, train_loader, recipe, config, extra, seed)
        load_checkpoint(folder / "checkpoint.pt", description)
    report = _convert(model, config)
    result = _fit(
        model,
        train_loader,
        val_loader,
        recipe,
        describes=config,
        extra=extra,
        device=device,
        seed=seed,
        folder=folder,
        resume=resume,
        checkpoint_every=checkpoint_every,
        callbacks=callbacks,
        progress="search" if progress else None,
    )
    if complete := getattr(config, "complete", None):
        complete(result.model)
    tickets_(result.model)
    ticket = Ticket.from_model(result.model, config=config, extra=extra)
    return SearchResult(**vars(result), ticket=ticket, report=report)


def train_dense(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches | None,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> TrainResult:
    """The dense control: train the weights of ``model``, in place, through the same loop."""
    return _fit(
        model,
        train_loader,
        _check_run(val_loader, recipe, device, seed),
        recipe,
        describes=None,
        extra=None,
        device=device,
        seed=seed,
        folder=Path(out) if out is not None else None,
        resume=True,
        checkpoint_every=1,
        callbacks=callbacks,
        progress="dense" if progress else None,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Batches,
    device: str | torch.device = "cpu",
    amp: bool = False,
) -> tuple[float, float]:
    """``(accuracy, mean cross-entropy)`` in eval mode, as fractions; the mode is put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    correct, loss, count = 0, 0.0, 0
    try:
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with _autocast(device, amp):
                logits = model(x)
            loss += F.cross_entropy(logits.float(), y, reduction="sum").item()
            correct += int((logits.argmax(1) == y).sum())
            count += len(y)
    finally:
        for module, mode in training.items():
            module.training = mode
    if not count:
        raise ValueError("evaluate: loader: has no examples")
    return correct / count, loss / count


def validation(loader: Batches | None, recipe: Recipe) -> Batches | None:
    """The loader, or None if it has no batches; ValueError if the recipe cannot do without."""
    if loader is not None and hasattr(loader, "__len__") and len(loader) == 0:
        loader = None
    if recipe.select == "best" and loader is None:
        raise ValueError(
            "select='best' needs a validation loader; the test set is not for choosing"
        )
    return loader


def check_device(device: str | torch.device) -> None:
    """ValueError unless torch can put a tensor there."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch raises any of them
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: got {str(device)!r}, which torch refuses: {reason}") from error


def masks_of(model: nn.Module) -> dict[str, PackedMask]:
    """A copy of the mask of every sparse layer, by qualified name."""
    return {
        name: module.mask
        for name, module in model.named_modules()
        if isinstance(module, SparseModule | ScoreLayer | Superposed)
    }


def _fit(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches | None,
    recipe: Recipe,
    *,
    describes: Any,
    extra: Mapping[str, Any] | None,
    device: str | torch.device,
    seed: int,
    folder: Path | None,
    resume: bool,
    checkpoint_every: int,
    callbacks: Sequence[Callback],
    progress: str | None,
) -> TrainResult:
    """Train whatever requires a gradient; the one loop behind every public function here."""
    start = time.perf_counter()
    model.to(device)
    state = LoopState(model, _optimizer(model, recipe), recipe)
    description = _description(model, train_loader, recipe, describes, extra, seed)
    with _own_generators(device, seed), contextlib.ExitStack() as stack:
        for hook in keep_masks(state, describes):
            stack.callback(hook.remove)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if resume and (folder / "checkpoint.pt").exists():
                restore(state, load_checkpoint(folder / "checkpoint.pt", description), device)
            write_logs(folder, state.history)  # there also after no epoch
        bar = stack.enter_context(Progress(progress, recipe.epochs, done=state.epoch))
        before_epoch = getattr(describes, "before_epoch", None)
        while state.epoch < recipe.epochs:
            if before_epoch:
                before_epoch(model, state.epoch, recipe.epochs)
            row = _run_epoch(state, train_loader, val_loader, device, callbacks)
            state.history.append(row)
            state.epoch += 1
            _keep_best(state, describes)
            bar.show(row)
            for callback in callbacks:
                callback.on_epoch_end(state)
            if folder is not None:
                write_logs(folder, state.history)
                if state.epoch % checkpoint_every == 0 or state.epoch == recipe.epochs:
                    save_checkpoint(folder / "checkpoint.pt", description, snapshot(state, device))
    val_accuracy = state.history[-1]["val_accuracy"] if state.history else None
    if state.best is not None:
        model.load_state_dict(state.best["model"])
        val_accuracy = state.best["val_accuracy"]
    return TrainResult(model, state.history, val_accuracy, time.perf_counter() - start)


def keep_masks(state: LoopState, config: Any) -> list[torch.utils.hooks.RemovableHandle]:
    """Have every optimizer step followed by new masks: the config's own, or edge-popup's."""
    model, optimizer = state.model, state.optimizer
    if isinstance(optimizer, PopupSGD | PopupAdamW):
        update_masks(model)  # callers may have written the scores since the conversion
        return []
    if not any(isinstance(module, ScoreLayer) for module in model.modules()):
        scored = any(getattr(module, "form", None) == "scored" for module in model.modules())
        return [attach(model, optimizer)] if scored else []
    return config.attach(model, optimizer, lambda: state.step)


def _check_run(
    val_loader: Batches | None,
    recipe: Recipe,
    device: str | torch.device,
    seed: int,
    checkpoint_every: int = 1,
) -> Batches | None:
    """The loader as ``validation`` gives it; ValueError for what no run can start with."""
    check_seed(seed)
    check_device(device)
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: got {checkpoint_every}, need at least 1")
    return validation(val_loader, recipe)


def _convert(model: nn.Module, config: Any) -> Report | None:
    """The model made ready for ``config``, in place; None if its layers are sparse already."""
    if adapt := getattr(config, "adapt", None):
        adapt(model)
    return None if masks_of(model) else sparsify_(model, config)


def _check_converted(model: nn.Module, config: Any) -> None:
    """ValueError where ``config``, which the ticket will quote, is not what made the layers."""
    if hasattr(config, "bind"):
        config = config.bind(model)
    for name, module in model.named_modules():
        if isinstance(module, ScoreLayer) and module.rule != config:
            raise ValueError(
                f"config: the layer {name!r} was made with {module.rule}; build the model anew, or "
                "give the config that converted it"
            )
        if not isinstance(module, SparseModule) or not hasattr(config, "plan"):
            continue
        made = vars(module.options) | ({"seed": module.recipe.seed} if module.recipe else {})
        for key, value in (config.plan(name, module) or {}).items():
            if key in made and made[key] != value:
                raise ValueError(
                    f"config: {key} is {value!r}, the layer {name!r} was made with {made[key]!r}; "
                    "build the model anew, or give the config that converted it"
                )


def _run_epoch(
    state: LoopState,
    train_loader: Batches,
    val_loader: Batches | None,
    device: str | torch.device,
    callbacks: Sequence[Callback],
) -> dict[str, float | int | None]:
    start = time.perf_counter()
    recipe, model = state.recipe, state.model
    lr = recipe.lr_at(state.epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    for part in (train_loader, getattr(train_loader, "sampler", None)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(state.epoch)
    before = masks_of(model)
    model.train()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    count = 0
    for x, y in train_loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        state.optimizer.zero_grad()
        with _autocast(device, recipe.amp):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
        loss.backward()
        state.optimizer.step()  # of scores: with their masks
        state.step += 1
        state.loss = loss.detach()
        loss_sum += state.loss.double() * len(y)
        correct += (logits.detach().argmax(1) == y).sum()
        count += len(y)
        for callback in callbacks:
            callback.on_step_end(state)
    if not count:
        raise ValueError("train_loader: has no examples")
    train_loss = loss_sum.item() / count
    if not math.isfinite(train_loss):
        raise FloatingPointError(
            f"training diverged in epoch {state.epoch + 1}: the loss is {train_loss}; lower lr "
            f"(now {lr:g})"
        )
    val = evaluate(model, val_loader, device, recipe.amp) if val_loader is not None else None
    changed = sum(mask.distance(before[name]) for name, mask in masks_of(model).items())
    weights = sum(mask.numel for mask in before.values())
    return {
        "epoch": state.epoch + 1,
        "lr": lr,
        "train_loss": train_loss,
        "train_accuracy": correct.item() / count,
        "val_loss": val[1] if val else None,
        "val_accuracy": val[0] if val else None,
        "mask_change": changed / weights if weights else None,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: no parameter requires a gradient; there is nothing to train")
    settings = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adam":
        return torch.optim.Adam(trained, **settings)
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(trained, **settings)
    fused = _selects_while_stepping(model)
    if recipe.optimizer == "adamw":
        return PopupAdamW(model, **settings) if fused else torch.optim.AdamW(trained, **settings)
    settings["momentum"] = recipe.momentum
    return PopupSGD(model, **settings) if fused else torch.optim.SGD(trained, **settings)


def _selects_while_stepping(model: nn.Module) -> bool:
    """Whether the popup optimizers serve all sparse layers of this model."""
    modules = list(model.modules())
    scored = any(getattr(module, "form", None) == "scored" for module in modules)
    return scored and not any(isinstance(module, ScoreLayer) for module in modules)


def _autocast(device: str | torch.device, amp: bool) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp)


@contextlib.contextmanager
def _own_generators(device: str | torch.device, seed: int) -> Iterator[None]:
    """Torch's generators, seeded, for the block; the caller's states come back after it."""
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _keep_best(state: LoopState, config: Any) -> None:
    settled = getattr(config, "settled", lambda epoch, epochs: True)
    if state.recipe.select != "best" or not settled(state.epoch - 1, state.recipe.epochs):
        return
    accuracy = state.history[-1]["val_accuracy"]
    if state.best is None or accuracy > state.best["val_accuracy"]:
        tensors = copy.deepcopy(dict(state.model.state_dict()))
        state.best = {"val_accuracy": accuracy, "epoch": state.epoch, "model": tensors}


def _description(
    model: nn.Module,
    train_loader: Batches,
    recipe: Recipe,
    describes: Any,
    extra: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued."""
    config = dataclasses.asdict(describes) if dataclasses.is_dataclass(describes) else describes
    return {
        "method": getattr(describes, "name", None),
        "config": config,
        "recipe": dataclasses.asdict(recipe),
        "extra": extra,
        "seed": seed,
        "batches": len(train_loader) if hasattr(train_loader, "__len__") else None,
        "model": {name: list(t.shape) for name, t in model.state_dict().items()},
    }


def snapshot(state: LoopState, device: str | torch.device) -> dict[str, Any]:
    """What :func:`restore` needs to continue bit for bit."""
    cuda = torch.device(device).type == "cuda"
    return {
        "model": dict(state.model.state_dict()),
        "optimizer": state.optimizer.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "history": state.history,
        "best": state.best,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if cuda else None,
    }


def restore(state: LoopState, saved: dict[str, Any], device: str | torch.device) -> None:
    """Put a :func:`snapshot` back."""
    state.model.load_state_dict(saved["model"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.epoch, state.step = saved["epoch"], saved["step"]
    state.history, state.best = saved["history"], saved["best"]
    torch.set_rng_state(saved["rng"])
    if saved["cuda_rng"] is not None:
        torch.cuda.set_rng_state(saved["cuda_rng"], device)
