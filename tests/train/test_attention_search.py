"""Tickets of a small language model: tables, files, resuming, and what a decoder must hold to."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import sparseticket as st
from sparseticket.cli import main
from sparseticket.train import attention
from sparseticket.train.models import build_model
from sparseticket.train.text import DrawnWindows, Windows, load_text
from sparseticket.train.transformers import Decoder

SMALL = {"widths": "16", "layers": 1, "heads": 2, "context": 12, "batch_size": 8, "seeds": 2}
SMALL |= {"epochs": 2, "steps": 6, "density": 0.5, "scale": "density"}


@pytest.fixture
def settings(tmp_path):
    """A config whose text, made here, has an order that can be learnt."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 120, encoding="utf-8")
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"experiment": "attention", "text": f"file:{text}"}))
    return ["search", "--config", str(file)]


def test_the_table_and_its_files(settings, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*settings, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "width 16, ticket, unscaled" in printed and "logits of every ticket file" in printed
    report = json.loads((out / "report.json").read_text())
    means = {row["kind"]: row["mean"] for row in report["rows"]}
    assert set(means) == {"scaled", "unscaled", "random", "dense"}
    assert means["dense"] < means["random"] and means["scaled"] < means["random"]
    assert report["reloads_identical"] is True
    assert all(len(row["val_loss"]) == 2 for row in report["rows"])
    (gains,) = report["scaled_minus_unscaled"].values()
    rows = {row["kind"]: row["val_loss"] for row in report["rows"]}
    assert gains == [a - b for a, b in zip(rows["scaled"], rows["unscaled"], strict=True)]
    ticket = st.Ticket.load(out / "ticket.safetensors")
    assert report["kept"] == sum(mask.kept for mask in ticket.masks.values())
    assert (out / "curves.png").exists() and (out / "masks.png").exists()
    assert main([*settings, "--out", str(out)]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_an_interrupted_run_continues_bit_for_bit(settings, tmp_path, monkeypatch):
    assert main([*settings, "--out", str(tmp_path / "whole")]) == 0
    make, calls = attention._search, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "_search", interrupted)
        assert main([*settings, "--out", str(tmp_path / "parts")]) == 130
    assert main([*settings, "--out", str(tmp_path / "parts")]) == 0
    whole, parts = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "parts")
    )
    assert whole["rows"] == parts["rows"]
    one, other = (
        (tmp_path / name / "ticket.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert one == other


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widths", "a"], "widths: got 'a'"),
        (["--widths", "16,16"], "different widths"),
        (["--widths", "15"], "heads: got 2, need a divisor of the width 15"),
        (["--method", "gem-miner"], "need one whose config has qk_scale"),
        (["--text", "poem"], "got 'poem', known: tinyshakespeare"),
        (["--text", "file:none.txt"], "there is no none.txt"),
    ],
)
def test_bad_arguments(settings, tmp_path, capsys, flags, message):
    assert main([*settings, "--out", str(tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_decoder_does_not_see_the_future():
    torch.manual_seed(0)
    model = Decoder(11, 8, 16, 2, 2).eval()
    tokens = torch.randint(11, (3, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    a, b = (model(t).view(3, 8, 11) for t in (tokens, changed))
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.equal(a[:, 5:], b[:, 5:])


def test_a_decoders_ticket_is_weight_free():
    model = Decoder(11, 8, 16, 1, 2)
    st.sparsify_(model, st.EdgePopup(density=0.5))
    ticket = st.Ticket.from_model(model)
    assert not ticket.info()["not_weight_free"]


def test_windows(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 40, encoding="utf-8")
    text = load_text(f"file:{path}")
    assert [len(part) for part in (text.train, text.val, text.test)] == [360, 20, 20]
    assert text.vocabulary == "abcdefghij"
    drawn = DrawnWindows(text.train, 6, 4, 5, 3)
    first = [(x.clone(), y.clone()) for x, y in drawn]
    assert len(first) == 5
    for x, y in first:
        assert x.shape == (4, 6) and y.numel() == 24
        assert torch.equal(y.view(4, 6)[:, :-1], x[:, 1:])  # the next character
    drawn.set_epoch(1)
    assert not all(torch.equal(x, x2) for (x, _), (x2, _) in zip(first, drawn, strict=True))
    seen = torch.cat([x.flatten() for x, _ in Windows(text.val, 6, 2)])
    assert torch.equal(seen, text.val[: len(seen)]) and len(seen) >= 18


def test_a_vision_transformer_takes_a_step():
    torch.manual_seed(0)
    model = build_model("vit", in_shape=(1, 8, 8), num_classes=10)
    st.sparsify_(model, st.EdgePopup(density=0.5))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    st.attach(model, optimizer)
    x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert model(x).shape == (4, 10) and model(x).isfinite().all()
