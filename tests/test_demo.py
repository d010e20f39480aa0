"""The main job, as `make demo` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseticket as st
from sparseticket.cli import main
from sparseticket.train import experiments

pytest.importorskip("sklearn", reason="digits need the [demo] extra")


def test_demo_tells_the_whole_story(tmp_path):
    out = tmp_path / "demo"
    package = str(Path(st.__file__).parents[1])
    paths = package + os.pathsep + os.environ.get("PYTHONPATH", "")
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "sparseticket", "demo", "--out", str(out), "--threads", threads],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    dense, random, half, tenth = report["rows"]
    assert dense["test_accuracy"] >= 0.95
    assert random["test_accuracy"] <= 0.25
    assert half["test_accuracy"] >= 0.95 and half["kept"] == 42240
    assert tenth["test_accuracy"] >= 0.95 and tenth["kept"] == 8448
    assert report["same"]
    for row in (half, tenth):
        assert row["reloaded_accuracy"] == row["test_accuracy"]
        assert row["what"] in done.stdout and f"{row['bytes']:,}" in done.stdout
    assert dense["bytes"] == 4 * 84480 > 20 * half["bytes"] > 20 * tenth["bytes"]
    assert "the same accuracy" in done.stdout
    assert "epoch 30/30" in done.stderr
    tickets = {path.parent.name: path for path in out.rglob("ticket.safetensors")}
    assert tickets.keys() == {"density-0.5", "density-0.1"}
    for picture in (out / "curves.png", *(t.with_name("masks.png") for t in tickets.values())):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_fails_when_a_reloaded_ticket_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "_evaluate_elsewhere", lambda path, options: 0.5)
    arguments = ["demo", "--out", str(tmp_path), "--epochs", "1"]
    assert main(arguments) == 1
    assert "another accuracy" in capsys.readouterr().err
    assert main(arguments) == 1  # a second demo replaces the first
