"""The theory experiments end to end, small: files, tables, and what must hold in every row."""

from __future__ import annotations

import csv
import json
import math

import pytest

from sparseticket.cli import main
from sparseticket.train.theory import EXPERIMENTS

SMALL = {
    "pensia": {"hidden": 16, "epochs": 2},
    "er": {"pairs": 60, "runs": 40, "base": 8, "eps": 0.05, "vgg": 8},
    "attention": {
        "max_width": 20,
        "sources": 2,
        "max_length": 32,
        "blocks": 2,
        "block_sources": 2,
    },
    "plant": {"samples": 200, "epochs": 1, "rounds": 2, "round_epochs": 1, "width": 40},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="pictures need the [demo] extra")
    found = {}

    def get(name):
        if name not in found:
            out = tmp_path_factory.mktemp(name)
            flags = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL[name].items()]
            assert main(["theory", name, "--out", str(out), *flags]) == 0
            found[name] = json.loads((out / "report.json").read_text())
            assert not found[name]["missing"]
            assert (out / f"{name}.png").stat().st_size > 10_000
            rows = list(csv.reader((out / f"{name}.csv").open()))
            tables = found[name]["tables"]
            assert len(rows) == sum(len(t) + 1 for t in tables.values())
        return found[name]

    return get


@pytest.mark.parametrize("name", SMALL)
def test_an_experiment_from_the_command_line(reports, name, capsys):
    report = reports(name)
    assert report["experiment"] == name
    config = report["config"]
    assert {key: config[key] for key in SMALL[name]} == SMALL[name]
    for rows in report["tables"].values():
        assert rows
        for row in rows:
            assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))


def test_pensia_rows(reports):
    for row in reports("pensia")["tables"]["networks"]:
        assert row["weights"] <= 64 * 16 + 16 * 10
        assert row["failed"] <= 0.01 * row["subset_sums"]
        assert abs(row["accuracy"] - row["target_accuracy"]) <= 0.03


def test_er_rows(reports):
    tables = reports("er")["tables"]
    for row in tables["coverage"]:
        if row["part"] == 1.0:
            nominal = row["nominal"]
            assert row["covered"] >= nominal - 4 * math.sqrt(nominal * (1 - nominal) / 40)
    for row in tables["rules"]:
        assert row["achieved"] == pytest.approx(row["asked"], rel=1e-9)
        assert row["published"] <= row["achieved"] * (1 + 1e-9)
        assert row["effective"] <= row["asked"] * 1.001
        assert row["repaired_effective"] > 0
    for row in tables["tickets"]:
        if row["ticket"] == "weak" and not row["missing"]:
            assert row["sup_error"] < 1e-3
            assert row["accuracy"] == row["target_accuracy"]


def test_attention_rows(reports):
    tables = reports("attention")["tables"]
    assert all(row["held"] for row in tables["length"])
    for row in tables["width"]:
        assert row["median"] <= row["bound"]
    assert {(row["init"], row["blocks"]) for row in tables["fits"]} == {
        (init, blocks) for init in ("theory", "xavier") for blocks in range(3)
    }


def test_plant_rows(reports):
    tables = reports("plant")["tables"]
    rows = tables["recovery"]
    known = rows[0]
    assert known["method"] == "planted ticket" and known["iou"] == 1 and known["accuracy"] > 0.9
    methods = {row["method"] for row in rows}
    assert {"magnitude", "random", "snip", "grasp", "synflow", "edge-popup"} < methods
    assert len(rows) == 1 + 3 * (4 * 2 + 1 + 2)
    for row in rows[1:]:
        assert row["density"] == pytest.approx(row["asked"], abs=2e-3)
        assert 0 <= row["iou"] < 1 and row["effective"] <= row["density"] + 1e-12
        assert not row["collapsed"] or row["effective"] == 0
    assert tables["planted"][0]["weights"] == 108


def test_planted_regression(tmp_path):
    config = EXPERIMENTS["plant"].Config(**SMALL["plant"], target="relu", depth=3)
    report = EXPERIMENTS["plant"].run(config, tmp_path)
    rows = report["tables"]["recovery"]
    assert rows[0]["mse"] < 2e-4 and all("accuracy" not in row for row in rows)


def test_unknown_experiments(capsys):
    assert main(["theory", "x"]) == 2
    assert "invalid choice: 'x'" in capsys.readouterr().err
    assert main(["theory", "attention", "--max-width", "8"]) == 2
    assert "max_width: got 8" in capsys.readouterr().err
