"""The theory experiments end to end, small: files, tables, and what must hold in every row."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from torch import nn

from sparseticket.cli import main
from sparseticket.train.theory import EXPERIMENTS
from sparseticket.train.theory.compare import _live

SMALL = {
    "subset-sum": {"count": 300},
    "malach": {"runs": 10, "neurons": 128, "sources": 2},
    "log": {"runs": 5, "weights": 4},
    "pensia": {"hidden": 16, "epochs": 2},
    "universal": {"sources": 1, "max_knots": 20, "max_width": 12, "points": 400},
    "er": {"pairs": 60, "runs": 40, "base": 8, "eps": 0.05, "vgg": 8},
    "attention": {
        "max_width": 20,
        "sources": 2,
        "max_length": 32,
        "blocks": 2,
        "block_sources": 2,
    },
    "lplus1": {"hidden": 8, "channels": 2, "epochs": 1, "images": 40, "sources": 2},
    "plant": {"samples": 200, "epochs": 1, "rounds": 2, "round_epochs": 1, "width": 40},
    "compare": {"smallest": 0.1, "source": 10**6, "seeds": 1},
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


def test_subset_sum_rows(reports):
    tables = reports("subset-sum")["tables"]
    for row in tables["min_error"]:
        assert 0 < row["median"] <= row["mean"]
        assert row["P(>0.1)"] <= row["P(>0.01)"] <= row["P(>0.001)"]
    for row in tables["min_card"]:
        assert 1 < row["mean_size"] < 3 and row["unsolved"] <= row["unsolved_by_four"]


def test_malach_rows(reports):
    tables = reports("malach")["tables"]
    for row in tables["weights"]:
        assert row["median"] <= row["block"] and row["median_error"] <= row["eps"]
        if row["rule"] == "paper":
            assert row["found"] >= row["nominal"] - 4 * math.sqrt(0.1 * 0.9 / 10)
    exponents = {row["of"]: row["exponent"] for row in tables["fits"]}
    assert exponents["paper"] == pytest.approx(-1 / 2, abs=0.15)
    assert exponents["product"] == pytest.approx(-1, abs=0.3)
    for row in tables["neurons"]:
        assert 0 < row["kept"] < 0.5 and row["features"] <= row["subnetwork"]


def test_log_rows(reports):
    tables = reports("log")["tables"]
    for row in tables["remainder"]:
        assert (row["worst"] <= row["bound"] * (1 + 1e-9)) == (row["gamma"] > 0.6)
    for row in tables["pools"]:
        assert row["served"] >= 0.9 and row["each"] < row["proved"]
    assert all(row["max_error"] <= row["eps"] for row in tables["growth"] if not row["failed"])
    assert tables["fit"][0]["r2"] > 0.99


def test_compare_rows(reports):
    tables = reports("compare")["tables"]
    names = list(dict.fromkeys(row["construction"] for row in tables["constructions"]))
    assert len(names) == 7 and names == [row["construction"] for row in tables["growth"]]
    for row in tables["constructions"]:
        assert row["kept"] * 12 <= row["source"]
        if row["eps"]:
            assert row["eps"] in (0.4, 0.2, 0.1) and row["failed"] <= 1
    power = {row["construction"]: row["power"] for row in tables["growth"]}
    assert power["Malach"] == pytest.approx(2, abs=0.1)
    assert power["Malach, products"] == pytest.approx(1, abs=0.1)
    assert power["Burkholz, L+1"] < power["Malach, products"]


def test_networks_are_compared_without_what_carries_nothing():
    torch.manual_seed(0)
    layers = [nn.Linear(2, 30), nn.ReLU(), nn.Linear(30, 40, bias=False), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(40, 3)).requires_grad_(False)
    for layer in net[::2]:
        layer.weight *= torch.rand_like(layer.weight) < 0.05
    net[0].bias[::2] = 0
    live = _live(net)
    assert live[0].out_features < 25 and live[2].out_features < 35
    x = torch.randn(50, 2)
    torch.testing.assert_close(live(x), net(x), rtol=0, atol=1e-6)


def test_pensia_rows(reports):
    for row in reports("pensia")["tables"]["networks"]:
        assert row["weights"] <= 64 * 16 + 16 * 10
        assert row["failed"] <= 0.01 * row["subset_sums"]
        assert abs(row["accuracy"] - row["target_accuracy"]) <= 0.03


def test_lplus1_rows(reports):
    tables = reports("lplus1")["tables"]
    sizes = {"sweep": 24, "activations": 16, "depth": 6, "redraws": 8}
    assert {name: len(rows) for name, rows in tables.items()} == sizes
    for row in tables["sweep"] + tables["activations"]:
        assert row["layers"] == 4 and row["sup_error"] <= row["bound"]
    for row in tables["sweep"]:
        assert (row["failed"] == 0) == (row["max_error"] <= row["eps"])
    for same, by_layer, twice in (tables["depth"][:3], tables["depth"][3:]):
        assert (same["layers"], twice["layers"]) == (4, 6)
        assert same["problems"] > 5 * twice["problems"] and same["kept"] > twice["kept"]
        assert same["failed"] == 0 and by_layer["max_error"] <= 0.01
        assert by_layer["mean_error"] < same["mean_error"]
    for none, many in zip(tables["redraws"][::2], tables["redraws"][1::2], strict=True):
        assert none["redraws"] == 0 and many["failed"] <= none["failed"]
    assert tables["redraws"][-1]["failed"] == 0


def test_lenet_needs_its_images():
    config = EXPERIMENTS["lplus1"].Config
    with pytest.raises(ValueError, match="nets: got lenet with dataset='digits', need mnist"):
        config(nets="lenet")


def test_universal_rows(reports):
    tables = reports("universal")["tables"]
    for table in ("published", "knots", "width", "families"):
        assert all(row["error"] <= row["bound"] + 1e-9 for row in tables[table])
    for row in tables["published"]:
        if row["refit"] == "interpolate":
            assert row["error"] <= 1.5 * row["published_error"]
            assert row["kept"] <= row["published_kept"] and row["of"] < row["published_of"]
    for family in ("sine", "monomials"):
        rows = [r for r in tables["knots"] if (r["family"], r["refit"]) == (family, "interpolate")]
        assert [row["knots"] for row in rows] == [5, 10, 20]
        assert rows[0]["error"] > 10 * rows[2]["error"]
    for row in tables["families"]:
        assert not row["failed"] and row["refit"] < row["before"]
    for row in tables["readouts"]:
        assert row["after"] <= 1.1 * row["before"]  # fitted on other points


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
    for name, flag, value in [
        ("attention", "max_width", "8"),
        ("malach", "neurons", "32"),
        ("compare", "smallest", "0"),
        ("universal", "points", "10"),
    ]:
        assert main(["theory", name, f"--{flag.replace('_', '-')}", value]) == 2
        assert f"{flag}: got {value}" in capsys.readouterr().err
