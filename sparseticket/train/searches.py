"""What ``sparseticket search --experiment NAME`` searches a ticket for, and what is done with the
file of such a ticket: ``check`` and ``export``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..io import Ticket, export_dense, export_onnx
from ..tickets import set_task
from .attention import (
    AttentionOptions,
    TextRecipe,
    attention_lines,
    decoder_example,
    decoder_trial,
    rebuild_decoder,
    run_attention,
)
from .checks import Trial, check_layers
from .experiments import (
    CLASSIFIER,
    CheckOptions,
    ExportOptions,
    SearchOptions,
    circumstances,
    classifier_example,
    classifier_trial,
    rebuild_classifier,
    run_search,
    search_lines,
)
from .generative import (
    GenerativeOptions,
    generative_lines,
    generator_example,
    generator_trial,
    rebuild_generator,
    run_generative,
)
from .loop import Recipe

__all__ = ["EXPERIMENTS", "Experiment", "check_ticket", "export_ticket", "get_experiment"]


@dataclass(frozen=True)
class Experiment:
    """One kind of search; the command line takes flags and YAML settings from it.

    ``parts``: frozen dataclasses whose fields are the flags besides the method's own. The first has
    at least ``experiment`` (its own name), ``method``, ``seed``, ``out`` and ``overwrite``.
    ``run``: called with one instance of each part and the method's config; writes into ``out`` and
    returns the report, whose ``missing`` names what could not be drawn.
    ``lines``: (label, text) pairs of a report, for people.
    ``describes``: the entries of a ticket file's ``extra`` from which the rest is made, by which
    the experiment's tickets are known.
    ``rebuild``: the model of such a ticket, with the ticket in it; ``example``: an input of it, a
    batch of two; ``trial``: how ``check`` judges it.
    """

    parts: tuple[type, ...]
    run: Callable[..., dict[str, Any]]
    lines: Callable[[dict[str, Any]], list[tuple[str, str]]]
    describes: frozenset[str]
    rebuild: Callable[[Ticket], nn.Module]
    example: Callable[[Ticket], Tensor]
    trial: Callable[[Ticket, CheckOptions], Trial]


EXPERIMENTS: dict[str, Experiment] = {
    "classification": Experiment(
        parts=(SearchOptions, Recipe),
        run=lambda *parts: run_search(*parts)[0],
        lines=search_lines,
        describes=CLASSIFIER,
        rebuild=rebuild_classifier,
        example=classifier_example,
        trial=classifier_trial,
    ),
    "attention": Experiment(
        parts=(AttentionOptions, TextRecipe),
        run=run_attention,
        lines=attention_lines,
        describes=frozenset({"decoder", "data"}),
        rebuild=rebuild_decoder,
        example=decoder_example,
        trial=decoder_trial,
    ),
    "generative": Experiment(
        parts=(GenerativeOptions,),
        run=run_generative,
        lines=generative_lines,
        describes=frozenset({"generator", "data", "extractor", "samples", "seed"}),
        rebuild=rebuild_generator,
        example=generator_example,
        trial=generator_trial,
    ),
}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name; ValueError with the known names for any other."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment: got {name!r}, known: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def check_ticket(path: Path, options: CheckOptions) -> dict[str, Any]:
    """A ticket file beside its controls, see :mod:`sparseticket.train.checks`."""
    ticket, experiment = _described(path)
    options.set_up()
    trial = experiment.trial(ticket, options)
    prepare = [trial.prepare] if options.norms == "estimated" else []
    return {
        "ticket": str(path),
        "method": ticket.meta["method"],
        **trial.facts,
        "seeds": options.seeds,
        "norms": options.norms,
        "shares": list(trial.shares),
        "rows": check_layers(trial.build, trial.score, options.seeds, *prepare),
        **circumstances(options),
    }


def export_ticket(path: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a ticket's model as a dense one that needs nothing of this library."""
    if options.out is None:
        raise ValueError("out: a file to write is needed: --out FILE")
    ticket, experiment = _described(path)
    model = experiment.rebuild(ticket)
    if ticket.planes and any(getattr(m, "kind", None) == "tasks" for m in model.modules()):
        set_task(model, options.task)
    elif options.task:
        raise ValueError(f"task: got {options.task}, the ticket has one task only")
    write = {"dense": export_dense, "onnx": export_onnx}[options.to]
    write(model, options.out, experiment.example(ticket))
    return {"out": str(options.out), "to": options.to, "bytes": options.out.stat().st_size}


def _described(path: Path) -> tuple[Ticket, Experiment]:
    """A ticket and the experiment that describes it; ValueError where none does."""
    ticket = Ticket.load(path)
    extra = ticket.meta["extra"] or {}
    for experiment in EXPERIMENTS.values():
        if experiment.describes <= extra.keys():
            return ticket, experiment
    raise ValueError(
        f"{path}: the ticket does not say which model and data it is for; build the model yourself "
        "and use Ticket.load(path).apply(model)"
    )
