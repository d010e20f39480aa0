"""Tickets as plain torch and as ONNX: the weights bit for bit, nothing of this library needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import oracle
import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.cli import main
from sparseticket.io import export
from sparseticket.train import build_model

pytest.importorskip("sklearn", reason="digits need the [demo] extra")


def build():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv1d(1, 6, 3, padding="same", padding_mode="circular"),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Unflatten(2, (2, 4)),
        nn.Conv2d(6, 5, (2, 3), padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(5 * 12, 3),
    )


def mlp():
    return build_model("mlp", in_shape=(1, 8, 8), num_classes=10)


@pytest.fixture
def ticket():
    """A model in ticket form whose norm has seen data, with a layer of several masks."""
    torch.manual_seed(0)
    model = build()
    model(3 * torch.randn(16, 8))
    st.sparsify_(model, st.Multicoat(density=0.5, coats="0.3,0.1", seed=3), ["5"])
    st.sparsify_(model, st.EdgePopup(density=0.3, seed=3))
    st.Ticket.from_model(model).apply(fresh := build())
    return fresh.eval()


@pytest.fixture
def onnxruntime(require):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            require("onnx", f"{name} is not installed; pip install -e '.[onnx]'")
    import onnxruntime

    return onnxruntime


def weights(model):
    return {n: m.weight for n, m in model.named_modules() if n in ("1", "5", "7")}


def layers_of_ours(model):
    return [m for m in model.modules() if type(m).__module__.startswith("sparseticket")]


def test_dense_layers_have_the_regenerated_weights_and_logits(ticket):
    dense = st.to_dense(ticket)
    assert not layers_of_ours(dense) and len(layers_of_ours(ticket)) == 3
    for name, weight in weights(ticket).items():
        assert torch.equal(weights(dense)[name], weight)
    x = torch.randn(9, 8)
    seen = {}
    hooks = [m.register_forward_hook(lambda m, a, y: seen.update({m: a[0]})) for m in dense]
    y = dense(x)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(ticket(x), y, rtol=1e-5, atol=1e-5)
    for name in ("1", "5", "7"):  # layer by layer, element by element
        plain, given = dense.get_submodule(name), seen[dense.get_submodule(name)].detach()
        exact = _in_float64(plain, given, lambda t: t)
        bound = _in_float64(plain, given, torch.abs)
        terms = _in_float64(plain, given, torch.ones_like)
        oracle.assert_bounded(ticket.get_submodule(name)(given).detach(), exact, bound, terms)


def _in_float64(layer, x, change):
    twin = st.to_dense(layer).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(change(parameter))
        return twin(change(x.double()))


def test_a_copy_without_sparse_layers_is_a_copy():
    model = build()
    assert repr(st.to_dense(model)) == repr(model) and st.to_dense(model) is not model
    layer = st.SparseLinear(3, 2, form="ticket", seed=0)
    assert type(st.to_dense(layer)) is nn.Linear
    with pytest.raises(TypeError, match="to_dense: model: got dict"):
        st.to_dense({})


PLAIN = """
import sys, torch
sys.modules["sparseticket"] = None  # an import raises
from safetensors.torch import load_file
folder = sys.argv[1]
x, y = torch.load(folder + "/xy.pt")
state = torch.load(folder + "/a.pt", weights_only=True)
other = load_file(folder + "/a.safetensors")
assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
model = torch.load(folder + "/whole.pt", weights_only=False).eval()
model.load_state_dict(state)
program = torch.export.load(folder + "/a.pt2").module()
for z, rows in ((model(x), 9), (program(x), 9), (program(x[:1]), 1)):
    torch.testing.assert_close(z, y[:rows], rtol=1e-5, atol=1e-5)
print("plain")
"""


def test_a_process_without_this_library_reads_them(ticket, tmp_path):
    x = torch.randn(9, 8)
    torch.save((x, ticket(x).detach()), tmp_path / "xy.pt")
    torch.save(st.to_dense(ticket), tmp_path / "whole.pt")
    for name in ("a.pt", "a.safetensors", "a.pt2"):
        st.export_dense(ticket, tmp_path / name, x)
    done = subprocess.run(
        [sys.executable, "-P", "-c", PLAIN, str(tmp_path)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.stdout == "plain\n", done.stderr
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    for name, weight in weights(ticket).items():
        assert torch.equal(state[f"{name}.weight"], weight)
    assert {f.name for f in tmp_path.iterdir()} == {
        *("xy.pt", "whole.pt", "a.pt", "a.safetensors", "a.pt2")
    }


def test_onnx_gives_the_logits(ticket, tmp_path, onnxruntime):
    import onnx

    path = tmp_path / "a.onnx"
    st.export_onnx(ticket, path, torch.randn(1, 8))
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 2, 9):
        x = torch.randn(count, 8)
        (y,) = session.run(["output"], {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), ticket(x).detach(), rtol=0, atol=1e-5)
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(path)).graph.initializer}
    for name, weight in weights(ticket).items():
        assert torch.equal(torch.from_numpy(stored[f"{name}.weight"].copy()), weight)
    assert [f.name for f in tmp_path.iterdir()] == ["a.onnx"]


def test_the_command_exports_a_search(tmp_path, capsys, onnxruntime):
    out = tmp_path / "run"
    assert main(["search", "--out", str(out), "--epochs", "1", "--density", "0.2"]) == 0
    ticket = str(out / "ticket.safetensors")
    model = st.Ticket.load(ticket).apply(mlp())
    x = torch.rand(5, 1, 8, 8)
    capsys.readouterr()
    assert main(["export", ticket, "--to", "onnx", "--out", str(tmp_path / "m.onnx")]) == 0
    assert "m.onnx: 3" in capsys.readouterr().out  # kB
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    (y,) = session.run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=0, atol=1e-5)
    assert main(["export", ticket, "--to", "dense", "--out", str(tmp_path / "m.safetensors")]) == 0
    report = st.import_masks(tmp_path / "m.safetensors", mlp())
    assert report.masks == st.Ticket.load(ticket).masks  # there and back


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "out: a file to write is needed"),
        (["--out", "{}/model.bin"], r"need a name in .safetensors, .pt, .pt2"),
        (["--out", "{}/gone/model.pt"], "there is no folder"),
        (["--out", "{}/model.pt", "--task", "1"], "task: got 1, the ticket has one task only"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, capsys, arguments, message):
    model = mlp()
    st.sparsify_(model, st.EdgePopup(seed=0))
    described = {"name": "mlp", "in_shape": [1, 8, 8], "num_classes": 10}
    extra = {"model": described, "data": {"dataset": "digits", "name": "digits", "batch_size": 64}}
    st.Ticket.from_model(model, extra=extra).save(tmp_path / "a.safetensors")
    given = [argument.format(tmp_path) for argument in arguments]
    assert main(["export", str(tmp_path / "a.safetensors"), *given]) == 2
    assert message in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_missing_extra_is_named(ticket, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxscript: pip install 'sparseticket\["):
        st.export_onnx(ticket, tmp_path / "a.onnx", torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"a \.pt2 program needs an example"):
        st.export_dense(ticket, tmp_path / "a.pt2")
