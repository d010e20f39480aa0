"""What the bench says about its rows: bars, kernels, clean samples."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

import sparseticket as st
from bench import report
from bench.cases import CASES
from bench.networks import PARTS, network_steps
from bench.run import Row as BenchRow
from bench.run import append, kernels_of
from bench.timing import interleaved
from sparseticket.train.models import MODELS


def row(contender, p50_ms, threads=1, isa="avx512", case="c"):
    named = {"op": "o", "case": case, "contender": contender}
    return {**named, "threads": threads, "isa": isa, "p50_ms": p50_ms}


def bar(wanted, **changed):
    fields = dict.fromkeys(("contender", "over", "threads", "isa"), "")
    return {"op": "o", "case": "c*", "bar": str(wanted), **fields, **changed}


def judged(monkeypatch, rows, *bars, notes=()):
    monkeypatch.setattr(report, "BARS", list(bars))
    monkeypatch.setattr(report, "NOTES", list(notes))
    return report.judge(report.newest(rows))


@pytest.mark.parametrize(
    ("changed", "ratio"),
    [
        ({}, "2.00x dense"),
        ({"over": "dense*"}, "1.50x dense*"),
        ({"over": "1 thread", "threads": "2"}, "1.60x 1 thread"),
        ({"over": "avx512", "isa": "avx2"}, "0.50x avx512"),
    ],
)
def test_a_bar_names_what_it_is_over(monkeypatch, changed, ratio):
    rows = [row("ours", 9), row("dense", 8), row("dense last", 6), row("ours", 4)]
    rows += [row("ours", 2.5, threads=2), row("ours", 8, isa="avx2")]
    (line,) = judged(monkeypatch, rows, bar(0.4, **changed))
    assert ratio in line and line.startswith("met")


def test_networks_are_held_to_bars_too(monkeypatch):
    place = {"model": "mlp", "batch": 128, "density": 0.5}
    rows = [{**place, **row("dense", 8)}, {**place, **row("ours", 4)}]
    line = judged(monkeypatch, report.of_networks(rows), bar(3, op="network", case="mlp batch *"))
    assert line[0].startswith("MISSED network") and "2.00x dense" in line[0]


def test_parts_of_a_step():
    for part in ("step", *PARTS):
        for run in network_steps("mlp", 4, 0.5, part).values():
            run()


def test_only_a_missed_bar_prints_its_note(monkeypatch):
    rows, note = [row("ours", 4), row("dense", 8)], {"op": "o", "case": "c", "note": "why not"}
    met, missed = judged(monkeypatch, rows, bar(2), bar(2.1), notes=[note])
    assert met.startswith("met") and "why not" not in met
    assert missed.startswith("MISSED") and missed.endswith("why not")


@pytest.mark.parametrize("kind", ["BARS", "NOTES"])
def test_every_bar_and_note_stands_for_a_case(kind):
    for line in getattr(report, kind):
        names = [case.name for case in CASES.get(line["op"], [])]
        if line["op"] == "network":
            names = [report.network_case(model, 128, 0.5) for model in MODELS]
        assert any(fnmatchcase(name, line["case"]) for name in names), line


def test_rows_name_the_kernels_that_explain_names():
    layer = st.SparseLinear.from_dense(torch.nn.Linear(64, 8), form="compressed")
    seen = kernels_of(lambda: layer(torch.randn(2, 64)).sum().backward())
    assert "sparse_linear: " in seen and "sparse_linear_dw: " in seen
    assert kernels_of(lambda: torch.ones(2) + 1) == ""


def test_new_columns_join_old_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("op,gone\na,1\n")
    fields = BenchRow.__dataclass_fields__
    append(path, [BenchRow(**{**dict.fromkeys(fields, 0), "op": "b"})], {"isa": "base"})
    old, new = report.read(path)
    assert (old["op"], old["gone"], old["isa"]) == ("a", "1", "")
    assert (new["op"], new["gone"], new["isa"]) == ("b", "", "base")


def test_every_contender_says_how_many_samples_were_clean():
    timed = interleaved({"a": lambda: None, "b": lambda: None}, 1, 0.01)
    assert all(q.clean >= 5 and q.p20 <= q.p50 <= q.p80 for q in timed.values())
