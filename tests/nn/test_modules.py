"""Sparse modules: every form against the dense layer, freshness, state, conversion, refusals."""

from __future__ import annotations

import copy
import hashlib
import io
import math

import oracle
import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.formats import kept_count
from sparseticket.prng import round_bf16

FORMS = ("masked", "scored", "ticket")
LAYERS = {  # class, torch arguments, input shape
    "linear": (st.SparseLinear, {"in_features": 37, "out_features": 19}, (7, 37)),
    "conv": (st.SparseConv2d, {}, (2, 4, 9, 8)),
    "groups": (st.SparseConv2d, {"groups": 2, "stride": (2, 1), "padding": 1}, (2, 4, 9, 8)),
    "dilated": (st.SparseConv2d, {"dilation": (2, 1), "padding": (2, 1)}, (2, 4, 9, 8)),
    "same": (st.SparseConv2d, {"kernel_size": (4, 3), "padding": "same"}, (2, 4, 9, 8)),
    "valid": (st.SparseConv2d, {"padding": "valid", "bias": False}, (2, 4, 9, 8)),
    "reflect": (st.SparseConv2d, {"padding": (1, 2), "padding_mode": "reflect"}, (2, 4, 9, 8)),
    "replicate": (st.SparseConv2d, {"padding": 1, "padding_mode": "replicate"}, (2, 4, 9, 8)),
    "circular": (st.SparseConv2d, {"padding": 1, "padding_mode": "circular"}, (2, 4, 9, 8)),
    "1d": (st.SparseConv1d, {}, (2, 4, 19)),
    "1d groups": (
        st.SparseConv1d,
        {"groups": 2, "stride": 2, "padding": 2, "dilation": 2},
        (2, 4, 19),
    ),
    "1d same": (
        st.SparseConv1d,
        {"kernel_size": 4, "padding": "same", "bias": False},
        (2, 4, 19),
    ),
    "1d reflect": (st.SparseConv1d, {"padding": 2, "padding_mode": "reflect"}, (2, 4, 19)),
    "1d circular": (st.SparseConv1d, {"padding": 1, "padding_mode": "circular"}, (2, 4, 19)),
}
CONV = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _build(layer, form, **ours):
    cls, given, _ = LAYERS[layer]
    given = given if cls is st.SparseLinear else CONV | given
    return cls(**given, form=form, **({"density": 0.4, "seed": 1} | ours))


def _input(layer, **kwargs):
    return torch.randn(LAYERS[layer][2], **kwargs)


def _bytes(module):
    """A hash of everything a module holds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(
            name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _changed(dense, change):
    dense = copy.deepcopy(dense).double()
    with torch.no_grad():
        for p in dense.parameters():
            p.copy_(change(p))
    return dense


def _assert_like_dense(module, dense, x):
    """Output and input gradient within the element-wise bound of ``dense`` in float64."""
    x = x.clone().requires_grad_()
    y = module(x)
    grad = torch.randn(y.shape).to(y.dtype)
    y.backward(grad)

    def run(change):
        x64 = change(x.detach().double()).requires_grad_()
        y64 = _changed(dense, change)(x64)
        y64.backward(change(grad.double()))
        return y64.detach(), x64.grad

    runs = zip(run(lambda t: t), run(torch.abs), run(torch.ones_like), strict=True)
    for got, (ref, bound, terms) in zip((y.detach(), x.grad), runs, strict=True):
        oracle.assert_bounded(got, ref, bound, terms)


# The call -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_the_dense_layer_with_masked_weight(layer, form):
    module = _build(layer, form)
    dense = module.to_dense()
    assert type(dense) is type(module)._BASE
    full = module.weight if form != "ticket" else module.to_form("masked").weight
    assert torch.equal(dense.weight, full * module.mask.to_dense())
    assert module.mask.kept == kept_count(0.4, dense.weight.numel())
    x = _input(layer)
    _assert_like_dense(module, dense, x)
    _assert_like_dense(module, dense, x[:1])
    _assert_like_dense(module, dense, x[0])  # a vector, or an unbatched image
    assert module(x[:0]).shape == dense(x[:0]).shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["linear", "groups", "1d groups"])
def test_full_and_empty_masks(layer, form):
    x = _input(layer)
    full = _build(layer, form, density=1.0)
    assert full.mask.density == 1.0
    _assert_like_dense(full, full.to_dense(), x)
    empty = (
        _build(layer, form, density=0.0, keep_bias=True)
        if form != "masked"
        else _build(layer, form, density=0.0)
    )
    bias = empty.bias.view(-1, *[1] * (empty.weight.ndim - 2))
    assert bool(empty.bias.any())
    assert torch.equal(empty(x), bias.expand_as(empty(x)))


@pytest.mark.parametrize("layer", ["linear", "groups", "reflect", "1d groups"])
def test_masked_weight_gradient_is_the_dense_one_under_the_mask(layer):
    module, x = _build(layer, "masked"), _input(layer)
    dense = module.to_dense()
    grad = torch.randn_like(dense(x))
    module(x).backward(grad)
    dense(x).backward(grad)
    keep = module.mask.to_dense()
    torch.testing.assert_close(module.weight.grad, dense.weight.grad * keep)
    torch.testing.assert_close(module.bias.grad, dense.bias.grad)
    assert not module.weight.grad[~keep].any()


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize("layer", ["linear", "groups", "same", "circular", "1d same"])
def test_straight_through_gradient(layer, transform, batch):
    module = _build(layer, "scored", transform=transform, weights="uniform")
    x = _input(layer)[:1].repeat(batch, *[1] * (len(LAYERS[layer][2]) - 1))
    dense = module.to_dense()  # its weight is the leaf W_eff
    grad = torch.randn_like(dense(x))
    module(x).backward(grad)
    dense(x).backward(grad)
    expected = dense.weight.grad * module.weight
    if transform == "abs":
        expected = expected * module.scores.sign()
    torch.testing.assert_close(module.scores.grad, expected.detach(), rtol=1e-4, atol=1e-5)
    dropped = ~module.mask.to_dense()
    assert (module.scores.grad[dropped] != 0).float().mean() > 0.9
    assert module.weight.grad is None


def test_zero_scores_get_no_gradient_under_abs():
    for transform, moves in (("abs", False), ("identity", True)):
        module = _build("linear", "scored", transform=transform)
        with torch.no_grad():
            module.scores[3, 5] = 0.0
        st.update_masks(module)
        module(_input("linear")).sum().backward()
        assert bool(module.scores.grad[3, 5]) == moves


def test_one_step_of_sgd_by_hand():
    layer = st.SparseLinear(3, 2, bias=False, form="scored", density=0.5, seed=0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -2.0, 2.0], [-2.0, -2.0, 2.0]]))
        layer.scores.copy_(torch.tensor([[0.5, -0.4, 0.1], [-0.6, 0.2, 0.3]]))
    optimizer = torch.optim.SGD([layer.scores], lr=0.1)
    st.attach(layer, optimizer)
    st.update_masks(layer)
    assert layer.mask.to_dense().tolist() == [[True, True, False], [True, False, False]]
    y = layer(torch.tensor([1.0, 2.0, -1.0]))
    assert y.tolist() == [2 * 1 - 2 * 2, -2 * 1]
    (y * torch.tensor([1.0, -0.5])).sum().backward()
    # G = [[1, 2, -1], [-.5, -1, .5]]; times W and sign(s):
    expected = [[2.0, 4.0, -2.0], [-1.0, 2.0, 1.0]]
    assert layer.scores.grad.tolist() == expected
    optimizer.step()
    scores = torch.tensor([[0.3, -0.8, 0.3], [-0.5, 0.0, 0.2]])
    torch.testing.assert_close(layer.scores.detach(), scores)
    assert layer.mask.to_dense().tolist() == [[True, True, False], [True, False, False]]
    assert layer.weight.abs().unique().tolist() == [2.0]


def test_eval_twice_is_the_same_output():
    for form in FORMS:
        module, x = _build("conv", form).eval(), _input("conv")
        with torch.no_grad():
            assert torch.equal(module(x), module(x))


# Weights and scores from the seed -------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("scale", "divisor"), [("none", 1.0), ("density", 0.1), ("dynamic", 0.1)])
def test_signed_constant_is_one_magnitude_with_fair_signs(form, scale, divisor):
    conv = st.SparseConv2d(
        64, 32, 3, form=form, seed=5, density=0.1, scale=scale, weights="signed_constant"
    )
    w = conv.weight if form != "ticket" else conv.to_form("masked").weight
    sigma = round_bf16(math.sqrt(2 / (64 * 9)) / math.sqrt(divisor))
    assert w.abs().unique().tolist() == [sigma]
    assert abs(sigma * math.sqrt(divisor * 64 * 9 / 2) - 1) < 2**-7
    n = w.numel()
    assert abs(int((w > 0).sum()) - n / 2) < 4 * math.sqrt(n) / 2


@pytest.mark.parametrize("weights", ["uniform", "normal"])
def test_other_distributions_have_the_kaiming_deviation(weights):
    w = st.SparseLinear(200, 300, form="scored", seed=5, weights=weights).weight
    assert abs(w.std().item() / math.sqrt(2 / 200) - 1) < 0.02
    assert w.unique().numel() > 20_000
    assert w.requires_grad is False


def test_score_init():
    kwargs = {"form": "scored", "seed": 5, "weights": "normal"}
    uniform = st.SparseConv2d(16, 32, 3, **kwargs)
    bound = 1 / math.sqrt(16 * 9)
    assert 0.99 * bound < uniform.scores.abs().max() <= bound * (1 + 1e-6)
    assert abs(uniform.scores.std().item() / (bound / math.sqrt(3)) - 1) < 0.03
    normal = st.SparseConv2d(16, 32, 3, score_init="normal", **kwargs)
    assert abs(normal.scores.std().item() / math.sqrt(2 / (16 * 9)) - 1) < 0.03
    pair = torch.stack([normal.scores.flatten(), normal.weight.flatten()])
    assert abs(torch.corrcoef(pair)[0, 1]) < 0.06  # another stream: independent of the weights
    assert uniform.scores.dtype == torch.float32
    assert torch.equal(uniform.mask.to_dense(), torch.ones(32, 16, 3, 3, dtype=torch.bool))


def test_equal_seed_layer_and_shape_give_equal_weights():
    def ticket(seed, layer):
        return st.SparseLinear(64, 64, form="ticket", seed=seed, layer=layer)

    a = ticket(3, "net.fc")
    assert torch.equal(a.weight, ticket(3, "net.fc").weight)
    assert torch.equal(a.weight, ticket(3, "module.net._orig_mod.fc").weight)
    assert not torch.equal(a.weight, ticket(4, "net.fc").weight)
    assert not torch.equal(a.weight, ticket(3, "net.fc2").weight)
    assert torch.equal(
        a.weight, st.regenerate(3, "net.fc", (64, 64), sigma=round_bf16(math.sqrt(2 / 64)))
    )


def test_no_seed_draws_from_torchs_generator():
    def drawn():
        return st.SparseLinear(64, 64, form="ticket").recipe.seed

    torch.manual_seed(7)
    first, second = drawn(), drawn()
    torch.manual_seed(7)
    assert (drawn(), drawn()) == (first, second)
    assert first != second


def test_default_is_torchs_layer_under_a_full_mask():
    torch.manual_seed(3)
    dense, dense_conv = nn.Linear(5, 4), nn.Conv2d(4, 6, 3)
    torch.manual_seed(3)
    linear = st.SparseLinear(5, 4)
    assert isinstance(linear, nn.Linear) and isinstance(_build("conv", "ticket"), nn.Conv2d)
    assert torch.equal(linear.weight, dense.weight) and torch.equal(linear.bias, dense.bias)
    assert linear.weight.requires_grad and linear.mask.density == 1.0
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        for form in FORMS:
            assert getattr(_build("conv", form), name) == getattr(dense_conv, name)


@pytest.mark.parametrize("form", FORMS)
def test_frozen_biases_are_zero_unless_kept(form):
    module = _build("linear", form)
    assert module.bias.requires_grad == (form == "masked")
    assert bool(module.bias.any()) == (form == "masked")
    if form != "masked":
        kept = _build("linear", form, keep_bias=True)
        assert bool(kept.bias.any())
        assert kept.bias.requires_grad == (form == "scored")
    assert st.SparseLinear(3, 2, False, form=form).bias is None


@pytest.mark.parametrize("as_bool", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_given_mask_is_used(form, as_bool):
    mask = torch.rand(19, 37) < 0.3
    given = mask if as_bool else st.PackedMask.from_dense(mask)
    module = _build("linear", form, mask=given, density=None)
    assert torch.equal(module.mask.to_dense(), mask)
    if form == "scored":
        st.update_masks(module)  # the scores say the same
        assert torch.equal(module.mask.to_dense(), mask)


# Freshness and selection ----------------------------------------------------------------------


def _train_step(model, optimizer, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_stale_masks_raise_until_updated(kind):
    module, x = _build("linear", "scored"), _input("linear")
    optimizer = getattr(torch.optim, kind)([module.scores], lr=0.1)
    _train_step(module, optimizer, x)
    for use in (lambda: module(x), lambda: module.mask, module.to_dense):
        with pytest.raises(RuntimeError, match="update_masks"):
            use()
    with pytest.raises(RuntimeError, match="attach"):
        module.to_form("ticket")
    before = module.mask_words.clone()
    st.update_masks(module)
    module(x)
    assert not torch.equal(module.mask_words, before)
    assert module.mask == st.select_mask(module.scores, density=0.4)


def test_attach_updates_after_every_step_until_removed():
    model = nn.Sequential(_build("linear", "scored"), nn.ReLU())
    x = _input("linear")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    handle = st.attach(model, optimizer)
    masks = []
    for _ in range(3):
        _train_step(model, optimizer, x)
        masks.append(model[0].mask)
        assert masks[-1] == st.select_mask(model[0].scores, density=0.4)
    assert masks[0] != masks[2]
    handle.remove()
    _train_step(model, optimizer, x)
    with pytest.raises(RuntimeError, match="scores changed"):
        model(x)


def test_attach_selects_at_once():
    model = nn.Sequential(_build("linear", "scored"), nn.ReLU())
    with torch.no_grad():  # what DistributedDataParallel's broadcast does to every parameter
        model[0].scores.copy_(model[0].scores.flip(0))
    st.attach(model, torch.optim.SGD([model[0].scores], lr=1.0))
    model(_input("linear"))
    assert model[0].mask == st.select_mask(model[0].scores, density=0.4)


def test_attach_refuses_a_foreign_optimizer():
    module = _build("linear", "scored")
    with pytest.raises(ValueError, match="holds no scores"):
        st.attach(module, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))


@pytest.mark.parametrize("layer", ["linear", "groups", "1d groups"])
def test_a_search_never_touches_the_weights(layer):
    module, x = _build(layer, "scored", weights="normal"), _input(layer)
    weight = module.weight.clone()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert [id(p) for p in trained] == [id(module.scores)]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-2)
    st.attach(module, optimizer)
    first = module.mask
    for _ in range(5):
        _train_step(module, optimizer, x)
    assert torch.equal(module.weight.view(torch.int32), weight.view(torch.int32))
    assert module.weight.grad is None
    assert module.mask != first


def test_global_scope_selects_together():
    kwargs = {"scope": "global", "score_init": "normal"}
    model = nn.Sequential(_build("linear", "scored", **kwargs), _build("conv", "scored", **kwargs))
    st.update_masks(model)
    expected = st.select_mask([m.scores for m in model], density=0.4, scope="global")
    assert [m.mask for m in model] == expected
    with torch.no_grad():
        model[0].scores.mul_(100)
    st.update_masks(model)
    n = model[0].scores.numel()
    total = kept_count(0.4, n + model[1].scores.numel())
    assert [m.mask.kept for m in model] == [min(n, total), total - min(n, total)]


def test_global_modules_must_agree():
    model = nn.Sequential(
        _build("linear", "scored", scope="global"),
        _build("linear", "scored", scope="global", density=0.5),
    )
    before = _bytes(model)
    with pytest.raises(ValueError, match="selected together"):
        st.update_masks(model)
    assert _bytes(model) == before


def test_nan_scores_raise_and_change_nothing():
    model = nn.Sequential(
        _build("linear", "scored"), _build("linear", "scored", transform="identity")
    )
    with torch.no_grad():
        model[0].scores.add_(torch.randn(19, 37))
        model[1].scores[0, 0] = math.nan
    words = [m.mask_words.clone() for m in model]
    with pytest.raises(ValueError, match="NaN"):
        st.update_masks(model)
    assert all(torch.equal(m.mask_words, w) for m, w in zip(model, words, strict=True))


def test_dynamic_scale_follows_the_layers_density():
    kwargs = {"scope": "global", "scale": "dynamic", "density": 0.3}
    model = nn.Sequential(*(_build("linear", "scored", **kwargs) for _ in range(2)))
    signs = model[0].weight.sign()
    with torch.no_grad():
        model[0].scores.mul_(0)
    st.update_masks(model)
    densities = [m.mask.density for m in model]
    assert densities[0] < densities[1]
    std = math.sqrt(2 / 37)
    assert densities[0] == 0 and model[0].recipe.sigma == round_bf16(std)  # empty: unscaled
    assert model[1].recipe.sigma == round_bf16(std / math.sqrt(densities[1]))
    for m in model:
        assert m.weight.abs().unique().tolist() == [m.recipe.sigma]
        assert torch.equal(m.weight.sign(), signs) or m is model[1]
        assert torch.equal(m.to_form("ticket").weight, m.to_dense().weight)


# Copies and state -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["linear", "reflect", "1d reflect"])
def test_copies_give_the_same_output(layer, form):
    module, x = _build(layer, form), _input(layer).requires_grad_()
    y = module(x)
    y.sum().backward()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), y)
        assert twin.recipe == module.recipe and twin.options == module.options
        if form == "scored":
            with torch.no_grad():
                twin.scores.neg_()
            with pytest.raises(RuntimeError, match="scores changed"):
                twin(x)
            with pytest.raises(RuntimeError, match="scores changed"):
                copy.deepcopy(twin)(x)
            module(x)  # its own scores are as they were


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["linear", "reflect", "1d reflect"])
def test_state_dict_round_trip(layer, form, assign):
    kwargs = {"weights": "signed_constant", "scale": "density"}
    module, x = _build(layer, form, **kwargs), _input(layer)
    if form == "scored":
        with torch.no_grad():
            module.scores.add_(torch.randn_like(module.scores))
        st.update_masks(module)
    state = module.state_dict()
    keys = {"weight", "bias", "mask_words", "seed"} | ({"scores"} if form == "scored" else set())
    assert set(state) == keys - ({"weight"} if form == "ticket" else set())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    twin = _build(layer, form, **(kwargs | {"seed": 2, "density": 0.2}))
    twin.load_state_dict(torch.load(file), assign=assign)
    assert torch.equal(twin(x), module(x))
    assert (twin.mask, twin.recipe) == (module.mask, module.recipe)


def test_dense_checkpoint_loads_strictly_into_masked():
    dense = nn.Linear(37, 19)
    module = _build("linear", "masked")
    mask = module.mask
    module.load_state_dict(dense.state_dict())
    assert torch.equal(module.weight, dense.weight) and module.mask == mask
    assert set(module.state_dict()) == {"weight", "bias", "mask_words"}


def test_loading_scores_alone_makes_the_mask_stale():
    module, x = _build("linear", "scored"), _input("linear")
    state = _build("linear", "scored", seed=9).state_dict()
    del state["mask_words"]
    module.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="scores changed"):
        module(x)
    st.update_masks(module)
    module(x)


def test_a_stale_mask_is_not_saved():
    model = nn.Sequential(_build("linear", "scored"))
    optimizer = torch.optim.SGD([model[0].scores], lr=10.0)
    _train_step(model, optimizer, _input("linear"))
    with pytest.raises(RuntimeError, match="update_masks"):
        model.state_dict()
    st.update_masks(model)
    other = nn.Sequential(_build("linear", "scored"))
    other.load_state_dict(model.state_dict())
    assert other[0].mask == model[0].mask


def _seed_tensor(module, index, value):
    tensor = module.recipe.to_tensor()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("form", "key", "bad", "text"),
    [
        ("ticket", "seed", lambda m: torch.zeros(4, dtype=torch.int64), r"seed: got .* \(4,\)"),
        ("ticket", "seed", lambda m: torch.zeros(5), "float32"),
        ("ticket", "seed", lambda m: _seed_tensor(m, 0, -1), "seed: seed: got -1"),
        ("ticket", "seed", lambda m: _seed_tensor(m, 2, 4), "distribution 4"),
        ("ticket", "seed", lambda m: _seed_tensor(m, 4, 2**32), "bits of two float32"),
        ("ticket", "seed", lambda m: _seed_tensor(m, 4, 0x7FC00000), "sigma: got nan"),
        ("ticket", "seed", lambda m: None, "Missing key.*seed"),
        ("scored", "seed", lambda m: None, "frozen weights load with their seed"),
        ("scored", "mask_words", lambda m: None, "Missing key.*mask_words"),
        ("scored", "scores", lambda m: m.scores.bfloat16(), "scores: got torch.bfloat16"),
        ("ticket", "mask_words", lambda m: m.mask_words.long(), "mask_words: got torch.int64"),
        ("masked", "mask_words", lambda m: m.mask_words[:3], "mask_words: got"),
        ("scored", "mask_words", lambda m: ~m.mask_words, "beyond"),
    ],
)
def test_bad_state_is_refused_and_changes_nothing(form, key, bad, text):
    module = _build("linear", form)
    state = _build("linear", form, seed=2).state_dict()
    state[key] = bad(module)
    if state[key] is None:
        del state[key]
    before = _bytes(module)
    with pytest.raises(RuntimeError, match=text):
        module.load_state_dict(state)
    if "Missing" not in text:  # torch itself loads what is there
        assert _bytes(module) == before
        assert module.recipe is None or module.recipe.seed == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layer", ["linear", "conv", "1d"])
@pytest.mark.parametrize("form", FORMS)
def test_to_dtype(form, layer, dtype):
    module = _build(layer, form)
    mask = module.mask
    if form == "scored":
        module(_input(layer)).sum().backward()
    module.to(dtype)
    assert module.dtype == module.weight.dtype == module.bias.dtype == dtype
    assert module.mask_words.dtype == torch.int32 and module.mask == mask
    x = _input(layer).to(dtype)
    _assert_like_dense(module, module.to_dense(), x)
    if form == "scored":
        assert module.scores.dtype == module.scores.grad.dtype == torch.float32
        module(x).sum().backward()


def test_to_channels_last():
    for form in FORMS:
        module, x = _build("groups", form), _input("groups")
        dense = module.to_dense()
        module.to(memory_format=torch.channels_last)
        if form != "ticket":
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        _assert_like_dense(module, dense, x)
        assert module(x).is_contiguous(memory_format=torch.channels_last)
        if form == "scored":
            mask = module.mask
            st.update_masks(module)
            assert module.mask == mask


def test_meta_device_then_load():
    for form in FORMS:
        source, x = _build("conv", form), _input("conv")
        with torch.device("meta"):
            module = _build("conv", form, seed=2)
        assert module.mask_words.is_meta and "form=" in repr(module)
        module.to_empty(device="cpu").load_state_dict(source.state_dict(), strict=form != "masked")
        assert torch.equal(module(x), source(x))


def test_reset_parameters_restores_the_seeds_state():
    for form in FORMS:
        module = _build("linear", form, weights="normal")
        before = module.state_dict()["mask_words"].clone(), module.weight.clone()
        if form == "scored":
            with torch.no_grad():
                module.scores.normal_()
            st.update_masks(module)
        module.reset_parameters()
        assert torch.equal(module.mask_words, before[0])
        assert torch.equal(module.weight, before[1])
    module = _build("linear", "masked")
    before = module.weight.clone()
    module.reset_parameters()
    assert not torch.equal(module.weight, before)  # torch's own initialisation


# Compilers and autocast -----------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["linear", "same", "1d same"])
def test_compiles_into_one_graph(layer, form):
    module, x = _build(layer, form, **({"codes": True} if form == "ticket" else {})), _input(layer)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        module.train(training)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        y, expected = compiled(a), module(b)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(y, expected) and torch.equal(a.grad, b.grad)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), module(x))


def test_compiled_search_sees_new_masks_without_recompiling():
    module, x = _build("linear", "scored", scale="dynamic", scope="global"), _input("linear")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD([module.scores], lr=1.0)
    st.attach(module, optimizer)
    _train_step(compiled, optimizer, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            before = module.mask
            _train_step(compiled, optimizer, x)
            assert module.mask != before
            assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["linear", "reflect", "1d reflect"])
def test_autocast(layer, form):
    module, x = _build(layer, form), _input(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
        if form != "ticket":
            y.float().sum().backward()
    expected = module.to(torch.bfloat16)(x.bfloat16())
    assert torch.equal(y, expected)
    if form == "scored":
        assert module.scores.grad.dtype == torch.float32


def test_autocast_ranks_in_float32():
    module, x = _build("linear", "scored"), _input("linear")
    with torch.no_grad():  # differ by less than a bfloat16 step
        module.scores.copy_(1 + torch.rand(19, 37) * 2**-10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        st.update_masks(module)
        module(x)
    assert module.mask == st.select_mask(module.scores, density=0.4)


# Tickets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ticket_holds_no_weights(dtype):
    module = st.SparseConv2d(64, 128, 3, form="ticket", bias=False, seed=0, dtype=dtype)
    held = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    assert held == 128 * 64 * 9 / 8  # one bit per weight, rows of whole units
    assert held <= 128 * 64 * 9 * dtype.itemsize / (32 if dtype == torch.float32 else 16)
    assert list(module.state_dict()) == ["mask_words", "seed"]
    assert module.weight.dtype == dtype


def test_a_tickets_weight_is_fresh_and_cannot_be_set():
    module, x = _build("linear", "ticket"), _input("linear")
    y, weight = module(x), module.weight
    weight.zero_()
    assert module.weight.any() and torch.equal(module(x), y)
    for value in (nn.Parameter(weight), weight):
        with pytest.raises(AttributeError, match="to_form"):
            module.weight = value


def test_codes_change_memory_but_not_the_output():
    for layer in ("linear", "groups"):
        module, x = _build(layer, "ticket", density=0.05), _input(layer)
        fast = module.to_form("ticket", codes=True)
        assert module.codes is None and fast.codes.dtype == torch.int32
        assert set(fast.state_dict()) == set(module.state_dict())
        copies = [fast, copy.deepcopy(fast), fast.to_form("ticket", codes=True)]
        for same in copies:
            assert torch.equal(same.codes, fast.codes)
            assert torch.equal(same(x), module(x))
        other = _build(layer, "ticket", density=0.05, seed=2)
        for key in ("seed", "mask_words"):  # either alone, then both
            state = module.state_dict() | {key: other.state_dict()[key]}
            fast.load_state_dict(state)
            module.load_state_dict(state)
            assert torch.equal(fast(x), module(x))
        fast.load_state_dict(other.state_dict())
        assert torch.equal(fast(x), other(x))
        assert fast.to("meta").codes.is_meta and fast.bfloat16().codes.dtype == torch.int32


def test_codes_take_two_bits_a_weight():
    module = st.SparseLinear(640, 320, form="ticket", density=0.3, seed=1, codes=True)
    assert module.codes.nbytes == 2 * 640 * 320 // 8
    assert module.explain(module.example(1)).kernel.startswith("lookup gemv ternary")
    assert module.explain(module.example(64)).kernel.startswith("four-Russians")


def test_scored_linear_gives_its_recipe_while_the_weight_is_the_recipes():
    def from_seed(m):
        return m._arguments(x)[1] is None

    module, x = _build("linear", "scored"), _input("linear")
    assert from_seed(module) and from_seed(copy.deepcopy(module))
    y = module(x)
    other = _build("linear", "scored", seed=2)
    other.load_state_dict(module.state_dict())
    assert from_seed(other) and torch.equal(other(x), y)
    state = module.state_dict()
    other.load_state_dict(state | {"weight": 2 * state["weight"]})
    assert not from_seed(other)
    with torch.no_grad():
        module.weight.mul_(2)
    assert not from_seed(module) and not from_seed(copy.deepcopy(module))
    torch.testing.assert_close(module(x), other(x))
    module.reset_parameters()
    assert from_seed(module)
    assert from_seed(module.bfloat16().float()) and not from_seed(module.half().float())
    for ours in ({"weights": "normal"}, {"scale": "dynamic"}, {"dtype": torch.float64}):
        module = _build("linear", "scored", **ours)
        assert module._arguments(x.to(module.dtype))[1] is module.weight


def test_a_small_scored_layer_trains_on_torchs_product_and_computes_as_its_ticket():
    layer = st.SparseLinear(50, 100, form="scored", seed=0, keep_bias=True)
    x = torch.randn(16, 50)
    assert layer.explain(x).op == "popup_weight"
    masked = layer.mask.to_dense() * layer.weight
    assert torch.equal(layer(x), nn.functional.linear(x, masked, layer.bias))
    with pytest.raises(TypeError, match=r"x: got torch.float64, need torch.float32"):
        layer(x.double())
    layer.eval()
    assert layer.explain(x).kernel.startswith("four-Russians")
    assert torch.equal(layer(x), layer.to_form("ticket")(x))


# Conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("layer", ["linear", "reflect", "1d reflect"])
def test_to_form_keeps_weights_bit_for_bit(layer, source, target):
    module = _build(layer, source, weights="signed_constant", scale="density").eval()
    assert not module.to_dense().training
    new = module.to_form(target)
    assert (new.form, new.training, new.recipe, new.mask) == (
        target,
        False,
        module.recipe,
        module.mask,
    )
    assert torch.equal(new.to_dense().weight, module.to_dense().weight)
    assert torch.equal(new.bias, module.bias)
    if target == source != "ticket":
        assert new.weight is not module.weight
    x = _input(layer)
    _assert_like_dense(new, module.to_dense(), x)
    assert new.to_form(target).options == new.options


@pytest.mark.parametrize("score_init", ["uniform", "normal"])
@pytest.mark.parametrize("transform", ["abs", "identity"])
def test_ticket_to_scored_selects_the_same_mask(transform, score_init):
    ticket = _build("conv", "ticket")
    scored = ticket.to_form("scored", transform=transform, score_init=score_init)
    st.update_masks(scored)
    assert scored.mask == ticket.mask
    assert scored.scores.requires_grad and not scored.weight.requires_grad


@pytest.mark.parametrize("form", ["ticket", "scored"])
def test_weights_that_no_seed_gives_stay_masked(form):
    with pytest.raises(ValueError, match="drawn from a seed"):
        _build("linear", "masked").to_form(form)
    module = _build("linear", "masked", weights="normal")
    mask = module.mask.to_dense()
    with torch.no_grad():
        module.weight[~mask] += 1  # dropped weights may be anything
    module.to_form(form)
    with torch.no_grad():
        module.weight[mask] *= 1.001
    with pytest.raises(ValueError, match="trained or rounded"):
        module.to_form(form)
    with pytest.raises(ValueError, match="trained or rounded"):
        _build("linear", "scored", weights="normal").bfloat16().float().to_form("ticket")


def test_from_dense_masked_keeps_weights_and_the_largest():
    dense = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).to(torch.bfloat16).eval()
    dense.weight.requires_grad_(False)
    module = st.SparseConv2d.from_dense(dense, density=0.3)
    assert torch.equal(module.weight, dense.weight) and torch.equal(module.bias, dense.bias)
    assert module.weight is not dense.weight and not module.weight.requires_grad
    assert module.mask == st.select_mask(dense.weight, density=0.3)
    assert (module.training, module.dtype, module.stride) == (False, torch.bfloat16, (2, 2))
    assert st.SparseConv2d.from_dense(dense).mask.density == 1.0
    mask = torch.rand_like(dense.weight.float()) < 0.2
    assert torch.equal(st.SparseConv2d.from_dense(dense, mask=mask).mask.to_dense(), mask)


def test_from_dense_scored_draws_from_the_seed():
    dense = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    module = st.SparseConv2d.from_dense(dense, form="scored", density=0.3, seed=1, layer="a")
    twin = st.SparseConv2d(4, 6, 3, form="scored", density=0.3, seed=1, layer="a")
    assert torch.equal(module.weight, twin.weight) and torch.equal(module.scores, twin.scores)
    assert module.mask == twin.mask
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert not module.bias.any()
    kept = st.SparseConv2d.from_dense(dense, form="scored", seed=1, keep_bias=True)
    assert torch.equal(kept.bias, dense.bias)


def test_masked_mask_can_be_set():
    module = _build("linear", "masked")
    mask = torch.rand(19, 37) < 0.1
    module.mask = mask
    assert torch.equal(module.mask.to_dense(), mask)
    module.mask = ~st.PackedMask.from_dense(mask)
    assert torch.equal(module.mask.to_dense(), ~mask)
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 2\)"):
        module.mask = torch.ones(2, 2, dtype=torch.bool)
    for form in ("scored", "ticket"):
        with pytest.raises(ValueError, match="does not take a new mask"):
            _build("linear", form).mask = mask


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"form": "dense"}, ValueError, "form: got 'dense', accepted: masked, scored"),
        ({"density": 1.2}, ValueError, "density"),
        ({"density": "all"}, TypeError, "density"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"form": "ticket", "seed": 2**63}, ValueError, "seed"),
        ({"layer": 1.5}, TypeError, "layer"),
        ({"weights": "kaiming"}, ValueError, "weights: got 'kaiming'"),
        ({"scale": "sqrt"}, ValueError, "scale: got 'sqrt'"),
        ({"scale": "density"}, ValueError, "scale='density' needs weights"),
        ({"transform": "identity"}, ValueError, "transform='identity' means nothing in form"),
        ({"scope": "global", "form": "ticket"}, ValueError, "scope='global' means nothing"),
        ({"score_init": "normal"}, ValueError, "score_init"),
        ({"keep_bias": True}, ValueError, "keep_bias"),
        ({"codes": True, "form": "scored"}, ValueError, "codes=True means nothing"),
        ({"codes": True, "form": "ticket", "weights": "normal"}, ValueError, "signed_constant"),
        ({"form": "scored", "min_keep_per_layer": 1}, ValueError, "min_keep_per_layer"),
        ({"form": "scored", "scope": "model"}, ValueError, "scope: got 'model'"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: got torch.float32"),
        ({"mask": torch.ones(3, 2).bool()}, ValueError, r"mask: got shape \(3, 2\)"),
        ({"mask": torch.ones(2, 3).bool(), "density": 0.5}, ValueError, "density: got 0.5"),
        ({"dtype": torch.complex64}, TypeError, "dtype: got torch.complex64"),
        ({"sparsity": 0.5}, TypeError, r"SparseLinear: .*'sparsity'.* density"),
        ({"form": "scored", "keep_bias": 1}, TypeError, "keep_bias: got 1"),
        ({"form": "ticket", "codes": "yes"}, TypeError, "codes: got 'yes'"),
        ({"form": "scored", "min_keep_per_layer": "1"}, TypeError, "min_keep_per_layer: got '1'"),
    ],
)
def test_constructor_refuses(kwargs, error, text):
    with pytest.raises(error, match=text):
        st.SparseLinear(3, 2, **kwargs)


def test_conv_constructor_refuses_what_torch_refuses():
    for kwargs in ({"padding_mode": "mirror"}, {"groups": 3}, {"padding": "same", "stride": 2}):
        for form in FORMS:
            with pytest.raises(ValueError):
                st.SparseConv2d(4, 6, 3, form=form, **kwargs)


def _hooked():
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "text"),
    [
        (lambda: nn.Conv2d(3, 2, 1), {}, TypeError, "Conv2d is not exactly nn.Linear"),
        (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(3, 2), {}, TypeError, "exactly"),
        (lambda: st.SparseLinear(3, 2), {}, TypeError, "already sparse"),
        (lambda: nn.LazyLinear(3), {}, TypeError, "exactly"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), {}, TypeError, "exactly"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 2)), {}, TypeError, "computed by hooks"),
        (_hooked, {}, TypeError, "hooks"),
        (lambda: nn.Linear(3, 2, device="meta"), {}, TypeError, "meta"),
        (lambda: nn.Linear(3, 2), {"form": "dense"}, ValueError, "form"),
        (lambda: nn.Linear(3, 2), {"weights": "normal"}, ValueError, "keeps the module's weights"),
        (lambda: nn.Linear(3, 2), {"mask": torch.ones(2, 2).bool()}, ValueError, "mask"),
        (
            lambda: nn.Linear(3, 2),
            {"sparsity": 1},
            TypeError,
            r"from_dense: .*'sparsity'.* density",
        ),
    ],
)
def test_from_dense_refuses(make, kwargs, error, text):
    with pytest.raises(error, match=text):
        st.SparseLinear.from_dense(make(), **kwargs)


def test_bad_input_names_the_argument():
    for form in FORMS:
        with pytest.raises(ValueError, match="x: got shape"):
            _build("linear", form)(torch.randn(2, 36))
        with pytest.raises(ValueError, match="x: got shape"):
            _build("conv", form)(torch.randn(2, 3, 9, 9))
        for layer in ("linear", "conv"):
            for dtype in (torch.int64, torch.float64, torch.bfloat16):
                with pytest.raises(TypeError, match=f"x: got {dtype}, need torch.float32"):
                    _build(layer, form)(_input(layer).to(dtype))
            with torch.autocast("cpu"), pytest.raises(TypeError, match=r"x: got torch\.float64"):
                _build(layer, form)(_input(layer).double())
    with pytest.raises(TypeError, match=r"to_form: .*'sparsity'"):
        _build("linear", "masked", weights="uniform").to_form("ticket", sparsity=1)


# Compressed -----------------------------------------------------------------------------------


def _compressed(dtype=torch.float32, **ours):
    dense = nn.Linear(37, 19, dtype=dtype)
    mask = torch.rand(19, 37) < 0.3
    return st.SparseLinear.from_dense(dense, mask=mask, form="compressed", **ours), dense, mask


@pytest.mark.parametrize("batch", [(1,), (7,), (), (2, 20), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_compressed_is_the_dense_layer_with_masked_weight(dtype, batch):
    module, dense, mask = _compressed(dtype)
    assert module.dtype == module.values.dtype == dtype
    assert torch.equal(module.values, dense.weight[mask])
    assert torch.equal(module.weight, dense.weight * mask)
    assert torch.equal(module.mask.to_dense(), mask)
    x = torch.randn(*batch, 37, dtype=dtype)
    if dtype != torch.float16:
        _assert_like_dense(module, module.to_dense(), x)
    assert module(x).shape == (*batch, 19)


def test_compressed_gradients_and_training_follow_the_masked_form():
    module, _, mask = _compressed()
    masked = module.to_form("masked")
    x, target = torch.randn(64, 37), torch.randn(64, 19)
    for make in (torch.optim.SGD, torch.optim.AdamW):
        compressed, reference = copy.deepcopy(module), copy.deepcopy(masked)
        for layer in (compressed, reference):
            optimizer = make(layer.parameters(), lr=0.05)
            for _ in range(5):
                optimizer.zero_grad()
                (layer(x) - target).square().mean().backward()
                optimizer.step()
        assert compressed.values.grad.shape == (int(mask.sum()),)
        torch.testing.assert_close(compressed.values.grad, reference.weight.grad[mask])
        torch.testing.assert_close(compressed.values, reference.weight[mask])
        torch.testing.assert_close(compressed.bias, reference.bias)


def test_compressed_patterns_are_derived_and_not_saved():
    module, _, _ = _compressed()
    assert set(module.state_dict()) == {"values", "bias", "mask_words"}
    pattern = module.pattern
    assert pattern is not None and module.pattern_t is None
    module(torch.randn(3, 37))
    assert module.pattern_t is None  # the input gradient is not asked for
    with torch.no_grad():
        module(torch.randn(3, 37, requires_grad=True))
    assert module.pattern_t is None
    module(torch.randn(3, 37, requires_grad=True))
    assert module.pattern_t is not None
    x = torch.randn(3, 37)
    for again in (copy.deepcopy(module), _pickled(module)):
        assert torch.equal(again.pattern, pattern) and again.pattern_t is None
        assert torch.equal(again(x), module(x))
    other, _, _ = _compressed()
    if other.mask.kept != module.mask.kept:
        with pytest.raises(RuntimeError, match="values, mask_words: got"):
            other.load_state_dict(module.state_dict())
    same = st.SparseLinear(37, 19, form="compressed", mask=module.mask)
    same.mask_words.zero_()  # a stale mask: loading writes mask and pattern
    same.load_state_dict(module.state_dict())
    assert torch.equal(same.pattern, pattern) and torch.equal(same(x), module(x))
    moved = copy.deepcopy(module).to("meta")
    assert moved.pattern is None
    moved = moved.to_empty(device="cpu")
    moved.load_state_dict(module.state_dict())
    assert torch.equal(moved(x), module(x))


def _pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_compressed_conversions():
    module, dense, mask = _compressed()
    assert torch.equal(module.to_dense().weight, dense.weight * mask)
    masked = module.to_form("masked")
    assert torch.equal(masked.weight, dense.weight * mask) and masked.weight.requires_grad
    assert torch.equal(masked.to_form("compressed").values, module.values)
    with pytest.raises(ValueError, match="needs weights drawn from a seed"):
        module.to_form("ticket")
    seeded = st.SparseLinear(
        37, 19, form="compressed", seed=3, density=0.4, weights="signed_constant"
    )
    for form in ("ticket", "scored", "masked"):
        other = seeded.to_form(form)
        again = other.to_form("compressed")
        assert torch.equal(again.weight, seeded.weight) and again.values.requires_grad
        assert torch.equal(seeded.to_form(form).mask.words, seeded.mask.words)
    with torch.no_grad():
        before = seeded.values.clone()
        seeded.values.add_(1)
    seeded.reset_parameters()
    assert torch.equal(seeded.values, before)
    module.reset_parameters()
    assert bool((module.values.abs() <= 1 / math.sqrt(37)).all())
    assert not torch.equal(module.values, dense.weight[mask])


def test_compressed_refusals():
    module, dense, mask = _compressed()
    with pytest.raises(RuntimeError, match=r"weight: form 'compressed' loads values and mask_wo"):
        module.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match="values, mask_words: they load together only"):
        module.load_state_dict({"values": module.values}, strict=False)
    with pytest.raises(ValueError, match="form 'compressed' does not take a new mask"):
        module.mask = ~mask
    with pytest.raises(AttributeError, match="form 'compressed' has values and mask only"):
        module.weight = nn.Parameter(dense.weight)
    with pytest.raises(ValueError, match="means nothing in form 'compressed'"):
        st.SparseLinear(3, 4, form="compressed", codes=True)
    with pytest.raises(TypeError, match=r"x: got torch\.float64, need torch\.float32"):
        module(torch.randn(2, 37, dtype=torch.float64))


def test_compressed_under_autocast_and_compiled():
    module, _, _ = _compressed()
    x = torch.randn(20, 37, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module.values.grad.dtype == torch.float32
    oracle.check_compiled(module, [torch.randn(20, 37)], [0])


def test_compressed_in_a_converted_model():
    class Compress:
        def plan(self, name, module):
            return {"form": "compressed", "density": 0.2}

    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    report = st.sparsify_(model, Compress())
    assert [row.kind for row in report.converted] == ["SparseLinear compressed"] * 2
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert report.now_bytes == held < report.dense_bytes
    assert not report.not_weight_free
    st.densify_(model)
    assert type(model[0]) is nn.Linear


class _Twice(nn.Module):
    def forward(self, values):
        return 2 * values


@pytest.mark.parametrize("form", ["masked", "compressed"])
def test_parameters_may_be_held_elsewhere(form):
    """By a parametrization, functional_call, or a replica of DataParallel."""
    layer, x = st.SparseLinear(70, 5, density=0.5, form=form, seed=1), torch.randn(3, 70)
    name, expected = "values" if form == "compressed" else "weight", layer(x)
    held = dict(layer.named_parameters())
    doubled = {key: 2 * held[key] for key in (name, "bias")}
    assert torch.equal(torch.func.functional_call(layer, doubled, (x,)), 2 * expected)
    replica = layer._replicate_for_data_parallel()
    for key, parameter in held.items():
        setattr(replica, key, parameter.detach().clone())
    assert not replica._parameters and torch.equal(replica(x), expected)
    nn.utils.parametrize.register_parametrization(layer, "bias", _Twice())
    if form == "masked":  # torch refuses the name "values"
        nn.utils.parametrize.register_parametrization(layer, "weight", _Twice())
        assert torch.equal(layer(x), 2 * expected)
    else:
        torch.testing.assert_close(layer(x), expected + held["bias"])


@pytest.mark.parametrize("train", [True, False])
def test_a_small_scored_layer_names_a_wrong_input(train):
    layer = st.SparseLinear(6, 4, form="scored", seed=0, density=0.5).train(train)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 5\), need last dimension 6"):
        layer(torch.randn(3, 5))
