"""The command line: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import sparseticket as st
from sparseticket import Ticket
from sparseticket.cli import main
from sparseticket.train import loop
from sparseticket.train.experiments import DemoOptions, EvalOptions, SearchOptions
from sparseticket.train.loop import Recipe
from sparseticket.train.plots import plot_masks, save_figure

pytest.importorskip("sklearn", reason="digits need the [demo] extra")
matplotlib_image = pytest.importorskip("matplotlib.image", reason="pictures need the [demo] extra")

RESULTS = {
    *("config.yaml", "curve.png", "log.csv", "log.jsonl", "masks.png", "report.json"),
    "ticket.safetensors",
}
FAST = ["--epochs", "2"]


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished search of two epochs; tests only read it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["search", "--out", str(out), *FAST]) == 0
    return out


def failure(capsys, *arguments: str | Path) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("sparseticket: error: ")
    return captured.err


def environment() -> dict[str, str]:
    package = str(Path(st.__file__).parents[1])
    return os.environ | {"PYTHONPATH": package + os.pathsep + os.environ.get("PYTHONPATH", "")}


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-m", "sparseticket", *map(str, arguments)]
    return subprocess.run(full, capture_output=True, text=True, env=environment(), check=False)


def test_search_writes_its_results(finished):
    assert {file.name for file in finished.iterdir()} == RESULTS
    report = json.loads((finished / "report.json").read_text())
    expected = {
        "method": "edge-popup",
        "dataset": "digits",
        "model": "mlp",
        "seed": 0,
        "density": 0.5,
        "kept": 42240,
        "weights": 84480,
        "ticket_bytes": (finished / "ticket.safetensors").stat().st_size,
        "dense_bytes": 4 * 84480,
        "raw_bits": 84480,
        "normalisation_bits": 0,
        "threads": torch.get_num_threads(),
        "missing": [],
    }
    assert expected.items() <= report.items()
    assert 0.5 < report["val_accuracy"] <= 1 and 0.5 < report["test_accuracy"] <= 1
    assert report["seconds"] > 0 and report["versions"]["torch"] == torch.__version__
    assert len((finished / "log.csv").read_text().splitlines()) == 3
    for picture in ("curve.png", "masks.png"):
        pixels = matplotlib_image.imread(finished / picture)[..., :3]
        assert 0.005 < (pixels < 0.9).any(-1).mean() < 0.9, "blank"


def test_masks_are_drawn_as_they_are(tmp_path):
    """A mask with its left half kept has a dark left half; 13 panels are too many."""
    mask = torch.zeros(300, 300, dtype=torch.bool)
    mask[:, :128] = True
    masks = {f"layer{i}": st.PackedMask.from_dense(mask) for i in range(13)}
    plot_masks(dict(list(masks.items())[:1]), tmp_path / "one.png")
    pixels = matplotlib_image.imread(tmp_path / "one.png")[..., :3].mean(-1)
    width = pixels.shape[1]
    rows = slice(pixels.shape[0] // 3, 2 * pixels.shape[0] // 3)
    assert pixels[rows, width // 4 : width // 3].max() < 0.1
    assert pixels[rows, 2 * width // 3 : 3 * width // 4].min() > 0.9
    plot_masks(masks, tmp_path / "many.png")


def test_a_picture_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    class Full:
        def savefig(self, temporary, dpi):
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_figure(Full(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_ticket_does_not_know_where_or_how_fast_it_was_made(finished):
    text = json.dumps(Ticket.load(finished / "ticket.safetensors").meta)
    for word in (str(finished), finished.name, os.uname().nodename, "thread", "seconds", "device"):
        assert word not in text


def test_same_seed_gives_the_same_bytes_in_another_process_and_folder(finished, tmp_path):
    threads = ["--threads", str(torch.get_num_threads())]
    done = command("search", "--out", tmp_path / "again", *FAST, *threads)
    assert done.returncode == 0, done.stderr
    same = (finished / "ticket.safetensors").read_bytes()
    assert (tmp_path / "again" / "ticket.safetensors").read_bytes() == same
    assert main(["search", "--out", str(tmp_path / "other"), *FAST, "--seed", "1"]) == 0
    assert (tmp_path / "other" / "ticket.safetensors").read_bytes() != same


def test_resolved_config_repeats_the_run(finished, tmp_path):
    config = finished / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    fields = {
        f.name
        for cls in (SearchOptions, Recipe, st.EdgePopup)
        for f in dataclasses.fields(cls)
        if f.name not in ("out", "overwrite")
    }
    assert settings.keys() == fields
    assert main(["search", "--config", str(config), "--out", str(tmp_path / "run")]) == 0
    same = (finished / "ticket.safetensors").read_bytes()
    assert (tmp_path / "run" / "ticket.safetensors").read_bytes() == same


def test_finished_run_is_kept_unless_overwritten(finished, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["search", "--out", str(out), "--epochs", "1", "--density", "0.3"]
    assert main(arguments) == 0
    before = {file: file.read_bytes() for file in out.iterdir()}
    assert "holds a finished run" in failure(capsys, *arguments, "--seed", "1")
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    # refused arguments come before the old results go
    assert "known: mlp" in failure(capsys, *arguments, "--overwrite", "--model", "vgg")
    assert "device: got 'gpu'" in failure(capsys, *arguments, "--overwrite", "--device", "gpu")
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    assert main([*arguments, "--overwrite", "--seed", "1"]) == 0
    assert json.loads((out / "report.json").read_text())["seed"] == 1


def test_interrupted_search_continues_when_run_again(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    write_logs = loop.write_logs

    def interrupt(folder, history):
        if len(history) == 2:
            raise KeyboardInterrupt
        write_logs(folder, history)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_logs", interrupt)
        assert main(["search", "--out", str(out), *FAST]) == 130
    assert (out / "checkpoint.pt").exists() and not (out / "report.json").exists()
    before = {file: file.read_bytes() for file in out.iterdir()}
    message = failure(capsys, "search", "--out", out, *FAST, "--density", "0.4")
    assert "belongs to another run, which differs in config" in message
    # as many batches, but other examples
    message = failure(capsys, "search", "--out", out, *FAST, "--val-fraction", "0.101")
    assert "belongs to another run, which differs in extra" in message
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    assert main(["search", "--out", str(out), *FAST]) == 0
    same = (finished / "ticket.safetensors").read_bytes()
    assert (out / "ticket.safetensors").read_bytes() == same
    assert {file.name for file in out.iterdir()} == RESULTS


def test_flags_reach_method_and_recipe(tmp_path):
    flags = ["--density", "0.1", "--scope", "global", "--scale", "dynamic", "--weights", "normal"]
    flags += ["--transform", "identity", "--min-keep-per-layer", "3", "--score-init", "uniform"]
    flags += [
        "--keep-bias",
        "--affine",
        "--optimizer",
        "adam",
        "--lr",
        "0.01",
        "--val-fraction",
        "0",
    ]
    assert main(["search", "--out", str(tmp_path), "--epochs", "1", *flags]) == 0
    config = Ticket.load(tmp_path / "ticket.safetensors").meta["config"]
    assert config == {
        "density": 0.1,
        "scope": "global",
        "scale": "dynamic",
        "weights": "normal",
        "transform": "identity",
        "min_keep_per_layer": 3,
        "score_init": "uniform",
        "keep_bias": True,
        "affine": True,
        "seed": 0,
        "init": "kaiming",
        "qk_scale": True,
        "first_layer": "searched",
        "last_layer": "searched",
        "anneal": "none",
        "anneal_period": 5,
    }
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["val_accuracy"] is None and report["kept"] == 8448
    assert report["config"]["optimizer"] == "adam" and report["config"]["lr"] == 0.01


def test_every_field_has_a_flag(capsys):
    for name, classes in {
        "search": (SearchOptions, Recipe, st.EdgePopup),
        "eval": (EvalOptions,),
        "demo": (DemoOptions,),
    }.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        for cls in classes:
            for field in dataclasses.fields(cls):
                assert f"--{field.name.replace('_', '-')}" in text


def test_yaml_settings_and_their_override(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "epochs: 1\nweight-decay: 1e-3\ndensity: 0.2\nscale: density\nbatch_size: 100\n"
    )
    out = tmp_path / "run"
    assert main(["search", "--config", str(file), "--out", str(out), "--density", "0.3"]) == 0
    settings = yaml.safe_load((out / "config.yaml").read_text())
    expected = {"epochs": 1, "weight_decay": 1e-3, "density": 0.3, "scale": "density"}
    assert expected.items() <= settings.items() and settings["batch_size"] == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "unknown setting 'epoch'; known: affine, amp, "),
        ("epochs: many\n", "epochs: got 'many', need int"),
        ("epochs: 1.5\n", "epochs: got 1.5, need int"),
        ("amp: 1\n", "amp: got 1, need bool"),
        ("optimizer: lion\n", "optimizer: got 'lion', need sgd, adam"),
        ("lr: high\n", "lr: got 'high', need float"),
        ("- epochs\n", "need a mapping of settings, got list"),
        ("a: [\n", "not a YAML file"),
        ("method: magic\n", "'magic'"),
        ("density: 2\n", "density: got 2"),
    ],
)
def test_bad_yaml(tmp_path, capsys, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    out = tmp_path / "run"
    assert message in failure(capsys, "search", "--config", file, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search"], "a folder for the results is needed"),
        (["search", "--out", "OUT", "--method", "magic"], "edge-popup"),
        (["search", "--out", "OUT", "--dataset", "svhn"], "known: digits, mnist, cifar10"),
        (["search", "--out", "OUT", "--dataset", "mnist", "--data", "OUT"], "no data found"),
        (["search", "--out", "OUT", "--model", "vgg"], "known: mlp"),
        (["search", "--out", "OUT", "--model", "conv8"], "needs? |at least"),
        (["search", "--out", "OUT", "--density", "1.5"], "density: got 1.5"),
        (["search", "--out", "OUT", "--density", "half"], "invalid float value: 'half'"),
        (["search", "--out", "OUT", "--scale", "fan"], "--scale: .*'fan'.*'dynamic'"),
        (["search", "--out", "OUT", "--lr", "nan"], "lr: got nan"),
        (["search", "--out", "OUT", "--threads", "0"], "threads: got 0"),
        (["search", "--out", "OUT", "--workers", "-1"], "workers: got -1"),
        (["search", "--out", "OUT", "--device", "gpu"], "device: got 'gpu'"),
        (["search", "--out", "OUT", "--device", "cuda:99"], "device: got 'cuda:99'"),
        (["search", "--out", "OUT", "--batch-size", "0"], "batch_size: got 0"),
        (["search", "--out", "OUT", "--val-fraction", "1"], "val_fraction: got 1"),
        (["search", "--out", "OUT", "--seed", "-1"], "seed: got -1"),
        (["search", "--out", "OUT", "--select", "best", "--val-fraction", "0"], "select='best'"),
        (["search", "--out", "OUT", "--score", "x"], "unrecognized arguments: --score x"),
        (["search", "--out", "OUT", "--config", "OUT"], "OUT"),
        (["eval", "OUT"], "OUT"),
        (["info", "OUT"], "OUT"),
        (["prune"], "invalid choice: 'prune'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSETICKET_DATA", raising=False)
    error = failure(capsys, *arguments)
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        main(["info", "absent.safetensors", "--debug"])


def test_without_matplotlib_the_run_ends_well_and_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["search", "--out", str(tmp_path), "--epochs", "1"]) == 0
    assert "pip install 'sparseticket[demo]'" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == RESULTS - {"curve.png", "masks.png"}
    assert "matplotlib" in json.loads((tmp_path / "report.json").read_text())["missing"][0]


def test_without_scikit_learn_digits_name_the_extra(tmp_path, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, module, None)
    error = failure(capsys, "search", "--out", tmp_path / "run")
    assert "sparseticket[demo]" in error and not (tmp_path / "run").exists()


def test_eval_in_another_process_shows_the_same_accuracy(finished):
    report = json.loads((finished / "report.json").read_text())
    threads = ["--threads", str(report["threads"])]
    done = command("eval", finished / "ticket.safetensors", "--json", *threads)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["test_accuracy"] == report["test_accuracy"]
    assert (result["dataset"], result["model"], result["examples"]) == ("digits", "mlp", 360)


def test_network_with_batch_norm_from_search_to_eval(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["search", "--model", "resnet20", "--epochs", "1", "--out", out]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["normalisation_bits"] > 0 and report["not_weight_free"] == []
    capsys.readouterr()
    assert main(["eval", f"{out}/ticket.safetensors", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["test_accuracy"] == report["test_accuracy"] > 0.3


def test_eval_for_people(finished, capsys):
    assert main(["eval", str(finished / "ticket.safetensors")]) == 0
    report = json.loads((finished / "report.json").read_text())
    correct = round(360 * report["test_accuracy"])
    assert f"({correct} of 360), mlp on digits" in capsys.readouterr().out


def test_eval_refuses_bad_options(finished, capsys):
    ticket = finished / "ticket.safetensors"
    assert "batch_size: got 0" in failure(capsys, "eval", ticket, "--batch-size", "0")
    assert "device: got 'gpu'" in failure(capsys, "eval", ticket, "--device", "gpu")


def test_eval_refuses_what_it_cannot_know(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    st.sparsify_(model, st.EdgePopup())
    Ticket.from_model(model).save(path)
    assert "does not say which model and data" in failure(capsys, "eval", path)
    described = {"name": "mlp", "in_shape": [1, 28, 28], "num_classes": 10}
    data = {"dataset": "digits", "name": "digits", "batch_size": 64}
    Ticket.from_model(model, extra={"model": described, "data": data}).save(path)
    assert "images (1, 8, 8) and 10 classes, the ticket is for (1, 28, 28)" in failure(
        capsys, "eval", path
    )
    described["in_shape"] = [1, 8, 8]
    Ticket.from_model(model, extra={"model": described, "data": data}).save(path)
    assert "1: the ticket has a linear layer, the model no such module" in failure(
        capsys, "eval", path
    )
    data["dataset"] = "imagefolder"
    Ticket.from_model(model, extra={"model": described, "data": data}).save(path)
    assert "give --data DIR" in failure(capsys, "eval", path)


def test_damaged_ticket_is_one_line(finished, tmp_path, capsys):
    raw = bytearray((finished / "ticket.safetensors").read_bytes())
    raw[-100] ^= 4
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    for name in ("eval", "info"):
        assert "bad.safetensors: sha256 mismatch" in failure(capsys, name, path)


def test_info_prints_layers_and_three_sizes(finished, capsys):
    path = finished / "ticket.safetensors"
    assert main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines]
    assert ["fc1", "linear", "256x64", "8,192", "0.5"] in [row[:5] for row in words]
    assert sum(line.startswith("fc") for line in lines) == 3
    assert ["raw", "bits", "84,480", "10.6", "kB"] in words
    assert ["coded", "bits", "84,480", "10.6", "kB"] in words
    assert ["normalisation", "bits", "0", "0", "B"] in words
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["raw_bits"] == 84480


def test_methods_lists_settings(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("edge-popup: ") and "--density (default 0.5)" in text


def test_version_and_module_entry():
    done = command("--version")
    assert done.stdout == f"sparseticket {st.__version__}\n"


def test_fine_tuning_is_reported_and_leaves_the_ticket(finished, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["search", "--out", str(out), *FAST, "--finetune-epochs", "1"]) == 0
    assert "fine-tuned" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["finetuned_test_accuracy"] > 0.5 and report["collapsed"] == []
    same = Ticket.load(finished / "ticket.safetensors").masks
    assert Ticket.load(out / "ticket.safetensors").masks == same


@pytest.mark.parametrize("inference", ["one-shot", "binary"])
def test_many_tasks_in_one_ticket(tmp_path, capsys, inference):
    out = tmp_path / "run"
    flags = ["--tasks", "3", "--epochs", "6", "--inference", inference]
    assert main(["search", "--method", "supsup", "--out", str(out), *flags]) == 0
    assert "task 2" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["inferred_tasks"] == [0, 1, 2]
    assert min(report["task_accuracies"]) > 0.9
    assert report["task_accuracies"] == report["inferred_task_accuracies"]
    assert len(Ticket.load(out / "ticket.safetensors").planes["fc1"]) == 3
    assert main(["eval", str(out / "ticket.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_accuracy"] == report["task_accuracies"][0]
    assert main(["check", str(out / "ticket.safetensors"), "--json", "--seeds", "2"]) == 0
    ticket, *controls = json.loads(capsys.readouterr().out)["rows"]
    assert ticket["mean"] == pytest.approx(report["test_accuracy"])  # of all tasks
    for row in controls:
        assert len(row["scores"]) == 2 and row["mean"] < 0.5


def test_check_prints_the_ticket_and_its_controls(finished, capsys):
    ticket = str(finished / "ticket.safetensors")
    assert main(["check", ticket, "--json", "--seeds", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    accuracy = json.loads((finished / "report.json").read_text())["test_accuracy"]
    assert {"method": "edge-popup", "model": "mlp", "seeds": 3, "examples": 360}.items() <= (
        result.items()
    )
    own, *controls = result["rows"]
    known = {"control": "ticket", "measure": "test accuracy", "scores": [accuracy]}
    assert own == known | {"mean": accuracy, "std": None}
    for row in controls:
        assert row["std"] == pytest.approx(torch.tensor(row["scores"]).std().item(), abs=1e-6)
        assert row["mean"] < 0.4 < accuracy
    assert main(["check", ticket, "--json", "--seeds", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert main(["check", ticket, "--seeds", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert "seeds: got 0, need at least 1" in failure(capsys, "check", ticket, "--seeds", "0")


def test_collapse_is_reported(tmp_path, capsys):
    flags = ["--scope", "global", "--density", "0.0002", "--epochs", "1"]
    assert main(["search", "--out", str(tmp_path / "run"), *flags]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    masks = Ticket.load(tmp_path / "run" / "ticket.safetensors").masks
    assert report["collapsed"] == [name for name, mask in masks.items() if not mask.kept] != []


def test_binary_activations_come_back_at_evaluation(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--method", "biprop", "--binary-activations", "--epochs", "3", "--lr", "0.03"]
    assert main(["search", "--out", str(out), *flags]) == 0
    report = json.loads((out / "report.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(out / "ticket.safetensors"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["test_accuracy"]
    assert again == report["test_accuracy"] > 0.3


def test_help_and_run_take_the_methods_training_defaults(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["search", "--method", "supermask", "--help"])
    assert re.search(
        r"--lr N\s+learning rate at its highest \(default 100\.0\)", capsys.readouterr().out
    )
    flags = ["--method", "supermask", "--epochs", "1", "--weight-decay", "0.5"]
    assert main(["search", "--out", str(tmp_path / "run"), *flags]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["lr"], config["weight_decay"]) == (100.0, 0.5)
