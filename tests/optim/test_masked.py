from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseticket as st
from sparseticket.nn import tuning

OPTIMIZERS = {
    "sgd": (
        lambda m, **o: st.MaskedSGD(m, lr=0.05, momentum=0.9, weight_decay=1e-2, **o),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=1e-2),
    ),
    "nesterov": (
        lambda m, **o: st.MaskedSGD(m, lr=0.05, momentum=0.9, nesterov=True, **o),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    ),
    "plain": (
        lambda m, **o: st.MaskedSGD(m, lr=0.05, momentum=0.0, **o),
        lambda ps: torch.optim.SGD(ps, lr=0.05),
    ),
    "adamw": (
        lambda m, **o: st.MaskedAdamW(m, lr=0.01, **o),
        lambda ps: torch.optim.AdamW(ps, lr=0.01),
    ),
}
X, Y = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


def _model():
    torch.manual_seed(0)
    return nn.Sequential(
        st.SparseConv2d(3, 8, 3, padding=1, bias=False, density=0.4, seed=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        st.SparseConv2d(8, 6, 3, groups=2, density=0.4, seed=2),
        nn.Flatten(),
        nn.ReLU(),
        st.SparseLinear(216, 10, density=0.2, seed=3),
    )


def _masked(model):
    return [m for m in model if getattr(m, "form", None) == "masked"]


def _train(model, optimizer, steps=5, scheduler=None, autocast=None):
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(model(X).float(), Y)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def _close(mine, theirs):
    """Live weights and everything else within a few roundings of five steps."""
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        if a.ndim > 1:
            continue
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    for a, b in zip(_masked(mine), _masked(theirs), strict=True):
        live = a.mask.to_dense()
        torch.testing.assert_close(a.weight[live], b.weight[live], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("raw_grad", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_torch(name, raw_grad):
    mine = _model()
    theirs, start = copy.deepcopy(mine), copy.deepcopy(mine)
    make, torchs = OPTIMIZERS[name]
    optimizer = make(mine, raw_grad=raw_grad)
    _train(mine, optimizer)
    _train(theirs, torchs(theirs.parameters()))
    _close(mine, theirs)
    for m, before in zip(_masked(mine), _masked(start), strict=True):
        dead = ~m.mask.to_dense()
        assert torch.equal(m.weight[dead], before.weight[dead])
        assert bool(m.weight.grad[dead].any()) == raw_grad
        for key, state in optimizer.state[m.weight].items():
            assert key == "step" or not state[dead].any()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_new_mask(name):
    """What dies keeps its value and loses its state; what is born starts with none."""
    model = _model()
    layer = model[6]
    optimizer = OPTIMIZERS[name][0](model)
    _train(model, optimizer, 2)
    old = layer.mask.to_dense()
    layer.mask = st.random_mask(7, "new", (10, 216), kept=old.sum().item()).to_dense()
    new, before = layer.mask.to_dense(), layer.weight.detach().clone()
    born, died = new & ~old, old & ~new
    assert born.any() and died.any()
    states = [v for k, v in optimizer.state[layer.weight].items() if k != "step"]
    assert not any(s[born].any() for s in states)
    _train(model, optimizer, 1)
    assert torch.equal(layer.weight[died], before[died])
    assert not any(s[~new].any() for s in states)
    assert bool((layer.weight[born] != before[born]).any())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume(name):
    make = OPTIMIZERS[name][0]
    model = _model()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    _train(model, optimizer, 3, scheduler)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    _train(model, optimizer, 3, scheduler)
    other = _model()
    again = make(other)
    rate = torch.optim.lr_scheduler.StepLR(again, 2)
    for holder, state in zip((other, again, rate), saved, strict=True):
        holder.load_state_dict(state)
    _train(other, again, 3, rate)
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_shadow():
    """Used under autocast to its dtype, to the same numbers; off once anyone else writes."""
    model, plain = _model(), _model()
    optimizer = st.MaskedSGD(model, lr=0.05, shadow=torch.bfloat16)
    _train(model, optimizer, 1)
    _train(plain, st.MaskedSGD(plain, lr=0.05), 1)
    layer = model[6]
    x = torch.randn(4, 216)

    def kernel():
        with torch.autocast("cpu", torch.bfloat16):
            return layer.explain(x).kernel

    assert kernel() == "shadow" and layer.explain(x).kernel != "shadow"
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(X), plain(X), rtol=2e-2, atol=2e-2)
        y = layer(x)
    assert torch.equal(y, F.linear(x.bfloat16(), layer.shadow, layer.bias.bfloat16()))
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert not layer.weight.grad[~layer.mask.to_dense()].any()
    assert "6.shadow" not in model.state_dict()
    assert "shadow" not in copy.deepcopy(layer)._buffers

    with torch.no_grad():
        layer.weight.mul_(2)
    assert kernel() != "shadow"
    _train(model, optimizer, 1, autocast=torch.bfloat16)
    assert kernel() == "shadow"
    layer.mask = st.random_mask(7, "new", (10, 216), kept=50).to_dense()
    assert kernel() != "shadow"
    _train(model, optimizer, 1)
    assert kernel() == "shadow"
    layer.load_state_dict(layer.state_dict())
    assert kernel() != "shadow"
    _train(model, optimizer, 1)
    del optimizer
    gc.collect()
    assert kernel() != "shadow"


def test_training_on_shadows_learns():
    model = _model()
    optimizer = st.MaskedSGD(model, lr=0.05, shadow=torch.bfloat16, raw_grad=True)
    _train(model, optimizer, 40, autocast=torch.bfloat16)
    assert F.cross_entropy(model(X), Y) < 0.5


def test_compiled_on_a_shadow():
    layer = st.SparseLinear(70, 5, density=0.4, seed=0)
    optimizer = st.MaskedSGD(layer, lr=0.05, shadow=torch.bfloat16)
    x = torch.randn(3, 70)
    layer(x).sum().backward()
    optimizer.step()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


def test_errors():
    with pytest.raises(ValueError, match="MaskedSGD: model: no module is in form 'masked'"):
        st.MaskedSGD(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="MaskedAdamW: model: got a str, need modules"):
        st.MaskedAdamW(["x"])
    layer = st.SparseLinear(7, 5, density=0.5, seed=0)
    with pytest.raises(TypeError, match=r"shadow: got torch\.float32, accepted"):
        st.MaskedSGD(layer, shadow=torch.float32)
    with pytest.raises(ValueError, match="MaskedSGD: nesterov: got True with momentum 0"):
        st.MaskedSGD(layer, momentum=0.0, nesterov=True)
    with pytest.raises(ValueError, match="MaskedAdamW: betas: got"):
        st.MaskedAdamW(layer, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="MaskedSGD: lr: got -1, need a number >= 0"):
        st.MaskedSGD(layer, lr=-1)
    half = st.SparseLinear(7, 5, density=0.5, seed=0, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"torch\.bfloat16 weights, need float32"):
        st.MaskedSGD(half)


def test_the_end_of_an_optimizer_leaves_what_others_stored(monkeypatch):
    """A module tuned after its training keeps its dense product when the optimizer goes."""
    monkeypatch.setattr(tuning, "_medians", lambda *_: [2.0, 1.0])
    layer, x = st.SparseLinear(70, 5, density=0.4, seed=0), torch.randn(3, 70)
    optimizer = st.MaskedSGD(layer, lr=0.05)
    layer(x).sum().backward()
    optimizer.step()
    st.tune(layer.eval(), x)
    del optimizer
    gc.collect()
    assert st.explain(layer, x).kernel == "shadow"
