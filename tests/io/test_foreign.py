"""Masks of published checkpoints: files in each code's own keys and rounding, written here."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseticket as st
from sparseticket.io.foreign import SOURCES


class Net(nn.Module):
    """Names as in hidden-networks' Conv2: ``convs`` and ``linear``; 3->64 3x3 is 1,728 weights."""

    def __init__(self, point: bool = False) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.ReLU())
        self.norm = nn.BatchNorm2d(64, affine=False)
        last = (nn.Conv2d(64, 10, 1, bias=False),) if point else (nn.Linear(64, 10, bias=False),)
        self.linear = nn.Sequential(*last)
        self.point = point

    def forward(self, x):
        x = self.norm(self.convs(x)).mean((2, 3))
        return self.linear(x[..., None, None]).flatten(1) if self.point else self.linear(x)


NAMES = ("convs.0", "linear.0")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def trained():
    """A net whose weights and statistics are like nobody else's."""
    net = Net(point=True)
    for _ in range(2):
        net(torch.randn(8, 3, 6, 6))
    return net


def wrapped(net, **more):
    """The state_dict as DataParallel saves it, and what else a layer's class registers."""
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    for name in NAMES:
        for key, value in more.items():
            state[f"module.{name}.{key}"] = value(net.get_submodule(name).weight)
    return state


def under(net, masks, scales=None):
    """The expected model: plain torch with weight * mask."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_submodule(name).weight.mul_(mask * (scales or {}).get(name, 1.0))
    return net.eval()


def saved(tmp_path, content):
    path = tmp_path / "model_best.pth"
    torch.save(content, path)
    return path


def check(report, model, expected, masks):
    x = torch.randn(5, 3, 6, 6)
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, st.SparseConv2d | st.SparseLinear) and layer.form == "masked"
        assert torch.equal(layer.mask.to_dense().flatten(), mask.flatten().bool()), name
        assert report.masks[name] == layer.mask
    assert report.unmatched == [] and report.unmasked == [] and report.unused == []
    torch.testing.assert_close(model.eval()(x), expected(x), rtol=1e-5, atol=1e-5)
    assert f"{len(masks)} masks" in str(report)


# hidden-networks --------------------------------------------------------------------------------


def lowest_dropped(scores, k):
    """Sort, drop the first int((1 - k) * n)."""
    mask = torch.ones(scores.numel())
    mask[scores.abs().flatten().argsort()[: int((1 - k) * scores.numel())]] = 0
    return mask.view(scores.shape)


@pytest.mark.parametrize(("k", "kept"), [(0.3, 519), (0.9, 1556), (0.1, 173), (1.0, 1728)])
@pytest.mark.parametrize("point", [True, False])
def test_hidden_networks(tmp_path, k, kept, point):
    net = trained()
    state = wrapped(net, scores=torch.randn_like)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9).state_dict()
    content = {"epoch": 99, "arch": "Conv2", "state_dict": state, "best_acc1": 77.5}
    path = saved(tmp_path, content | {"optimizer": optimizer, "curr_acc1": torch.tensor(77.0)})
    masks = {name: lowest_dropped(state[f"module.{name}.scores"], k) for name in NAMES}
    model = Net(point)
    report = st.import_masks(path, model, density=k)
    assert report.source == "hidden-networks" and report.masks["convs.0"].kept == kept
    check(report, model, under(net, masks), masks)
    assert set(report.loaded) == {f"norm.{b}" for b in net.norm.state_dict()}


def test_hidden_networks_needs_the_density():
    state = wrapped(trained(), scores=torch.randn_like)
    with pytest.raises(ValueError, match="density: hidden-networks files do not say"):
        st.import_masks(state, Net())


# Gem-Miner --------------------------------------------------------------------------------------


def gem_miner_state(net, score):
    return wrapped(
        net,
        scores=score,
        flag=lambda w: (torch.rand_like(w) < 0.6).float(),
        bias_flag=lambda w: torch.empty(1).fill_(3.0),  # dummies without a bias
        bias_scores=lambda w: torch.empty(1).fill_(-2.0),
    )


@pytest.mark.parametrize("unflag", [False, True])
def test_gem_miner(tmp_path, unflag):
    def score(w):
        scores = 1.4 * torch.rand_like(w) - 0.2
        scores.view(-1)[:2] = torch.tensor([0.5, 1.2])  # the comparison is strict
        return scores

    net = trained()
    state = gem_miner_state(net, score)
    masks = {}
    for name in NAMES:
        flag, scores = (state[f"module.{name}.{key}"] for key in ("flag", "scores"))
        masks[name] = flag if unflag else flag * torch.gt(scores, 0.5)
    model = Net(point=True)
    report = st.import_masks(saved(tmp_path, {"state_dict": state}), model, unflag=unflag)
    assert report.source == "gem-miner"
    check(report, model, under(net, masks), masks)


def test_gem_miner_global_edge_popup(tmp_path):
    net = trained()
    state = gem_miner_state(net, torch.randn_like)
    for name in NAMES:
        state[f"module.{name}.flag"] = torch.ones_like(state[f"module.{name}.flag"])
    every = torch.cat([state[f"module.{name}.scores"].abs().flatten() for name in NAMES])
    dropped = math.ceil((1 - 0.2) * every.numel())
    threshold = every.sort().values[dropped - 1]
    masks = {name: (state[f"module.{name}.scores"].abs() > threshold).float() for name in NAMES}
    model = Net(point=True)
    report = st.import_masks(saved(tmp_path, state), model, "gem-miner", density=0.2)
    assert sum(m.kept for m in report.masks.values()) == every.numel() - dropped
    check(report, model, under(net, masks), masks)
    report = st.import_masks(state, Net(), "gem-miner", density=1.0)
    assert all(mask.density == 1 for mask in report.masks.values())


def test_gem_miner_biases_are_masked(tmp_path):
    """The intended rule; the code multiplies by the weight's mask, which runs without biases."""
    layer = nn.Linear(4, 3)
    state = {f"fc.{key}": value for key, value in layer.state_dict().items()}
    state |= {"fc.scores": torch.rand(3, 4), "fc.flag": torch.ones(3, 4)}
    state |= {"fc.bias_scores": torch.tensor([0.9, 0.2, 0.7])}
    state |= {"fc.bias_flag": torch.tensor([1.0, 1.0, 0.0])}
    model = nn.Sequential()
    model.fc = nn.Linear(4, 3)
    st.import_masks(state, model)
    assert model.fc.bias.tolist() == [layer.bias[0].item(), 0, 0]


# The frozen network -----------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_frozen(tmp_path, sparsity):
    """Global edge-popup in float32: a threshold over scores that are infinite where frozen."""
    net = trained()
    state = wrapped(
        net,
        score=torch.randn_like,
        mask=torch.zeros_like,  # of the last forward: not what counts
        ternary_frozen_mask=lambda w: torch.tensor([-1.0, 0, 0, 1])[torch.randint(4, w.shape)],
        local_sparsity=lambda w: torch.tensor([sparsity]),
        global_sparsity=lambda w: torch.tensor([sparsity]),
        scale=lambda w: torch.tensor([1.0 / math.sqrt(1 - sparsity)]),
    )
    ranked = {}
    for n in NAMES:
        frozen, score = (state[f"module.{n}.{k}"] for k in ("ternary_frozen_mask", "score"))
        ranked[n] = torch.where(frozen == 0, score.abs(), frozen * torch.inf)
    everything = torch.cat([scores.flatten() for scores in ranked.values()])
    count = int((everything.numel() * torch.tensor([sparsity])).int())
    threshold = everything.sort().values[count - 1]
    masks = {}
    for n in NAMES:
        frozen, score = (state[f"module.{n}.{k}"] for k in ("ternary_frozen_mask", "score"))
        masks[n] = ((score.abs() > threshold) | (frozen == 1)).float() * (frozen != -1)
        state[f"module.{n}.kthvalue"] = threshold.view(1)
    model = Net(point=True)
    report = st.import_masks(saved(tmp_path, state), model)
    assert report.source == "frozen"
    assert sum(m.kept for m in report.masks.values()) == everything.numel() - count
    scales = dict.fromkeys(NAMES, 1.0 / math.sqrt(1 - sparsity))
    check(report, model, under(net, masks, scales), masks)


# torch.nn.utils.prune and zeros -----------------------------------------------------------------


def test_torch_prune(tmp_path):
    net = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    prune.l1_unstructured(net[0], "weight", 0.4)
    prune.random_unstructured(net[0], "bias", 3)
    weights = [(net[0], "weight"), (net[2], "weight")]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=0.3)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    report = st.import_masks(saved(tmp_path, net.state_dict()), model)
    x = torch.randn(6, 12)
    torch.testing.assert_close(model(x), net(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(model[0].weight, net[0].weight_orig)
    assert torch.equal(model[2].mask.to_dense(), net[2].weight_mask.bool())
    assert report.source == "torch-prune" and report.unused == []


def test_zeros(tmp_path):
    def build():
        kinds = (nn.Embedding(7, 12), nn.Linear(12, 9), nn.LayerNorm(9), nn.Conv1d(5, 4, 3))
        return nn.Sequential(*kinds)

    net, model = build(), build()
    with torch.no_grad():
        net[0].weight[3] = 0
        net[1].weight[:, ::3] = 0
        net[3].weight[1] = 0
    path = tmp_path / "dense.safetensors"
    st.export_dense(net, path)
    report = st.import_masks(path, model)
    assert report.source == "zeros" and report.masks["1"].kept == 9 * 8
    x = torch.randint(7, (2, 5))
    torch.testing.assert_close(model(x), net(x), rtol=1e-5, atol=1e-6)
    for key, value in net.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


# Into which model -------------------------------------------------------------------------------


def test_sparse_layers_take_the_masks_in_place():
    net = trained()
    state = wrapped(net, scores=torch.randn_like)
    first, second = Net(point=True), Net(point=True)
    st.import_masks(state, first, density=0.5)
    layers = [first.get_submodule(name) for name in NAMES]
    report = st.import_masks(state, first, density=0.3)
    assert layers == [first.get_submodule(name) for name in NAMES]
    st.import_masks(state, second, density=0.3)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(first.eval()(x), second.eval()(x))
    assert report.masks["convs.0"].kept == 519


def test_what_does_not_match_is_told():
    state = wrapped(trained(), scores=torch.randn_like)
    state |= {"module.gone.weight": torch.ones(3, 3), "module.gone.scores": torch.ones(3, 3)}
    state["module.other"] = torch.ones(1)
    model = Net()
    model.extra = nn.Linear(2, 2)
    report = st.import_masks(state, model, density=0.3)
    assert report.unmatched == [("gone", "the model has no such layer")]
    assert report.unmasked == ["extra"] and type(model.extra) is nn.Linear
    assert report.unused == ["other"]
    assert "unmatched gone" in str(report) and "unmasked: extra" in str(report)


def test_layers_that_cannot_be_sparse_have_the_weight_under_the_mask():
    bilinear = nn.Bilinear(3, 4, 5)
    mask = torch.rand(5, 3, 4) < 0.5
    state = {"0.weight_orig": torch.randn(5, 3, 4), "0.weight_mask": mask.float()}
    state |= {"1.weight_orig": torch.randn(4, 4), "1.weight_mask": torch.ones(4, 4)}
    report = st.import_masks(state, nn.Sequential(bilinear, nn.Linear(4, 4)))
    assert torch.equal(bilinear.weight, state["0.weight_orig"] * mask)
    (name, reason), *_ = report.unmatched
    assert name == "0" and "Bilinear has no sparse form" in reason


def test_the_output_of_an_attention():
    mask = torch.rand(4, 4) < 0.5
    state = {"0.out_proj.weight_orig": torch.randn(4, 4), "0.out_proj.weight_mask": mask.float()}
    model = nn.Sequential(nn.MultiheadAttention(4, 2, bias=False))
    report = st.import_masks(state, model)
    assert set(report.masks) == {"0.out_proj"} and not report.unmatched
    made = model[0].out_proj.to_dense().weight
    assert torch.equal(made, state["0.out_proj.weight_orig"] * mask)


def test_a_wrapped_model_is_unwrapped():
    model = Net(point=True)
    report = st.import_masks(
        wrapped(trained(), scores=torch.randn_like), nn.DataParallel(model), density=0.3
    )
    assert set(report.masks) == set(NAMES) and model.convs[0].form == "masked"


def test_names_can_be_changed():
    state = {f"net.{k}": v for k, v in wrapped(trained(), scores=torch.randn_like).items()}
    report = st.import_masks(
        state, Net(), density=0.3, rename=lambda key: key.removeprefix("net.module.")
    )
    assert set(report.masks) == set(NAMES)


# Bad files --------------------------------------------------------------------------------------


def _broken(change):
    def make(tmp_path):
        state = wrapped(trained(), scores=torch.randn_like)
        change(state)
        return saved(tmp_path, {"state_dict": state})

    return make


def _bytes(cut):
    def make(tmp_path):
        path = saved(tmp_path, wrapped(trained(), scores=torch.randn_like))
        path.write_bytes(cut(path.read_bytes()))
        return path

    return make


class Unknown:
    """Not a tensor."""


BAD = {
    "cut": (_bytes(lambda raw: raw[: len(raw) // 2]), "not a checkpoint of tensors"),
    "noise": (_bytes(lambda raw: b"\x93" * 100), "not a checkpoint of tensors"),
    "empty": (_bytes(lambda raw: b""), "not a checkpoint of tensors"),
    "objects": (lambda p: saved(p, {"state_dict": {}, "args": Unknown()}), "pickled objects"),
    "list": (lambda p: saved(p, [torch.ones(2)]), "holds a list"),
    "no layers": (lambda p: saved(p, {"x": torch.ones(2)}), "no state_dict in it"),
    "no weight": (_broken(lambda s: s.pop("module.linear.0.weight")), "has no linear.0.weight"),
    "short scores": (
        _broken(lambda s: s.update({"module.linear.0.scores": torch.ones(3)})),
        r"linear.0.scores has shape \(3,\), its weight \(10, 64, 1, 1\)",
    ),
    "NaN": (_broken(lambda s: s["module.convs.0.scores"].fill_(torch.nan)), "holds NaN"),
    "shape": (
        _broken(
            lambda s: s.update(
                {f"module.linear.0.{k}": torch.ones(9, 64, 1, 1) for k in ("weight", "scores")}
            )
        ),
        r"linear.0.weight has shape \(10, 64\), the checkpoint's \(9, 64\)",
    ),
    "bias": (
        _broken(lambda s: s.update({"module.linear.0.bias": torch.ones(10)})),
        "linear.0 has no bias, the checkpoint's has",
    ),
    "norm": (
        _broken(lambda s: s.update({"module.norm.running_var": torch.ones(3)})),
        "norm.running_var has shape",
    ),
    "foreign": (
        lambda p: saved(p, {"a.weight": torch.ones(2, 2), "a.scores": torch.ones(2, 2)}),
        "nothing matches the checkpoint .*a: the model has no such layer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_changes_nothing(tmp_path, name):
    make, message = BAD[name]
    model = Net()
    before = (repr(model), {k: v.clone() for k, v in model.state_dict().items()})
    with pytest.raises(ValueError, match=message):
        st.import_masks(make(tmp_path), model, density=0.3)
    assert repr(model) == before[0]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[1][key])


def test_bad_arguments_are_named(tmp_path):
    state = wrapped(trained(), scores=torch.randn_like)
    with pytest.raises(FileNotFoundError, match="no such file"):
        st.import_masks(tmp_path / "gone.pth", Net())
    with pytest.raises(TypeError, match="checkpoint: got list"):
        st.import_masks([1], Net())
    with pytest.raises(TypeError, match="model: got dict"):
        st.import_masks(state, {})
    with pytest.raises(ValueError, match="source: got 'nni', accepted: auto, frozen, gem-miner"):
        st.import_masks(state, Net(), "nni")
    for source in SOURCES[:2]:
        with pytest.raises(ValueError, match=r"has no keys \*\."):
            st.import_masks(state, Net(), source)
    with pytest.raises(ValueError, match="density: a zeros file says itself"):
        st.import_masks(state, Net(), "zeros", density=0.5)
    with pytest.raises(ValueError, match="unflag: is of gem-miner files"):
        st.import_masks(state, Net(), density=0.5, unflag=True)
    ticket = nn.Sequential(st.SparseLinear(4, 3, form="ticket", seed=0))
    with pytest.raises(ValueError, match="form 'ticket' takes no weights of others"):
        st.import_masks({"0.weight": torch.ones(3, 4)}, ticket)
