"""What ``sparseticket search --experiment NAME`` searches a ticket for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .attention import AttentionOptions, TextRecipe, attention_lines, run_attention
from .experiments import SearchOptions, run_search, search_lines
from .generative import GenerativeOptions, generative_lines, run_generative
from .loop import Recipe

__all__ = ["EXPERIMENTS", "Experiment", "get_experiment"]


@dataclass(frozen=True)
class Experiment:
    """One kind of search; the command line takes flags and YAML settings from it.

    ``parts``: frozen dataclasses whose fields are the flags besides the method's own. The first has
    at least ``experiment`` (its own name), ``method``, ``seed``, ``out`` and ``overwrite``.
    ``run``: called with one instance of each part and the method's config; writes into ``out`` and
    returns the report, whose ``missing`` names what could not be drawn.
    ``lines``: (label, text) pairs of a report, for people.
    """

    parts: tuple[type, ...]
    run: Callable[..., dict[str, Any]]
    lines: Callable[[dict[str, Any]], list[tuple[str, str]]]


EXPERIMENTS: dict[str, Experiment] = {
    "classification": Experiment(
        (SearchOptions, Recipe), lambda *parts: run_search(*parts)[0], search_lines
    ),
    "attention": Experiment((AttentionOptions, TextRecipe), run_attention, attention_lines),
    "generative": Experiment((GenerativeOptions,), run_generative, generative_lines),
}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name; ValueError with the known names for any other."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment: got {name!r}, known: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
