"""Many tasks in one seed: SupSup's permuted pixels, one search each, one ticket for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..io import Ticket
from ..prng import permutation
from ..tickets import infer_task, set_task, superpose
from .loop import Batches, Recipe, evaluate, search

__all__ = ["Permuted", "TasksResult", "search_tasks", "task_accuracy"]


@dataclasses.dataclass(frozen=True)
class Permuted:
    """Batches whose pixels stand in a task's own order; task 0 leaves them as they are."""

    batches: Batches
    task: int
    seed: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = None
        for x, y in self.batches:
            if self.task and order is None:
                places = permutation(self.seed, f"task{self.task}", x[0].numel())
                order = torch.from_numpy(places)
            yield x if order is None else x.flatten(1)[:, order].view_as(x), y

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        for part in (self.batches, getattr(self.batches, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


@dataclasses.dataclass(frozen=True)
class TasksResult:
    """Test accuracies: each task's with its own mask, and with the mask that was inferred from
    one batch; which task each batch was taken for."""

    ticket: Ticket
    accuracies: list[float]
    inferred_accuracies: list[float]
    inferred: list[int]


def search_tasks(
    build: Callable[[], nn.Module],
    train: Batches,
    test: Batches,
    config: Any,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
    extra: Any = None,
) -> TasksResult:
    """A SupSup search for each of ``config.tasks`` tasks, then one model of all their masks.

    ``build`` makes the dense model anew. The ticket computes task 0 until ``set_task``.
    """
    models = []
    for task in range(config.tasks):
        one = dataclasses.replace(config, task=task, tasks=1)
        batches = Permuted(train, task, config.seed)
        settings = dataclasses.asdict(recipe) | {"device": device, "seed": seed}
        models.append(search(build(), batches, None, one, progress=progress, **settings).model)
    model = superpose(models)
    known, guessed, inferred = [], [], []
    for task in range(config.tasks):
        batches = Permuted(test, task, config.seed)
        set_task(model, task)
        known.append(evaluate(model, batches, device)[0])
        x, _ = next(iter(batches))
        inferred.append(infer_task(model, x.to(device), config.inference))
        guessed.append(evaluate(model, batches, device)[0])
    set_task(model, 0)
    ticket = Ticket.from_model(model, config=config, extra=extra)
    return TasksResult(ticket, known, guessed, inferred)


def task_accuracy(
    model: nn.Module, test: Batches, ticket: Ticket, device: str | torch.device
) -> float:
    """Test accuracy of a ticket's model; the mean over the tasks if it has several."""
    tasks, seed = _tasks_of(ticket)
    total = 0.0
    for task in range(tasks):
        if tasks > 1:
            set_task(model, task)
        total += evaluate(model, Permuted(test, task, seed), device)[0]
    return total / tasks


def _tasks_of(ticket: Ticket) -> tuple[int, int]:
    """(number of tasks, the seed of their pixels' orders)."""
    kinds = {entry.get("planes", {}).get("kind") for entry in ticket.meta["layers"].values()}
    config = ticket.meta["config"] or {}
    return (config["tasks"], config["seed"]) if "tasks" in kinds else (1, 0)
