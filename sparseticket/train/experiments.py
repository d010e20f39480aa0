"""What the commands run: a search with its report, an evaluation, the demonstration.

These functions print nothing but progress (stderr); they return what ``cli.py`` prints.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from ..io import Ticket
from ..nn import sparsify_, to_form_
from ..tickets import METHODS, get_method
from ..tickets.engine import warn_of_collapse
from .checks import Trial, estimate_norms
from .data import Dataset, load_dataset, loaders
from .loop import (
    Recipe,
    SearchResult,
    check_device,
    evaluate,
    option,
    search,
    train_dense,
    validation,
)
from .models import MODELS, build_model
from .plots import plot_curves, plot_masks
from .report import format_bytes, format_kept, format_percent, versions, write_json, write_text
from .tasks import TasksResult, search_tasks, task_accuracy

__all__ = [
    "CLASSIFIER",
    "CheckOptions",
    "DemoOptions",
    "EvalOptions",
    "ExportOptions",
    "SearchOptions",
    "MachineOptions",
    "TaskOptions",
    "adapt",
    "check_out",
    "circumstances",
    "classifier_example",
    "classifier_trial",
    "draw",
    "evaluate_ticket",
    "given",
    "rebuild_classifier",
    "refuse",
    "run_demo",
    "run_search",
    "search_lines",
    "settings_of",
]

_DEFAULT_MODELS = {"digits": "mlp", "mnist": "lenet300", "cifar10": "conv4"}
_OUTPUTS = (
    *("checkpoint.pt", "config.yaml", "curve.png", "log.csv", "log.jsonl", "masks.png"),
    *("report.json", "ticket.safetensors"),
)
_DEMO_TICKETS = ((0.5, "none"), (0.1, "density"))  # (density, scale)


CLASSIFIER = frozenset({"model", "data"})  # what the file of a classifier's ticket describes


@dataclass(frozen=True)
class MachineOptions:
    """Where a command runs; none of it is written into a ticket."""

    data: Path | None = field(
        default=None, metadata={"help": "folder of the data files; else SPARSETICKET_DATA"}
    )
    download: bool = option(
        False, "let torchvision fetch missing mnist or cifar10 into that folder"
    )
    device: str = option("cpu", "torch device")
    threads: int | None = option(None, "CPU threads; default torch's. Part of reproducibility")
    workers: int = option(0, "processes that decode image folders")

    def set_up(self) -> None:
        """Check the device; give torch, and so every kernel, the number of threads asked for."""
        check_device(self.device)
        if self.workers < 0:
            raise ValueError(f"workers: got {self.workers}, need at least 0")
        if self.threads is None:
            return
        if self.threads < 1:
            raise ValueError(f"threads: got {self.threads}, need at least 1")
        torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class TaskOptions(MachineOptions):
    """What is learned."""

    dataset: str = option("digits", "digits, mnist, cifar10 or imagefolder:PATH")
    model: str | None = option(
        None, f"one of {', '.join(MODELS)}; default by data set, mlp for digits"
    )
    batch_size: int = option(64, "examples per step")
    val_fraction: float = option(0.1, "share of the training data held out for validation; 0: none")
    seed: int = option(0, "of weights, scores, order, split and augmentation")

    @property
    def model_name(self) -> str:
        """The model asked for, or the default of the data set."""
        return self.model or _DEFAULT_MODELS.get(self.dataset, "resnet18")


@dataclass(frozen=True)
class SearchOptions(TaskOptions):
    """All of a search but its method's own fields and the recipe's."""

    experiment: str = option("classification", "what the ticket is for; each has its own flags")
    method: str = option("edge-popup", f"one of {', '.join(METHODS)}")
    out: Path | None = field(default=None, metadata={"help": "folder for the results (required)"})
    overwrite: bool = option(False, "replace the results of an earlier run in that folder")
    finetune_epochs: int = option(
        0, "then also train the ticket's own weights so long, and report on that; it stays as it is"
    )
    finetune_lr: float = option(0.01, "learning rate of that, at its highest")

    @property
    def model_name(self) -> str:
        """The model asked for, or the default of the method or else of the data set."""
        return self.model or getattr(get_method(self.method), "model", None) or super().model_name


@dataclass(frozen=True)
class EvalOptions(MachineOptions):
    """Evaluation of a ticket file; model and data set come out of the file."""

    dataset: str | None = option(
        None, "another data set than the ticket's, e.g. imagefolder:PATH, or text, file:PATH"
    )
    batch_size: int | None = option(None, "default: that of the search")


@dataclass(frozen=True)
class CheckOptions(EvalOptions):
    """The controls of a ticket file."""

    seeds: int = option(5, "repetitions of each control")
    norms: Literal["estimated", "kept"] = option(
        "estimated", "controls' batch norms: from the training data, or the ticket's own"
    )
    extractor_file: Path | None = field(
        default=None,
        metadata={"help": "a generator's: the weights of its extractor; else under the data"},
    )
    samples: int | None = option(None, "a generator's: pictures to judge by; else as in its search")


@dataclass(frozen=True)
class ExportOptions:
    """Where a ticket's dense model goes."""

    to: Literal["dense", "onnx"] = option(
        "dense", "torch weights (.safetensors, .pt) or program (.pt2), or ONNX"
    )
    out: Path | None = field(default=None, metadata={"help": "the file to write (required)"})
    task: int = option(0, "of a ticket of several tasks, the one to export")


@dataclass(frozen=True)
class DemoOptions(TaskOptions):
    """The demonstration: two searches, two controls, two reloads."""

    out: Path = field(
        default=Path("demo_out"), metadata={"help": "folder for the results, replaced if there"}
    )
    epochs: int = option(30, "passes over the training data, of each search and of the control")
    dense_lr: float | None = option(
        None, "of the dense control; default 0.1 for mlp and lenet300, else 0.01"
    )


def run_search(
    options: SearchOptions, recipe: Recipe, config: Any
) -> tuple[dict[str, Any], SearchResult | TasksResult]:
    """Search, save and report into ``options.out``; returns the report and the search's result.

    An interrupted run continues when it is started again; a finished one is only replaced with
    ``overwrite``. The report names what could not be drawn under ``missing``.
    """
    out = check_out(options)
    options.set_up()
    dataset = _load(options)
    model = _build(options, dataset)
    train, val, _ = loaders(dataset, options.batch_size, options.seed, options.workers)
    val = validation(val, recipe)
    for name in _OUTPUTS if options.overwrite else ():
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    resolved = settings_of(options, config, recipe) | {"model": options.model_name}
    if not (out / "checkpoint.pt").exists():  # search refuses that of a run with other settings
        write_text(out / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
    if getattr(config, "tasks", 1) > 1:
        return _run_tasks(options, recipe, config, dataset, resolved)
    result = search(
        model,
        train,
        val,
        config,
        **dataclasses.asdict(recipe),
        device=options.device,
        seed=options.seed,
        out=out,
        extra=_extra(options, recipe, dataset),
    )
    result.ticket.save(out / "ticket.safetensors")
    test_accuracy, _ = _test(result.ticket, dataset, options.batch_size, options)
    missing = draw(
        lambda: plot_curves({config.name: result.history}, out / "curve.png"),
        lambda: plot_masks(result.ticket.masks, out / "masks.png"),
    )
    info = result.ticket.info()
    report = {
        "method": options.method,
        "dataset": dataset.name,
        "model": options.model_name,
        "seed": options.seed,
        "epochs": recipe.epochs,
        **{key: info[key] for key in ("density", "kept", "weights")},
        "val_accuracy": result.val_accuracy,
        "test_accuracy": test_accuracy,
        "dense_bytes": info["dense_bytes"],
        "ticket_bytes": info["file_bytes"],
        **{f"{part}_bits": info[f"{part}_bits"] for part in ("raw", "coded", "normalisation")},
        "not_weight_free": info["not_weight_free"],
        "collapsed": warn_of_collapse(list(result.ticket.masks.items())),
        **_fine_tune(options, recipe, dataset, result.ticket),
        "seconds": round(sum(row["seconds"] for row in result.history), 3),
        **circumstances(options),
        "config": resolved,
        "missing": missing,
    }
    write_json(out / "report.json", report)
    (out / "checkpoint.pt").unlink(missing_ok=True)  # last: until here a rerun continues from it
    return report, result


def search_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of what a report of :func:`run_search` says to people."""
    lines = [
        ("test accuracy", f"{format_percent(report['test_accuracy'])} ({report['dataset']})"),
        ("validation", format_percent(report["val_accuracy"])),
    ]
    for task, accuracy in enumerate(report.get("task_accuracies", ())):
        guess, reached = (
            report[key][task] for key in ("inferred_tasks", "inferred_task_accuracies")
        )
        text = f"{format_percent(accuracy)}, taken for {guess}: {format_percent(reached)}"
        lines.append((f"task {task}", text))
    if "finetuned_test_accuracy" in report:
        lines.append(("fine-tuned", format_percent(report["finetuned_test_accuracy"])))
    dense, size = format_bytes(report["dense_bytes"]), format_bytes(report["ticket_bytes"])
    return [
        *lines,
        ("kept", format_kept(report)),
        ("size", f"{size}, dense weights {dense}"),
        ("seconds", f"{report['seconds']:.1f} with {report['threads']} threads"),
    ]


def evaluate_ticket(path: Path, options: EvalOptions) -> dict[str, Any]:
    """Test accuracy of a ticket file: its model built anew, weights from seeds and masks alone."""
    ticket = Ticket.load(path)
    if not (ticket.meta["extra"] or {}).keys() >= CLASSIFIER:
        raise ValueError(
            f"{path}: the ticket does not say which model and data to classify; sparseticket check "
            "scores one of a generator or a language model; for another, build the model yourself "
            "and use Ticket.load(path).apply(model)"
        )
    options.set_up()
    dataset, batch_size = _data_of(ticket, options)
    accuracy, loss = _test(ticket, dataset, batch_size, options)
    return {
        "ticket": str(path),
        "method": ticket.meta["method"],
        **_identity(ticket, dataset),
        "test_accuracy": accuracy,
        "test_loss": loss,
        **circumstances(options),
    }


def classifier_trial(ticket: Ticket, options: CheckOptions) -> Trial:
    """By test accuracy; that of a ticket of several tasks is the mean over all of them, each with
    its own mask."""
    refuse(options, "a classifier", "extractor_file", "samples")
    dataset, batch_size = _data_of(ticket, options)
    train, _, test = loaders(dataset, batch_size, 0, options.workers)
    device, measure = options.device, "test accuracy"
    return Trial(
        build=lambda: rebuild_classifier(ticket).to(device),
        score=lambda model: {measure: task_accuracy(model, test, ticket, device)},
        prepare=lambda model: estimate_norms(model, train, device),
        facts=_identity(ticket, dataset),
        shares=(measure,),
    )


def rebuild_classifier(ticket: Ticket) -> nn.Module:
    """The model that a ticket describes, built anew, with the ticket in it."""
    described = ticket.meta["extra"]["model"]
    shapes = {"in_shape": tuple(described["in_shape"]), "num_classes": described["num_classes"]}
    return ticket.apply(adapt(build_model(described["name"], **shapes), ticket))


def classifier_example(ticket: Ticket) -> Tensor:
    """An input of that model."""
    return torch.zeros(2, *ticket.meta["extra"]["model"]["in_shape"])


def given(value: Any, otherwise: Any) -> Any:
    """``value``, but for None."""
    return otherwise if value is None else value


def refuse(options: CheckOptions, kind: str, *names: str) -> None:
    """ValueError where one of the options that a ticket of this ``kind`` has no use for is set."""
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: got {getattr(options, name)}, the ticket is of {kind}")


def _data_of(ticket: Ticket, options: EvalOptions) -> tuple[Dataset, int]:
    """The data set and the batch size that the options or else the ticket name."""
    data = ticket.meta["extra"]["data"]
    name = options.dataset or data["dataset"]
    if name == "imagefolder":
        if options.data is None:
            raise ValueError("data: the ticket was made on an image folder: give --data DIR")
        name = f"imagefolder:{options.data}"
    dataset = load_dataset(name, options.data, download=options.download, val_fraction=0)
    described = ticket.meta["extra"]["model"]
    shapes = (tuple(described["in_shape"]), described["num_classes"])
    if shapes != (dataset.in_shape, dataset.num_classes):
        raise ValueError(
            f"dataset: {dataset.name} has images {dataset.in_shape} and {dataset.num_classes} "
            f"classes, the ticket is for {shapes[0]} and {shapes[1]}"
        )
    return dataset, given(options.batch_size, data["batch_size"])


def _identity(ticket: Ticket, dataset: Dataset) -> dict[str, Any]:
    extra = ticket.meta["extra"]
    return {
        "dataset": dataset.name,
        "trained_on": extra["data"]["name"],
        "model": extra["model"]["name"],
        "examples": len(dataset.test),
    }


def run_demo(options: DemoOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Two controls, two tickets, and both tickets again in new processes, from their files alone.

    The report's ``rows`` are the table; ``same`` tells whether every reloaded ticket was exactly as
    accurate as when it was found. ``say`` is told what comes next.
    """
    options.set_up()
    options.out.mkdir(parents=True, exist_ok=True)
    dataset = _load(options)
    say("training the dense control")
    dense, histories = _dense_control(options, dataset)
    rows = [dense, _random_control(options, dataset)]
    missing = []
    for density, scale in _DEMO_TICKETS:
        label = f"ticket, density {density}"
        say(f"searching a {label}")
        shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(TaskOptions)}
        shared |= {"out": options.out / f"density-{density}", "overwrite": True}
        config = get_method("edge-popup")(density=density, scale=scale, seed=options.seed)
        report, result = run_search(SearchOptions(**shared), Recipe(epochs=options.epochs), config)
        say("loading it in a new process, from seed and masks alone")
        again = _evaluate_elsewhere(shared["out"] / "ticket.safetensors", options)
        row = {key: report[key] for key in ("test_accuracy", "kept", "weights", "seconds")}
        rows.append(
            {"what": label, "bytes": report["ticket_bytes"], "reloaded_accuracy": again} | row
        )
        histories[label] = result.history
        missing = report["missing"]
    levels = {rows[1]["what"]: rows[1]["test_accuracy"]}
    missing = missing or draw(lambda: plot_curves(histories, options.out / "curves.png", levels))
    report = {
        "dataset": dataset.name,
        "model": options.model_name,
        "seed": options.seed,
        "epochs": options.epochs,
        **circumstances(options),
        "rows": rows,
        "same": all(row["test_accuracy"] == row["reloaded_accuracy"] for row in rows[2:]),
        "missing": missing,
    }
    write_json(options.out / "report.json", report)
    return report


def _dense_control(
    options: DemoOptions, dataset: Dataset
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(its row of the table, {its label: its history})."""
    lr = options.dense_lr
    if lr is None:  # deep nets without normalisation diverge at 0.1
        lr = 0.1 if options.model_name in ("mlp", "lenet300") else 0.01
    train, val, test = loaders(dataset, options.batch_size, options.seed, options.workers)
    result = train_dense(
        _build(options, dataset),
        train,
        val,
        Recipe(epochs=options.epochs, lr=lr),
        device=options.device,
        seed=options.seed,
    )
    accuracy, _ = evaluate(result.model, test, options.device)
    state = result.model.state_dict().values()
    weights = sum(parameter.numel() for parameter in result.model.parameters())
    label = "dense, trained"
    row = {"what": label, "test_accuracy": accuracy, "kept": weights, "weights": weights}
    row |= {"bytes": sum(t.nbytes for t in state), "seconds": round(result.seconds, 3)}
    return row, {label: result.history}


def _random_control(options: DemoOptions, dataset: Dataset) -> dict[str, Any]:
    """The first ticket before its search: masks that rank random scores are random masks."""
    density, scale = _DEMO_TICKETS[0]
    model = _build(options, dataset)
    sparsify_(model, get_method("edge-popup")(density=density, scale=scale, seed=options.seed))
    ticket = Ticket.from_model(model, extra=_extra(options, None, dataset))
    accuracy, _ = _test(ticket, dataset, options.batch_size, options)
    info = ticket.info()
    row = {"what": f"random mask, density {density}", "test_accuracy": accuracy, "seconds": 0.0}
    return row | {"kept": info["kept"], "weights": info["weights"], "bytes": info["file_bytes"]}


def _evaluate_elsewhere(path: Path, options: DemoOptions) -> float:
    """Test accuracy of a ticket file according to ``sparseticket eval`` in a process of its own."""
    command = [sys.executable, "-m", "sparseticket", "eval", str(path), "--json"]
    command += ["--threads", str(torch.get_num_threads()), "--device", options.device]
    command += ["--dataset", options.dataset]
    command += ["--data", str(options.data)] if options.data else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)["test_accuracy"]


def _load(options: TaskOptions) -> Dataset:
    return load_dataset(
        options.dataset,
        options.data,
        download=options.download,
        val_fraction=options.val_fraction,
        seed=options.seed,
    )


def _build(options: TaskOptions, dataset: Dataset) -> nn.Module:
    """The dense model, its weights drawn from the seed; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return build_model(
            options.model_name, in_shape=dataset.in_shape, num_classes=dataset.num_classes
        )


def _test(
    ticket: Ticket, dataset: Dataset, batch_size: int, options: MachineOptions
) -> tuple[float, float]:
    """(accuracy, loss) of the ticket in a new model, as any other process will see it."""
    model = rebuild_classifier(ticket).to(options.device)
    return evaluate(model, loaders(dataset, batch_size, 0, options.workers)[2], options.device)


def _run_tasks(
    options: SearchOptions,
    recipe: Recipe,
    config: Any,
    dataset: Dataset,
    resolved: dict[str, Any],
) -> tuple[dict[str, Any], TasksResult]:
    """``run_search`` for a config of several tasks; without validation and checkpoints."""
    start = time.perf_counter()
    train, _, test = loaders(dataset, options.batch_size, options.seed, options.workers)
    result = search_tasks(
        lambda: _build(options, dataset),
        train,
        test,
        config,
        recipe,
        device=options.device,
        seed=options.seed,
        extra=_extra(options, recipe, dataset),
    )
    result.ticket.save(options.out / "ticket.safetensors")
    info = result.ticket.info()
    report = {
        "method": options.method,
        "dataset": dataset.name,
        "model": options.model_name,
        "seed": options.seed,
        "epochs": recipe.epochs,
        **{key: info[key] for key in ("density", "kept", "weights", "dense_bytes")},
        "val_accuracy": None,
        "test_accuracy": sum(result.accuracies) / config.tasks,
        "task_accuracies": result.accuracies,
        "inferred_task_accuracies": result.inferred_accuracies,
        "inferred_tasks": result.inferred,
        "ticket_bytes": info["file_bytes"],
        "seconds": round(time.perf_counter() - start, 3),
        **circumstances(options),
        "config": resolved,
        "missing": [],
    }
    write_json(options.out / "report.json", report)
    return report, result


def _fine_tune(
    options: SearchOptions, recipe: Recipe, dataset: Dataset, ticket: Ticket
) -> dict[str, float]:
    """Test accuracy once the weights of the ticket, under its mask, have been trained."""
    if not options.finetune_epochs:
        return {}
    model = adapt(_build(options, dataset), ticket)
    to_form_(ticket.apply(model), "masked")
    train, val, test = loaders(dataset, options.batch_size, options.seed, options.workers)
    changes = {"epochs": options.finetune_epochs, "lr": options.finetune_lr, "optimizer": "sgd"}
    changes |= {"warmup_epochs": 0, "select": "last"}
    tuned = dataclasses.replace(recipe, **changes)
    result = train_dense(model, train, val, tuned, device=options.device, seed=options.seed)
    return {"finetuned_test_accuracy": evaluate(result.model, test, options.device)[0]}


def adapt(model: nn.Module, ticket: Ticket) -> nn.Module:
    """``model``, after what the ticket's method does to an architecture before its search."""
    method = METHODS.get(ticket.meta["method"])
    if hasattr(method, "adapt"):
        method(**ticket.meta["config"]).adapt(model)
    return model


def _extra(options: TaskOptions, recipe: Recipe | None, dataset: Dataset) -> dict[str, Any]:
    """What a ticket says of its model and data: enough to build and test it, no path."""
    return {
        "model": {
            "name": options.model_name,
            "in_shape": list(dataset.in_shape),
            "num_classes": dataset.num_classes,
        },
        "data": {
            "dataset": options.dataset.partition(":")[0],
            "name": dataset.name,
            "val_fraction": options.val_fraction,
            "batch_size": options.batch_size,
        },
        "recipe": dataclasses.asdict(recipe) if recipe else None,
        "seed": options.seed,
    }


def check_out(options: Any) -> Path:
    """The folder ``out`` of a run's options; ValueError for none, or one with a finished run."""
    out = options.out
    if out is None:
        raise ValueError("out: a folder for the results is needed: --out DIR")
    if (out / "report.json").exists() and not options.overwrite:
        raise ValueError(f"out: {out} holds a finished run; choose another or give --overwrite")
    return out


def settings_of(*parts: Any) -> dict[str, Any]:
    """Every field of a run's dataclasses (None: no fields) but where its results go, for
    config.yaml."""
    fields: dict[str, Any] = {}
    for part in parts:
        fields |= {} if part is None else dataclasses.asdict(part)
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in fields.items()
        if key not in ("out", "overwrite")
    }


def circumstances(options: MachineOptions) -> dict[str, Any]:
    """What a report says of where it was made."""
    threads = torch.get_num_threads()
    return {"threads": threads, "device": options.device, "versions": versions()}


def draw(*pictures: Callable[[], None]) -> list[str]:
    """Draw; where matplotlib is missing, return the sentence that says so."""
    try:
        for picture in pictures:
            picture()
    except ImportError as error:
        return [str(error)]
    return []
