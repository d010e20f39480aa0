from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import assert_bounded
from torch import nn

import sparseticket as st
from sparseticket.nn import tuning


def _model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        st.SparseConv2d(3, 8, 3, padding=1, density=0.4, seed=0, dtype=dtype),
        nn.ReLU(),
        nn.Flatten(),
        st.SparseLinear(8 * 25, 7, density=0.4, seed=1, dtype=dtype),
    ).eval()


@pytest.fixture
def clock(monkeypatch):
    """Timings as told: seconds of the table's kernel and of the dense product."""

    def told(table: float, dense: float) -> None:
        monkeypatch.setattr(tuning, "_medians", lambda *_: [table, dense])

    return told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_faster_and_says_so(clock, dtype):
    model, x = _model(dtype), torch.randn(2, 3, 5, 5, dtype=dtype)
    before = {
        name: st.explain(m, m.example(2)).kernel
        for name, m in model.named_children()
        if isinstance(m, (st.SparseConv2d, st.SparseLinear))
    }
    clock(2.0, 1.0)
    tuned = st.tune(model, x)
    assert list(tuned) == ["0", "3"]
    assert tuned["0"] == tuning.Tuned("shadow", 2000.0, 1000.0)
    assert st.explain(model[3], torch.randn(2, 200, dtype=dtype)).kernel == "shadow"
    clock(1.0, 2.0)
    assert {name: t.kernel for name, t in st.tune(model, x).items()} == before
    assert "shadow" not in dict(model[0].named_buffers())


def test_real_timings_change_no_result_beyond_rounding():
    model, x = _model(), torch.randn(2, 3, 5, 5)
    plain = copy.deepcopy(model).double()
    tuned = st.tune(model, x, samples=2)
    assert all(t.table_ms > 0 and t.dense_ms > 0 for t in tuned.values())
    hidden = model[:3](x)
    w, bias = plain[3].weight * plain[3].mask.to_dense(), plain[3].bias
    bound = hidden.double().abs() @ w.abs().t() + bias.abs()
    assert_bounded(model[3](hidden), hidden.double() @ w.t() + bias, bound, torch.tensor(200.0))


def test_a_stored_product_goes_when_anyone_writes(clock):
    x = torch.randn(2, 3, 5, 5)
    clock(2.0, 1.0)
    for change in (
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: setattr(m, "mask", m.mask),
        lambda m: m.double(),
    ):
        model = _model()
        st.tune(model, x)
        with torch.no_grad():
            model[3].weight.mul_(2)
        assert st.explain(model[3], torch.randn(2, 200)).kernel != "shadow"
        change(model[0])
        y = x.to(model[0].weight.dtype)
        assert st.explain(model[0], y).kernel != "shadow"
    model = _model()
    st.tune(model, x)
    assert set(model.state_dict()) == set(_model().state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert st.explain(copied[0], x).kernel != "shadow"
    assert st.tune(model) == {} and st.explain(model[0], x).kernel != "shadow"


def test_gradients_and_compiled_calls_on_a_tuned_layer(clock):
    clock(2.0, 1.0)
    layer, x = st.SparseLinear(70, 5, density=0.4, seed=0).eval(), torch.randn(3, 70)
    plain = copy.deepcopy(layer)
    st.tune(layer, x)
    for m in (layer, plain):
        m(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    with torch.no_grad():  # a compiled graph sees no versions: it must not use what is stale
        layer.weight.mul_(2)
        plain.weight.mul_(2)
    torch.testing.assert_close(compiled(x), plain(x))


def test_errors():
    model, x = _model(), torch.randn(2, 3, 5, 5)
    with pytest.raises(TypeError, match="tune: model: got Tensor, need an nn"):
        st.tune(x, x)
    with pytest.raises(ValueError, match="tune: samples: got 0, need an integer >= 1"):
        st.tune(model, x, samples=0)
    with pytest.raises(ValueError, match="tune: model: it has no sparse module in form 'masked'"):
        st.tune(nn.Linear(3, 3), x)
    with pytest.raises(ValueError, match="tune: model: got training mode"):
        st.tune(model.train(), x)
    model = model.eval()
    model.spare = st.SparseLinear(3, 3, seed=0).eval()
    model.forward = lambda x: model[0](x)
    with pytest.raises(ValueError, match="never calls 3, spare"):
        st.tune(model, x)
