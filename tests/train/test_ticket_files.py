"""``check`` and ``export`` of the tickets of every experiment, small and without outside data."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sparseticket as st
from sparseticket.cli import main
from sparseticket.train import generative
from sparseticket.train.extractors import Extractor
from sparseticket.train.generators import build_generator
from sparseticket.train.transformers import Decoder

pytest.importorskip("sklearn", reason="digits need the [demo] extra")

CONTROLS = ["ticket", "shuffled mask", "redrawn weights", "inverted mask"]
SENTENCE = "the cat sat on the mat. "
DECODER = {"context": 12, "width": 16, "layers": 1, "heads": 2}
GENERATOR = {"in_shape": (1, 8, 8), "latent": 8, "width": 16}


def search(folder, experiment, *flags):
    out = folder / "run"
    given = ["--experiment", experiment, "--scale", "density", "--out", str(out), *flags]
    assert main(["search", *given]) == 0
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """An attention search on a text made here, and that text."""
    folder = tmp_path_factory.mktemp("text")
    path = folder / "text.txt"
    path.write_text(SENTENCE * 120, encoding="utf-8")
    shape = ["--context", "12", "--widths", "16", "--layers", "1", "--heads", "2"]
    budget = ["--seeds", "1", "--epochs", "4", "--steps", "25", "--density", "0.5"]
    return search(folder, "attention", "--text", f"file:{path}", *shape, *budget), path


@pytest.fixture(scope="module", params=["mlp", "conv"])
def pictures(tmp_path_factory, request):
    """A generative search on digits, random extractor; its generator's name."""
    shape = ["--generator", request.param, "--width", "16", "--latent", "8"]
    budget = ["--epochs", "2", "--steps", "20", "--lr", "3e-2", "--samples", "1000"]
    flags = [*shape, *budget, "--density", "0.3", "--no-controls"]
    return search(tmp_path_factory.mktemp("pictures"), "generative", *flags), request.param


def check(capsys, out, *flags):
    capsys.readouterr()
    arguments = ["check", str(out / "ticket.safetensors"), "--seeds", "2", *flags]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    return result, capsys.readouterr().out


def rows_of(result, measure):
    rows = [row for row in result["rows"] if row["measure"] == measure]
    assert [row["control"] for row in rows] == CONTROLS
    assert [len(row["scores"]) for row in rows] == [1, 2, 2, 2]
    for row in rows[1:]:
        assert row["std"] == pytest.approx(torch.tensor(row["scores"]).std().item(), rel=1e-4)
    return rows


def failure(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_controls_of_a_language_model(text, capsys):
    out, path = text
    report = json.loads((out / "report.json").read_text())
    best = json.loads((out / "runs" / report["best"] / "result.json").read_text())
    result, printed = check(capsys, out, "--dataset", f"file:{path}")
    ticket, *controls = rows_of(result, "validation loss")
    assert ticket["scores"] == [best["val_loss"]]
    assert all(min(row["scores"]) > best["val_loss"] + 0.5 for row in controls)
    assert rows_of(result, "validation accuracy")[0]["scores"] == [best["val_accuracy"]]
    assert (result["model"], result["dataset"]) == ("decoder", "text file")
    assert f"{best['val_loss']:.4f}" in printed and f"{100 * best['val_accuracy']:.2f} %" in printed


def test_controls_of_a_generator(pictures, capsys):
    out, name = pictures
    report = json.loads((out / "report.json").read_text())["rows"]["ticket"]
    result, printed = check(capsys, out)
    ticket, *controls = rows_of(result, "moment distance")
    assert ticket["scores"] == [report["distance"]]
    assert all(min(row["scores"]) > 1.5 * report["distance"] for row in controls)
    assert rows_of(result, "Frechet distance")[0]["scores"] == [report["frechet"]]
    assert (result["model"], result["samples"]) == (f"generator {name}", 1000)
    assert len(result["rows"]) == 8 and f"{report['distance']:.4f}" in printed
    kept, _ = check(capsys, out, "--norms", "kept")
    assert kept["rows"][0] == ticket and kept["rows"][1] != controls[0]


def test_a_classifying_extractor_also_counts(pictures, capsys, monkeypatch):
    def classifier(name, in_shape, **where):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3))
        return Extractor(net, classes=3)

    monkeypatch.setattr(generative, "build_extractor", classifier)
    result, printed = check(capsys, pictures[0])
    for row in rows_of(result, "classes seen"):
        assert 1 <= row["mean"] <= 3
    for row in rows_of(result, "more than 0.9 sure"):
        assert 0 <= row["mean"] <= 1
    assert printed.count(" %") > 8


def test_what_is_missing_is_named(text, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SPARSETICKET_DATA", raising=False)
    file = text[0] / "ticket.safetensors"
    assert "--dataset file:PATH" in failure(capsys, "check", file)
    message = failure(capsys, "check", file, "--dataset", "tinyshakespeare")
    assert "--data DIR, or SPARSETICKET_DATA" in message
    other = tmp_path / "other.txt"
    other.write_text("Quite another one. " * 90, encoding="utf-8")
    message = failure(capsys, "check", file, "--dataset", f"file:{other}")
    assert "characters that the vocabulary lacks: ['Q'," in message
    message = failure(capsys, "check", file, "--samples", "1000")
    assert "samples: got 1000, the ticket is of a language model" in message
    assert "need a name in" in failure(capsys, "export", file, "--out", tmp_path / "a.bin")

    model = build_generator("mlp", **GENERATOR)
    st.sparsify_(model, st.EdgePopup(seed=0))
    made = GENERATOR | {"name": "mlp", "in_shape": [1, 8, 8]}
    data = {"dataset": "digits", "name": "digits", "batch_size": 8}
    extra = {"generator": made, "data": data, "extractor": "lenet", "samples": 1000, "seed": 0}
    st.Ticket.from_model(model, extra=extra).save(tmp_path / "lenet.safetensors")
    message = failure(capsys, "check", tmp_path / "lenet.safetensors")
    assert "lenet: no weights found" in message and "--extractor-file" in message
    st.Ticket.from_model(model).save(tmp_path / "bare.safetensors")
    for command in ("check", "export"):
        given = ["--out", tmp_path / "a.pt"] if command == "export" else []
        message = failure(capsys, command, tmp_path / "bare.safetensors", *given)
        assert "does not say which model and data it is for" in message


def drawn(ticket):
    """The masked weights by name, from the seeds and masks alone."""
    return {
        name: st.regenerate(e["seed"], name, e["shape"], sigma=e["sigma"])
        * ticket.masks[name].to_dense()
        for name, e in ticket.meta["layers"].items()
    }


def packed(weights):
    """As in a dense state_dict: nn.MultiheadAttention has query, key, value in one tensor."""
    parts, dense = {}, {}
    for name, weight in weights.items():
        owner, _, child = name.rpartition(".")
        if child in ("q_proj", "k_proj", "v_proj"):
            parts.setdefault(f"{owner}.in_proj_weight", {})[child] = weight
        else:
            dense[f"{name}.weight"] = weight
    order = ("q_proj", "k_proj", "v_proj")
    return dense | {name: torch.cat([p[key] for key in order]) for name, p in parts.items()}


def exported(out, tmp_path, model, x):
    """Export both ways, compare them in a plain torch ``model``; what runs the ONNX file."""
    file = out / "ticket.safetensors"
    expected = packed(drawn(st.Ticket.load(file)))
    for to, name in (("dense", "a.safetensors"), ("dense", "a.pt2"), ("onnx", "a.onnx")):
        assert main(["export", str(file), "--to", to, "--out", str(tmp_path / name)]) == 0
    state = load_file(tmp_path / "a.safetensors")
    model.load_state_dict(state)
    model.eval()
    program = torch.export.load(tmp_path / "a.pt2").module()
    import onnx
    import onnxruntime

    stored = {
        i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy())
        for i in onnx.load(str(tmp_path / "a.onnx")).graph.initializer
    }
    for name, weight in expected.items():
        assert torch.equal(state[name], weight) and torch.equal(stored[name], weight), name
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))

    def run(x):
        return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

    for count in (1, len(x)):
        y = model(x[:count]).detach()
        torch.testing.assert_close(run(x[:count]), y, rtol=0, atol=1e-5)
        torch.testing.assert_close(program(x[:count]), y, rtol=0, atol=1e-5)
    return run


@pytest.fixture
def onnx(require):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            require("onnx", f"{name} is not installed; pip install -e '.[onnx]'")


def test_a_language_model_leaves(text, tmp_path, onnx):
    ticket = st.Ticket.load(text[0] / "ticket.safetensors")
    vocabulary = ticket.meta["extra"]["decoder"]["vocabulary"]
    assert vocabulary == "".join(sorted(set(SENTENCE)))
    x = torch.randint(len(vocabulary), (3, 12), generator=torch.Generator().manual_seed(0))
    run = exported(text[0], tmp_path, Decoder(len(vocabulary), **DECODER), x)
    later = x.clone()
    later[:, 7:] = (later[:, 7:] + 1) % len(vocabulary)
    a, b = (run(t).view(3, 12, -1) for t in (x, later))
    assert torch.equal(a[:, :7], b[:, :7])  # the causal mask went along
    assert not torch.equal(a[:, 7:], b[:, 7:])
    found = ticket.apply(Decoder(len(vocabulary), **DECODER)).eval()
    torch.testing.assert_close(run(x), found(x).detach(), rtol=0, atol=1e-5)


def test_a_generator_leaves(pictures, tmp_path, onnx):
    out, name = pictures
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    run = exported(out, tmp_path, build_generator(name, **GENERATOR), z)
    ticket = st.Ticket.load(out / "ticket.safetensors")
    found = ticket.apply(build_generator(name, **GENERATOR)).eval()
    torch.testing.assert_close(run(z), found(z).detach(), rtol=0, atol=1e-5)
