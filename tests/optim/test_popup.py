from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparseticket as st

OPTIMIZERS = {
    "sgd": (
        lambda m: st.PopupSGD(m, lr=0.05, momentum=0.9, weight_decay=1e-4),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=1e-4),
    ),
    "nesterov": (
        lambda m: st.PopupSGD(m, lr=0.05, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    ),
    "plain": (
        lambda m: st.PopupSGD(m, lr=0.05, momentum=0.0),
        lambda ps: torch.optim.SGD(ps, lr=0.05),
    ),
    "adamw": (
        lambda m: st.PopupAdamW(m, lr=0.01),
        lambda ps: torch.optim.AdamW(ps, lr=0.01),
    ),
}
X, Y = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


def _model(keep_bias=True, **config):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(216, 10),
    )
    st.sparsify_(model, st.EdgePopup(density=0.4, keep_bias=keep_bias, affine=keep_bias, **config))
    return model


def _scored(model):
    return [m for m in model.modules() if getattr(m, "form", None) == "scored"]


def _train(model, optimizer, steps=5, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def _check_masks(model, scope, transform):
    scored = _scored(model)
    masks = st.select_mask(
        [m.scores.detach() for m in scored], density=0.4, scope=scope, transform=transform
    )
    for m, mask in zip(scored, masks, strict=True):
        assert m.mask == mask


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"scope": "global"},
        {"scope": "global", "min_keep_per_layer": 20},
        {"transform": "identity"},
        {"weights": "normal"},
        {"scope": "global", "scale": "dynamic"},
        {"keep_bias": False},
    ],
    ids=lambda c: "-".join(map(str, c.values())) or "default",
)
def test_five_steps_equal_torch_and_attach(optimizer, config):
    mine, theirs = _model(**config), _model(**config)
    popup, plain = OPTIMIZERS[optimizer]
    other = plain([p for p in theirs.parameters() if p.requires_grad])
    st.attach(theirs, other)
    _train(mine, popup(mine))
    _train(theirs, other)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(_scored(mine), _scored(theirs), strict=True):
        assert a.mask == b.mask
        assert a.recipe == b.recipe
    if not config.get("min_keep_per_layer"):
        _check_masks(mine, config.get("scope", "layer"), config.get("transform", "abs"))


def test_channels_last_and_schedulers():
    mine, theirs = (_model().to(memory_format=torch.channels_last) for _ in range(2))
    popup, plain = OPTIMIZERS["sgd"]
    ours, other = popup(mine), plain([p for p in theirs.parameters() if p.requires_grad])
    st.attach(theirs, other)
    for model, optimizer in ((mine, ours), (theirs, other)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        _train(model, optimizer, scheduler=schedule)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert ours.param_groups[0]["lr"] == other.param_groups[0]["lr"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_resume_is_bit_exact(optimizer, scope):
    popup, _ = OPTIMIZERS[optimizer]
    whole, first, second = (_model(scope=scope) for _ in range(3))
    _train(whole, popup(whole), 4)
    before = popup(first)
    _train(first, before, 2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    after = popup(second)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    _train(second, after, 2)
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("optimizer", "what"),
    [
        *(("sgd", what) for what in ("scores", "mask_words", "momentum_buffer")),
        *(("adamw", what) for what in ("scores", "mask_words", "exp_avg", "exp_avg_sq")),
    ],
)
def test_tensors_may_move_between_steps(optimizer, what, scope):
    """A step is bound to its tensors once and used for as long as they stay where they are."""
    popup, _ = OPTIMIZERS[optimizer]
    still, moved = (_model(scope=scope) for _ in range(2))
    ours = popup(moved)
    _train(still, popup(still), 4)
    for steps in (2, 1, 1):
        _train(moved, ours, steps)
        for module in _scored(moved):
            held = {"scores": module.scores, "mask_words": module.mask_words}
            t = (held | ours.state[module.scores])[what]
            old, t.data = t.data, t.data.clone()
            old.zero_()
    for (name, a), b in zip(still.state_dict().items(), moved.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_other_strides_and_parameters_are_seen():
    model = nn.Sequential(nn.Linear(8, 8))
    st.sparsify_(model, st.EdgePopup(density=0.4))
    optimizer, layer = st.PopupSGD(model, momentum=0.0), model[0]

    def step():
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()

    step()
    layer.scores = optimizer.param_groups[0]["params"][0] = nn.Parameter(layer.scores.data)
    st.update_masks(model)
    before = layer.scores._version
    step()
    assert layer.scores._version == before + 1
    layer.scores.data = layer.scores.data.t()
    st.update_masks(model)
    layer.scores.grad = None
    with pytest.raises(ValueError, match=r"scores: got strides \(1, 8\) for shape \(8, 8\)"):
        step()


def test_steps_that_are_not_used_go():
    model = _model()
    optimizer = st.PopupSGD(model)
    for left_out in (None, 0, 1, 2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        if left_out is not None:
            _scored(model)[left_out].scores.grad = None
        optimizer.step()
        assert len(optimizer._bound) == 1


def test_modes_see_the_step():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    model, watched = _model(), _model()
    ours, theirs = st.PopupSGD(model), st.PopupSGD(watched)
    for _ in range(2):
        _train(model, ours, 1)
        theirs.zero_grad()
        F.cross_entropy(watched(X), Y).backward()
        with Mode():
            theirs.step()
    assert seen.count(st.ops.popup_step) == 2
    for a, b in zip(_scored(model), _scored(watched), strict=True):
        assert torch.equal(a.scores, b.scores) and a.mask == b.mask


def test_raw_gradients_end_with_the_optimizer():
    model, plain = _model(), _model()
    F.cross_entropy(plain(X), Y).backward()
    optimizer = st.PopupSGD(model)
    F.cross_entropy(model(X), Y).backward()
    for m, p in zip(_scored(model), _scored(plain), strict=True):
        factor = m.weight * m.scores.sign()
        torch.testing.assert_close(m.scores.grad * factor, p.scores.grad)
        assert copy.deepcopy(m)._raw_grad_for is None
    later = st.PopupSGD(model)
    del optimizer
    gc.collect()
    assert all(m._raw_grad_for is not None for m in _scored(model))
    del later
    gc.collect()
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    for m, p in zip(_scored(model), _scored(plain), strict=True):
        assert torch.equal(m.scores.grad, p.scores.grad)


def test_other_weights_get_plain_gradients():
    for model in (_model(weights="uniform"), _model().bfloat16()):
        optimizer = st.PopupSGD(model)
        assert all(m._raw_grad_for is None for m in _scored(model))
        F.cross_entropy(model(X.to(model[0].dtype)).float(), Y).backward()
        optimizer.step()
        model(X.to(model[0].dtype))


def test_weights_that_left_their_seed_get_plain_gradients():
    ours, theirs = _model(), _model()
    optimizer = st.PopupSGD(ours, lr=0.05)
    for model in (ours, theirs):
        for module in _scored(model):
            with torch.no_grad():
                module.weight.neg_()
    _train(ours, optimizer, steps=2)
    plain = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.05, 0.9)
    st.attach(theirs, plain)
    _train(theirs, plain, steps=2)
    for a, b in zip(_scored(ours), _scored(theirs), strict=True):
        torch.testing.assert_close(a.scores, b.scores)
        assert a.mask == b.mask


def test_a_loaded_seed_changes_the_signs():
    model, other = _model(), _model(seed=7)
    optimizer = st.PopupSGD(model, lr=0.05)
    _train(model, optimizer, 1)
    model.load_state_dict(other.state_dict())
    optimizer.state.clear()
    theirs = st.PopupSGD(other, lr=0.05)
    _train(model, optimizer, 2)
    _train(other, theirs, 2)
    for a, b in zip(_scored(model), _scored(other), strict=True):
        assert torch.equal(a.scores, b.scores)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_without_gradients_stay(optimizer, scope):
    model = _model(scope=scope)
    ours = OPTIMIZERS[optimizer][0](model)
    _train(model, ours, 1)
    first, *others = _scored(model)
    for _ in range(2):
        ours.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        first.scores.grad = None
        before = first.scores.clone()
        ours.step()
        assert torch.equal(first.scores, before)
        _check_masks(model, scope, "abs")
    _train(model, ours, 1)  # now at different numbers of steps
    _check_masks(model, scope, "abs")
    assert others


def test_nan_raises_and_leaves_the_masks_stale():
    model = _model()
    optimizer = st.PopupSGD(model)
    F.cross_entropy(model(X), Y).backward()
    model[0].scores.grad[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="popup_step: scores: NaN in tensor 0"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="the scores changed after the mask was selected"):
        model(X)


def test_closures_and_single_modules():
    torch.manual_seed(0)
    layer = st.SparseLinear(64, 8, form="scored", density=0.5, seed=0)
    optimizer = st.PopupSGD([layer])
    assert len(optimizer.param_groups) == 1
    x = torch.randn(4, 64)

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    expected, before = closure().detach(), layer.scores.clone()
    assert torch.equal(optimizer.step(closure), expected)
    assert not torch.equal(layer.scores, before)
    layer(x)


def test_compiled_model():
    torch.manual_seed(0)
    eager, compiled = (st.SparseLinear(64, 8, form="scored", density=0.5, seed=0) for _ in range(2))
    x, made = torch.randn(4, 64), []
    for layer in (eager, compiled):
        optimizer = st.PopupSGD(layer)
        forward = layer if layer is eager else torch.compile(layer, backend="aot_eager")
        for _ in range(3):
            optimizer.zero_grad()
            forward(x).square().sum().backward()
            optimizer.step()
        made.append(layer.scores)
    assert torch.equal(*made)


def test_errors():
    layer = st.SparseLinear(8, 8, form="scored", density=0.5, seed=0)
    for make in (st.PopupSGD, st.PopupAdamW):
        with pytest.raises(ValueError, match=f"{make.__name__}: model: no module is in form"):
            make(nn.Linear(3, 3))
        with pytest.raises(TypeError, match=f"{make.__name__}: model: got a Parameter, need"):
            make(layer.parameters())
        with pytest.raises(ValueError, match=f"{make.__name__}: lr: got -1, need"):
            make(layer, lr=-1)
    with pytest.raises(ValueError, match="nesterov: got True with momentum 0"):
        st.PopupSGD(layer, momentum=0.0, nesterov=True)
    with pytest.raises(ValueError, match="betas: got"):
        st.PopupAdamW(layer, betas=(0.9, 1.0))
