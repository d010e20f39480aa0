"""Controls of tickets, by hand, and the norms they are scored with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.nn import Plane, Superposed, WeightRecipe
from sparseticket.train.checks import CONTROLS, check_layers, estimate_norms


def test_planes_move_together_and_tasks_apart():
    outer = torch.zeros(4, 64, dtype=torch.bool)
    outer[:2] = True
    inner = outer.clone()
    inner[1] = False
    recipe = WeightRecipe.initial(3, "fc", "signed_constant", (4, 64))

    def planes(kind, control):
        masks = [outer, inner] if kind == "sum" else [inner, ~inner]
        given = [Plane(st.PackedMask.from_dense(mask)) for mask in masks]
        layer = Superposed.of(nn.Linear(64, 4, bias=False), recipe, kind, given)
        CONTROLS[control](layer, "fc", 7)
        return [mask.to_dense() for mask in layer.masks]

    for control in ("shuffled mask", "inverted mask"):
        first, second = planes("sum", control)
        assert int(first.sum()) == 128 and int(second.sum()) == 64
        assert bool((first | ~second).all())  # still nested
    assert torch.equal(planes("sum", "inverted mask")[0], ~outer)
    first, second = planes("tasks", "inverted mask")
    assert int(first.sum()) == 64 and not bool((first & inner).any())
    assert int(second.sum()) == 192 and bool((second | ~inner).all())


def test_norms_get_the_mean_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.LayerNorm(3))
    batches = [(3 * torch.randn(8, 5) + 1, None) for _ in range(4)]
    model(torch.randn(8, 5))
    estimate_norms(model, batches, "cpu")
    with torch.no_grad():
        features = [model[0](x) for x, _ in batches]
    torch.testing.assert_close(
        model[1].running_mean, torch.stack([f.mean(0) for f in features]).mean(0)
    )
    torch.testing.assert_close(
        model[1].running_var, torch.stack([f.var(0) for f in features]).mean(0)
    )
    assert model[1].momentum == 0.1 and not any(m.training for m in model.modules())


def test_nothing_to_check_is_said():
    with pytest.raises(ValueError, match="no ticket layers"):
        check_layers(lambda: nn.Linear(2, 2), lambda model: 0.0, 1)
    with pytest.raises(ValueError, match="seeds: got 0"):
        check_layers(lambda: nn.Linear(2, 2), lambda model: 0.0, 0)
