"""The rehearsal of what a GPU machine will be asked: same script, small cases, interpreter."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_rehearsal(tmp_path, require):
    if importlib.util.find_spec("triton") is None:
        require("triton", "it is not installed")
    env = {**os.environ, "REHEARSE": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", "bench/device.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    from bench.device import GPU_CASES

    assert {row["op"] for row in rows} == set(GPU_CASES)
    assert all(row["gpu"] == "none" and float(row["eager_ms"]) > 0 for row in rows)
    ours = [row for row in rows if row["contender"] == "ours"]
    assert {row["op"] for row in ours} == set(GPU_CASES)
    timed = [row for row in ours if row["op"] != "networks"]
    assert all(float(row["limit_ms"]) > 0 for row in timed)
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.csv"], "logs are not results"


def test_a_wrong_result_is_no_row(monkeypatch):
    torch = pytest.importorskip("torch")
    from bench import device
    from bench.gpu_cases import GpuCase

    one = torch.ones(1)
    case = GpuCase("wrong", {"ours": lambda: one}, 4, expected=lambda: one + 1)
    with pytest.raises(AssertionError, match="op wrong: ours is not what it should be"):
        device.time_case("op", case, device.Limits(1.0, 1.0), torch.device("cpu"))


@pytest.mark.parametrize(("tolerance", "accepted"), [(0.0, False), (0.001, False), (0.1, True)])
def test_products_are_checked_within_a_tolerance(tolerance, accepted):
    torch = pytest.importorskip("torch")
    from bench import device

    expected = torch.tensor([10.0, -1.0])
    assert device._same(expected + 0.5, expected, tolerance) == accepted
    assert not device._same(expected * float("nan"), expected, tolerance)
