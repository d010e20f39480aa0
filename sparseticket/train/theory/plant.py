"""T7: which methods find a planted ticket: in one shot, in several, without training weights."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...masks import PackedMask
from ...nn import sparsify_, update_masks
from ...optim import PopupSGD
from ...prng import permutation
from ...theory.er import effective_density
from ...theory.plant import TARGETS, Planted, mask_iou, plant
from ...tickets import EdgePopup, get_pruner, prune_
from ..loop import option
from .results import write_results

__all__ = ["Config", "run"]


_METHODS = ("magnitude", "random", "snip", "grasp", "synflow")
_DENSITIES = (0.5, 0.1)  # and the ticket's own


@dataclass(frozen=True)
class Config:
    """Sizes of the benchmark; the paper's are 10,000 samples, 10 rounds of 5 epochs, 10 and 25
    repetitions, depths 3, 5 and 10, and density .01 besides ours."""

    target: Literal["relu", "circle", "helix"] = option("circle", "the task")
    depth: int = option(5, "of network and target, input included")
    width: int = option(100, "of the hidden layers")
    samples: int = option(4000, "of which a tenth are for the test")
    batch: int = option(32, "samples per step")
    epochs: int = option(10, "of training after pruning, and of edge-popup")
    rounds: int = option(5, "of the multi-shot runs")
    round_epochs: int = option(4, "of training before each of those rounds")
    lr: float = option(1e-3, "of Adam")
    popup_lr: float = option(0.1, "of edge-popup's SGD")
    seeds: int = option(1, "planted networks")


def run(config: Config, out: Path) -> dict[str, Any]:
    """Tables ``planted`` (one row per network) and ``recovery`` (method, shots, density)."""
    tables: dict[str, list] = {"recovery": [], "planted": []}
    for seed in range(config.seeds):
        task = _Task(config, seed)
        tables["planted"].append(task.planted_row())
        tables["recovery"] += task.rows()
    return write_results("plant", out, config, tables, _draw)


def _draw(tables, figure) -> None:
    quality, overlap = figure.subplots(1, 2)
    rows = [row for row in tables["recovery"] if row["method"] != "planted ticket"]
    key = "accuracy" if "accuracy" in rows[0] else "mse"
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        for shots in dict.fromkeys(row["shots"] for row in rows if row["method"] == method):
            own = [r for r in rows if (r["method"], r["shots"]) == (method, shots)]
            mean = defaultdict(list)
            for row in own:
                mean[row["asked"]].append((row[key], row["iou"]))
            x = sorted(mean)
            label = f"{method}, {shots} shots" if shots > 1 else method
            style = {"color": f"C{i}", "ls": "--" if shots > 1 else "-", "marker": "o"}
            for axes, part in ((quality, 0), (overlap, 1)):
                y = [sum(v[part] for v in mean[d]) / len(mean[d]) for d in x]
                axes.plot(x, y, label=label, **style)
    known = [row[key] for row in tables["recovery"] if row["method"] == "planted ticket"]
    quality.axhline(sum(known) / len(known), color="grey", ls=":", label="planted ticket")
    quality.set(xscale="log", xlabel="density", ylabel=f"test {key}")
    overlap.set(xscale="log", xlabel="density", ylabel="IoU with the planted mask")
    quality.legend(fontsize=6)


class _Task:
    """One planted network and its data."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.name, self.seed = config, config.target, seed
        self.target = TARGETS[config.target](config.depth)
        self.planted: Planted = plant(self.target.network, config.width, seed=seed)
        x, y = self.target.sample(config.samples, seed=seed)
        held = config.samples // 10
        self.train, self.test = (x[held:], y[held:]), (x[:held], y[:held])
        self.loss = F.cross_entropy if self.target.classes else _scaled_mse

    def planted_row(self) -> dict[str, Any]:
        report = self.planted.report
        hidden = list(report["hiding_p"].values())[:-1]
        return {
            "seed": self.seed,
            "weights": report["weights"],
            "biases": report["biases"],
            "density": report["density"],
            "least_p_hidden": min(hidden),
            "p_output": list(report["hiding_p"].values())[-1],
        }

    def rows(self) -> list[dict[str, Any]]:
        found = [self._baseline()]
        for density in (*_DENSITIES, self.planted.report["density"]):
            for method in _METHODS:
                # random masks are the same in any number of rounds
                for rounds in (1,) if method == "random" else (1, self.config.rounds):
                    found.append(self._pruned(method, density, rounds))
            for anneal in ("none", "power"):
                found.append(self._popped(density, anneal))
        return found

    def _baseline(self) -> dict[str, Any]:
        quality = self._quality(self.planted.ticket())
        masks = self.planted.masks
        return self._row("planted ticket", 0, self.planted.report["density"], masks, quality)

    def _pruned(self, method: str, density: float, rounds: int) -> dict[str, Any]:
        """One shot: scores of the network as it was drawn. Several: trained, pruned, rewound."""
        config = get_pruner(method)(density=density, seed=self.seed)
        if not self.target.classes and hasattr(config, "temperature"):
            config = dataclasses.replace(config, temperature=1.0)
        if method != "synflow" or rounds > 1:
            config = dataclasses.replace(config, rounds=rounds)
        model = copy.deepcopy(self.planted.network)

        def before_round(model: nn.Module, round_: int) -> None:
            model.load_state_dict(self.planted.network.state_dict())  # which leaves the masks
            self._fit(model, self.config.round_epochs, draw=round_ + 1)

        before = before_round if rounds > 1 else None
        masks = prune_(model, config, self._scoring(), self.loss, before_round=before)
        model.load_state_dict(self.planted.network.state_dict())
        self._fit(model, self.config.epochs, draw=0)
        return self._row(method, rounds, density, masks, self._quality(model))

    def _popped(self, density: float, anneal: str) -> dict[str, Any]:
        """Edge-popup on the planted weights and biases, as weights of a constant input."""
        model = _with_ones(self.planted.network)
        drawn = [m.weight.detach().clone() for m in model if isinstance(m, nn.Linear)]
        method = EdgePopup(density=density, anneal=anneal, seed=self.seed)
        sparsify_(model, method)
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "scores")}
        with torch.no_grad():
            for layer, weight in zip(layers.values(), drawn, strict=True):
                layer.weight.copy_(weight)
        optimizer = PopupSGD(model, lr=self.config.popup_lr, momentum=0.9, weight_decay=5e-4)
        update_masks(model)
        for epoch in range(self.config.epochs):
            method.before_epoch(model, epoch, self.config.epochs)
            self._epoch(model, optimizer, draw=100 + epoch)
        masks = {
            planted: PackedMask.from_dense(layer.mask.to_dense()[:, :-1].contiguous())
            for planted, layer in zip(self.planted.masks, layers.values(), strict=True)
        }
        name = "edge-popup" if anneal == "none" else "edge-popup, annealed"
        return self._row(name, 0, density, masks, self._quality(model))

    def _fit(self, model: nn.Module, epochs: int, draw: int) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=self.config.lr)
        for epoch in range(epochs):
            self._epoch(model, optimizer, 1000 * draw + epoch)

    def _epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, draw: int) -> None:
        x, y = self.train
        order = torch.from_numpy(permutation(self.seed, self.name, len(x), draw=draw))
        for part in order.split(self.config.batch):
            optimizer.zero_grad()
            self.loss(model(x[part]), y[part]).backward()
            optimizer.step()

    def _scoring(self) -> list[tuple[Tensor, Tensor]]:
        """What scores are taken on: ten samples a class of the training set, or 100 in all."""
        x, y = self.train
        if not self.target.classes:
            return [(x[:100], y[:100])]
        chosen = torch.cat([(y == c).nonzero()[:10, 0] for c in range(self.target.classes)])
        return [(x[chosen], y[chosen])]

    @torch.no_grad()
    def _quality(self, model: nn.Module) -> dict[str, float]:
        """On the test set: accuracy, or the error after a scale per output fitted in training."""
        model.eval()
        output, y = model(self.test[0]), self.test[1]
        if self.target.classes:
            return {"accuracy": float((output.argmax(1) == y).float().mean())}
        scale = _least_squares(model(self.train[0]), self.train[1])
        return {"mse": float((output * scale - y).square().mean())}

    def _row(self, method, rounds, density, masks: Mapping[str, PackedMask], quality):
        kept, total = sum(m.kept for m in masks.values()), sum(m.numel for m in masks.values())
        chain = list(masks.values())
        return {
            "seed": self.seed,
            "method": method,
            "shots": rounds,
            "asked": density,
            "density": kept / total,
            "effective": effective_density(chain),
            "collapsed": sum(not mask.kept for mask in chain),
            "iou": mask_iou(masks, self.planted.masks),
            **quality,
        }


def _least_squares(output: Tensor, y: Tensor) -> Tensor:
    """The scale of every output dimension that brings it nearest to ``y``; 1 where it is 0."""
    square = output.square().sum(0)
    return torch.where(square > 0, (output * y).sum(0) / square.clamp(min=1e-38), 1.0)


def _scaled_mse(output: Tensor, y: Tensor) -> Tensor:
    """Squared error after the best scale of every output dimension; a ticket has one of its own."""
    return (output * _least_squares(output, y).detach() - y).square().mean()


class _Ones(nn.Module):
    """Appends a feature that is 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1), value=1.0)


def _with_ones(network: nn.Sequential) -> nn.Sequential:
    """The same function, biases as the weights of a constant feature."""
    layers = []
    for module in network:
        if isinstance(module, nn.Linear):
            wide = nn.Linear(module.in_features + 1, module.out_features, bias=False, device="meta")
            wide.weight = nn.Parameter(
                torch.cat([module.weight.detach(), module.bias.detach()[:, None]], 1)
            )
            layers += [_Ones(), wide]
        else:
            layers.append(module)
    return nn.Sequential(*layers)
