"""Whole models: what is converted, what is skipped and why, reports, refusals."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.formats import kept_count


@dataclass(frozen=True)
class Config:
    """Every layer alike; ``refused`` gets a plan that cannot be carried out."""

    form: str = "scored"
    density: float = 0.3
    refused: str = ""

    def plan(self, name, module):
        if module.weight.shape[0] == 1:
            return None
        density = 2.0 if name == self.refused else self.density
        return {"form": self.form, "density": density} | (
            {"seed": 1} if self.form != "masked" else {}
        )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 10, bias=False),
    )


def _input():
    return torch.randn(2, 3, 6, 6)


def _skipped(report):
    return dict(report.skipped)


@pytest.mark.parametrize("form", ["masked", "scored", "ticket"])
def test_conversion_and_its_report(form):
    model, x = _net().eval(), _input()
    report = st.sparsify_(model, Config(form=form))
    assert type(model[0]) is st.SparseConv2d and type(model[4]) is st.SparseLinear
    assert [m.form for m in (model[0], model[4])] == [form] * 2
    assert [c.name for c in report.converted] == ["0", "4"]
    assert [c.shape for c in report.converted] == [(8, 3, 3, 3), (10, 288)]
    assert [c.kept for c in report.converted] == [kept_count(0.3, 216), 864]
    assert report.dense_bytes == 4 * (216 + 8 + 2880)
    assert report.ticket_bytes == 8 * 8 + 10 * 5 * 8 + 2 * 40
    held = sum(t.nbytes for m in (model[0], model[4]) for t in (*m.parameters(), *m.buffers()))
    assert report.now_bytes == held
    assert all(sum(k.values()) == 2 for k in report.kernels.values())
    assert list(report.kernels) == [1, 128]
    text = str(report)
    for part in ("8x3x3x3", "0.3000", "bytes: 12,416 dense", "kernels at batch 1:", "speed:"):
        assert part in text
    norm = ["1.weight", "1.bias"]
    assert report.not_weight_free == ([] if form == "masked" else norm)
    assert model(x).shape == (2, 10)
    assert not model[0].training


def test_weights_are_addressed_by_qualified_name():
    a, b = _net(), _net()
    st.sparsify_(a, Config())
    wrapped = nn.Module()
    wrapped.module = b  # as DDP names it
    st.sparsify_(wrapped, Config())
    for i in (0, 4):
        assert torch.equal(a[i].weight, b[i].weight) and a[i].mask == b[i].mask
    nested = nn.ModuleDict({"net": _net()})
    st.sparsify_(nested, Config())
    assert not torch.equal(nested["net"][4].weight, a[4].weight)


def test_forms_round_trip_and_densify():
    model, x = _net().eval(), _input()
    st.sparsify_(model, Config())
    y = model(x)
    report = st.to_form_(model, "ticket")
    assert [c.kind for c in report.converted] == ["SparseConv2d ticket", "SparseLinear ticket"]
    assert report.now_bytes == report.ticket_bytes - 2 * 40 + 4 * 8  # and one bias
    torch.testing.assert_close(model(x), y)
    report = st.densify_(model)
    assert [type(m) for m in (model[0], model[4])] == [nn.Conv2d, nn.Linear]
    assert [c.kind for c in report.converted] == ["Conv2d", "Linear"]
    assert report.kernels == {}
    torch.testing.assert_close(model(x), y)
    for verb in (st.densify_, lambda m: st.to_form_(m, "ticket")):
        with pytest.raises(ValueError, match="no sparse modules"):
            verb(model)


def test_to_form_of_a_model_is_all_or_nothing():
    model = nn.Sequential(_net(), nn.Linear(10, 10))
    st.sparsify_(model[0], Config(form="ticket"))
    st.sparsify_(model, Config(form="masked"), ["1"])
    before = list(model.modules())
    with pytest.raises(ValueError, match="drawn from a seed"):
        st.to_form_(model, "scored")
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


# Skipped --------------------------------------------------------------------------------------


def test_layers_whose_owner_reads_the_weight_are_skipped():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoder(layer, 1), nn.Linear(16, 4))
    expected, x = copy.deepcopy(model).eval(), torch.randn(3, 5, 16)
    report = st.sparsify_(model, Config(form="masked", density=1.0), ["0", "2", "*.linear?"])
    skipped, prefix = _skipped(report), "1.layers.0."
    for name, owner in (
        ("linear1", "TransformerEncoderLayer"),
        ("linear2", "TransformerEncoderLayer"),
        ("self_attn.out_proj", "MultiheadAttention"),
    ):
        assert skipped[prefix + name] == f"{owner} reads its .weight directly"
    assert skipped[prefix + "self_attn"] == "left out by filter_fn"
    assert [m.form for m in (model[0], model[2])] == ["masked"] * 2
    with torch.no_grad():  # the fast path
        torch.testing.assert_close(model.eval()(x), expected(x))
    decoder = nn.TransformerDecoderLayer(16, 2, 32)  # has no fast path
    converted = [c.name for c in st.sparsify_(decoder, Config(), ["linear?"]).converted]
    assert converted == ["linear1", "linear2"]


def test_torchvisions_swin_blocks_read_weights_too():
    class ShiftedWindowAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.other = (nn.Linear(8, 8) for _ in range(3))

    report = st.sparsify_(ShiftedWindowAttention(), Config())
    assert [c.name for c in report.converted] == ["other"]
    assert set(_skipped(report)) == {"qkv", "proj"}


def test_tied_computed_and_hooked_weights_are_skipped():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 8),
            "head": nn.Linear(8, 10),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "old": nn.utils.spectral_norm(nn.Linear(8, 8)),
            "hooked": nn.Linear(8, 8),
            "single": nn.Linear(8, 1),
            "conv3d": nn.Conv3d(8, 8, 3),
            "done": st.SparseLinear(8, 8, form="masked"),
            "plain": nn.Linear(8, 8),
        }
    )
    model["head"].weight = model["embed"].weight
    model["hooked"].register_forward_pre_hook(lambda *_: None)
    report = st.sparsify_(model, Config())
    assert [c.name for c in report.converted] == ["plain"]
    for name, text in {
        "embed": "shares a parameter with head",
        "head": "shares a parameter with embed",
        "normed": "not exactly nn.Linear",
        "old": "computed by hooks",
        "hooked": "hooks",
        "single": "left dense by the config",
        "conv3d": "Conv3d has no sparse form",
        "done": "already sparse (masked)",
    }.items():
        assert text in _skipped(report)[name], name
    assert f"skipped hooked: {_skipped(report)['hooked']}" in str(report)


def test_a_module_under_two_names_is_converted_once():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 8)})
    report = st.sparsify_(model, Config())
    assert [c.name for c in report.converted] == ["a", "c"]
    assert model["a"] is model["b"][0] and type(model["a"]) is st.SparseLinear
    st.densify_(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.Linear


@pytest.mark.parametrize(
    ("filter_fn", "names"),
    [
        (lambda module, name: isinstance(module, nn.Linear), ["4"]),
        (["4"], ["4"]),
        (["?"], ["0", "4"]),
        (("0", "nothing"), ["0"]),
    ],
)
def test_filters(filter_fn, names):
    report = st.sparsify_(_net(), Config(), filter_fn)
    assert [c.name for c in report.converted] == names
    left_out = {name for name, reason in report.skipped if reason == "left out by filter_fn"}
    assert left_out == {"0", "4"} - set(names)


# Refusals -------------------------------------------------------------------------------------


def test_a_refused_plan_changes_nothing():
    model = _net()
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="density: got 2"):
        st.sparsify_(model, Config(refused="4"))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "kwargs", "error", "text"),
    [
        (nn.Linear(3, 2), {}, ValueError, "SparseLinear.from_dense"),
        (st.SparseLinear(3, 2), {}, ValueError, "cannot be replaced in place"),
        (nn.Sequential(nn.ReLU()), {}, ValueError, "no layers with weights"),
        (nn.Sequential(nn.Conv3d(3, 2, 1)), {}, ValueError, "Conv3d has no sparse form"),
        (_net(), {"filter_fn": ["x*"]}, ValueError, "0: left out by filter_fn"),
        (_net(), {"filter_fn": "4"}, TypeError, "filter_fn: got '4'"),
        (_net(), {"filter_fn": 4}, TypeError, "filter_fn: got 4"),
        (_net().to("meta"), {}, ValueError, "meta device"),
    ],
)
def test_sparsify_refuses(model, kwargs, error, text):
    before = list(model.modules())
    with pytest.raises(error, match=text):
        st.sparsify_(model, Config(), **kwargs)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


class _Broken(Config):
    def finish(self, model, wanted):
        assert type(model[0]) is st.SparseConv2d and wanted(model[1], "1")
        raise RuntimeError("no")


def test_a_finish_that_raises_changes_nothing():
    model = _net()
    before = list(model.modules())
    with pytest.raises(RuntimeError, match="no"):
        st.sparsify_(model, _Broken())
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (lambda: nn.LazyLinear(3), ["1.weight", "1.bias"]),
        (lambda: nn.Linear(4, 3, device="meta"), ["1.weight", "1.bias"]),
        (lambda: nn.LazyBatchNorm1d(), []),
        (lambda: nn.LazyConv1d(3, 1), ["1.weight", "1.bias"]),
    ],
)
def test_layers_without_storage_must_be_stored(layer, names):
    model = nn.Sequential(nn.Linear(3, 4), layer())
    report = st.sparsify_(model, st.EdgePopup())
    assert type(model[0]) is st.SparseLinear
    assert set(names) <= set(report.not_weight_free)


@pytest.mark.parametrize("config", [None, {}, "edge-popup"])
def test_sparsify_names_a_bad_config(config):
    with pytest.raises(TypeError, match="config: got"):
        st.sparsify_(_net(), config)


def test_in_place_verbs_refuse_what_is_no_module():
    for verb in (
        lambda m: st.sparsify_(m, Config()),
        st.densify_,
        lambda m: st.to_form_(m, "ticket"),
    ):
        with pytest.raises(TypeError, match=r"model: got int, need an nn\.Module"):
            verb(3)


def test_in_place_verbs_refuse_a_single_module():
    module = st.SparseLinear(3, 2)
    with pytest.raises(ValueError, match=r"use \.to_dense"):
        st.densify_(module)
    with pytest.raises(ValueError, match=r"use \.to_form\('ticket'\)"):
        st.to_form_(module, "ticket")


# explain --------------------------------------------------------------------------------------


def test_explain_tells_the_kernel_and_why():
    linear = st.SparseLinear(64, 8, form="ticket", seed=0)
    few, many = (st.explain(linear, torch.randn(n, 64)) for n in (1, 1000))
    assert few.op == many.op == "ticket_linear"
    assert few.kernel.startswith("lookup gemv seed") and many.kernel == "materialised"
    assert "8 outputs < 64" in str(many)
    conv = st.SparseConv2d(4, 8, 3, form="scored", seed=0)
    assert st.explain(conv, torch.randn(2, 4, 9, 9)).op == "popup_weight"
    conv = st.SparseConv2d(4, 8, 3, form="scored", seed=0, density=0.1)
    assert st.explain(conv, torch.randn(2, 4, 9, 9)).op == "popup_conv2d"
    w = torch.randn(8, 64)
    words = st.PackedMask.full((8, 64)).words
    assert st.explain("masked_linear", torch.randn(1, 64), w, words).op == "masked_linear"
    with pytest.raises(ValueError, match="unknown op 'spmm'"):
        st.explain("spmm")
    with pytest.raises(TypeError, match="explain: got Linear"):
        st.explain(nn.Linear(3, 2), torch.randn(1, 3))
