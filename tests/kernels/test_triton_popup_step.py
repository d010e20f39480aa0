"""The CUDA body of popup_step: one launch for the scores, then select_mask."""

from __future__ import annotations

import pytest
import torch

from sparseticket import ops
from sparseticket.reference.popup_step import popup_step as reference
from tests.ops.test_popup_step import LAYOUTS, RULES, TRANSFORMS, _close, _inputs, _run

SHAPES = [(), (5,), (17, 63), (2, 64), (0, 5), (5, 0), (8, 3, 3, 3), (4, 70, 3, 2), (3, 2100)]


def _on(device, inputs):
    moved = [[None if t is None else t.to(device) for t in tensors] for tensors in inputs[:6]]
    return *moved, inputs[6]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rule", RULES)
def test_popup_step(device, on_cuda, launches, rule, transform):
    torch.manual_seed(0)
    for change in LAYOUTS:
        inputs = _on(device, _inputs(SHAPES, rule, change=change))
        inputs[0][2][0, :2] = torch.tensor([0.0, -0.0])
        kept = [s.numel() // 3 for s in inputs[0]]
        state = torch.zeros(len(SHAPES), 2, dtype=torch.int32, device=device)
        options = {**RULES[rule], "transform": transform}
        launches.clear()
        got = _run(lambda *a, **k: on_cuda(ops.popup_step, *a, **k), inputs, kept, state, **options)
        assert launches.count("_popup_step") == 1
        _close(got, _run(reference, inputs, kept, state, **options), transform, kept)


def test_global_selection(device, on_cuda):
    torch.manual_seed(0)
    inputs = _on(device, _inputs([(17, 63), (8, 3, 3, 3)], "momentum"))
    options = {**RULES["momentum"], "scope": "global", "min_keep": 7}
    state = torch.zeros(1, 2, dtype=torch.int32, device=device)
    got = _run(lambda *a, **k: on_cuda(ops.popup_step, *a, **k), inputs, [500], state, **options)
    expected = _run(reference, inputs, [500], state, **options)
    _close(got, expected, "abs", [500], "global", 7)


def test_errors(device, on_cuda):
    inputs = _on(device, _inputs([(5, 70)], "momentum"))
    state = torch.zeros(1, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="popup_step: scope: got 'net', accepted"):
        on_cuda(ops.popup_step, *inputs[:5], state, [9], *inputs[5:], 0.1, scope="net")
    with pytest.raises(ValueError, match="popup_step: grads: got 0 for 1 score tensors"):
        on_cuda(ops.popup_step, inputs[0], [], *inputs[2:5], state, [9], *inputs[5:], 0.1)
