"""SynFlow: Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively
conserving synaptic flow", NeurIPS 2020, section 6: keep the largest w * dR/dw, R the sum of outputs
of the net with weights |w| for an input of ones. In a net without skips every layer's scores sum to
R. The paper takes 100 rounds; in one, layers collapse.

Deviations from the paper's code (ganguli-lab/Synaptic-Flow):

- biases and running means are 0 while scores are taken, so that R is a sum over paths and the
  conservation holds; there, biases are their magnitudes;
- scores are taken in float64 and divided by the largest: in float32 those of deep nets overflow;
- ties go to the lowest index; there, they can make a run quit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .engine import setting
from .pruning import Pruner, masked_layers

__all__ = ["SynFlow"]


@dataclass(frozen=True)
class SynFlow(Pruner):
    """Config of SynFlow, for :func:`~sparseticket.tickets.prune_`."""

    name: ClassVar[str] = "synflow"

    rounds: int = setting(100, "rounds in which the density falls, exponentially")

    def scores(self, model, batches, loss) -> dict[str, Tensor]:
        example = next(iter(batches), None)
        if example is None:
            raise ValueError("batches: got none, need one (x, y) pair for the shape of an input")
        flow = self.flow(model, example[0][:1])
        top = max((float(f.max()) for f in flow.values() if f.numel()), default=0.0) or 1.0
        return {name: (f / top).float() for name, f in flow.items()}

    def flow(self, model, x: Tensor) -> dict[str, Tensor]:
        """w * dR/dw of every masked layer, float64; of ``x`` only the shape counts."""
        twin = copy.deepcopy(model).double().eval()
        with torch.no_grad():
            for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
                kind = name.rpartition(".")[2]
                if kind in ("bias", "running_mean"):
                    tensor.zero_()
                elif tensor.is_floating_point():
                    tensor.abs_()
        layers = masked_layers(twin)
        weights = [layer.weight for layer in layers.values()]
        value = twin(torch.ones_like(x, dtype=torch.float64)).sum()
        found = torch.autograd.grad(value, weights)
        return {n: g * w.detach() for n, g, w in zip(layers, found, weights, strict=True)}
