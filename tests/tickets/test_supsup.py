"""SupSup: thresholds, independent tasks, mixtures, which task an input belongs to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.tickets.engine import live_layers


def _net():
    return nn.Sequential(
        *(nn.Linear(64, 200, bias=False), nn.ReLU(), nn.Linear(200, 200, bias=False), nn.ReLU()),
        nn.Linear(200, 30, bias=False),
    )


def _task(index):
    """Ten prototypes with noise, their 64 inputs in another order in every task."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(10, 64, generator=generator).sign()
    generator.manual_seed(1 + index)
    y = torch.randint(10, (512,), generator=generator)
    x = prototypes[y] + 0.5 * torch.randn(512, 64, generator=generator)
    return x[:, torch.randperm(64, generator=generator)], y


def _pairs(a, b):
    return [(m, n) for m, n in zip(a, b, strict=True) if isinstance(m, nn.Linear)]


@pytest.fixture(scope="module")
def found():
    models = []
    for task in range(4):
        x, y = _task(task)
        batches = list(zip(x.split(64), y.split(64), strict=True))
        config = st.SupSup(seed=3, task=task)
        settings = {"epochs": 12, **config.recipe, "lr": 3e-3}
        models.append(
            st.search(_net(), batches, None, config, seed=task, progress=False, **settings).model
        )
    return models


def test_threshold_masks_start_at_half():
    model = _net()
    st.sparsify_(model, st.SupSup())
    for layer in live_layers(model):
        assert torch.equal(layer.mask.to_dense(), layer.scores >= 0)
        assert 0.3 < layer.mask.density < 0.7


def test_topk_has_erdos_renyi_densities():
    model = _net()
    st.sparsify_(model, st.SupSup(rule="topk", factor=4))
    densities = [layer.mask.density for layer in live_layers(model)]
    sizes = [(200, 64), (200, 200), (30, 200)]
    expected = [min(0.5, 4 * (o + k) / (o * k)) for o, k in sizes]
    assert densities == pytest.approx(expected, abs=1e-3)


def test_tasks_share_weights_and_not_masks():
    nets = [_net() for _ in range(3)]
    for net, (seed, task) in zip(nets, ((1, 0), (1, 1), (2, 0)), strict=True):
        st.sparsify_(net, st.SupSup(seed=seed, task=task))
    a, b, c = (live_layers(net)[1] for net in nets)
    assert torch.equal(a.weight, b.weight) and not torch.equal(a.weight, c.weight)
    overlap = (a.mask & b.mask).kept / a.mask.numel
    assert overlap == pytest.approx(a.mask.density * b.mask.density, abs=0.03)


def test_superposition(found):
    singles = copy.deepcopy(found)
    model = st.superpose(copy.deepcopy(found))
    x = _task(0)[0][:32]
    for task, single in enumerate(singles):
        st.set_task(model, task)
        assert all(torch.equal(a.weight, b.weight) for a, b in _pairs(model, single))
        torch.testing.assert_close(model(x), single(x))
    st.set_task(model, torch.full((4,), 0.25))
    mean = sum(single[0].weight for single in singles) / 4
    torch.testing.assert_close(model[0].weight, mean)
    with pytest.raises(ValueError, match="task: got 4"):
        st.set_task(model, 4)
    other = _net()
    st.sparsify_(other, st.EdgePopup(seed=9))
    st.Ticket.from_model(other).apply(other_net := _net())
    with pytest.raises(ValueError, match="not a ticket of one recipe"):
        st.superpose([copy.deepcopy(singles[0]), other_net])


def test_a_ticket_holds_all_tasks(found, tmp_path):
    model = st.superpose(copy.deepcopy(found))
    ticket = st.Ticket.from_model(model)
    ticket.save(tmp_path / "tasks.safetensors")
    loaded = st.Ticket.load(tmp_path / "tasks.safetensors").apply(_net())
    assert ticket.info()["raw_bits"] == 4 * ticket.info()["weights"]
    x = _task(2)[0]
    for task in (2, 0):
        st.set_task(model, task)
        st.set_task(loaded, task)
        assert torch.equal(model(x), loaded(x))


@pytest.mark.parametrize("method", ["one-shot", "binary"])
def test_the_task_is_inferred(found, method):
    model = st.superpose(copy.deepcopy(found))
    for task in range(4):
        x, y = _task(task)
        assert st.infer_task(model, x[:128], method) == task
        assert (model(x).argmax(1) == y).float().mean() > 0.9
    with pytest.raises(ValueError, match="method: got 'oracle'"):
        st.infer_task(model, x, "oracle")
    with pytest.raises(ValueError, match="no layers of several tasks"):
        st.infer_task(_net(), x)
