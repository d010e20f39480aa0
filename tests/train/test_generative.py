"""Tickets of generators: from the search with its controls to the file and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import sparseticket as st
from sparseticket import ops
from sparseticket.cli import main
from sparseticket.prng import layer_id, normal_quantiles
from sparseticket.tickets import get_method
from sparseticket.train import generative
from sparseticket.train.generative import (
    GenerativeOptions,
    generative_lines,
    latents,
    run_generative,
)
from sparseticket.train.generators import GENERATORS, build_generator
from sparseticket.train.plots import plot_samples

pytest.importorskip("sklearn", reason="digits need the [demo] extra")
matplotlib_image = pytest.importorskip("matplotlib.image", reason="pictures need the [demo] extra")

RESULTS = {
    *("config.yaml", "log.csv", "log.jsonl", "report.json", "ticket.safetensors"),
    *("samples.png", "samples-dense.png", "samples-random.png"),
}
SMALL = {"width": 16, "latent": 8, "epochs": 2, "steps": 3, "batch_size": 16, "random_masks": 1}
SMALL |= {"samples": 1000}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def run(out: Path, method="edge-popup", density=0.1, settings=(), **given):
    options = GenerativeOptions(method=method, out=out, **given)
    settings = {"density": density, "scale": "density", "seed": options.seed} | dict(settings)
    return run_generative(options, get_method(method)(**settings))


@pytest.mark.parametrize(
    ("method", "settings", "generator", "lr", "falls", "of_dense"),
    [
        ("edge-popup", {}, "mlp", 1e-2, 4, 3),
        ("gem-miner", {"period": 7, "penalty": 0.0}, "conv", 3e-2, 2, 4),
    ],
)
def test_a_ticket_learns_the_moments_of_digits(
    tmp_path, method, settings, generator, lr, falls, of_dense
):
    """The weights stay what their seed gave; masks alone bring the pictures' features near."""
    shape = {"generator": generator, "width": 32, "latent": 16}
    budget = {"epochs": 10, "steps": 15, "batch_size": 64, "samples": 1000, "random_masks": 1}
    report = run(tmp_path, method, 0.3, settings, lr=lr, **shape, **budget)
    rows = report["rows"]
    assert rows["random"]["distance"] > falls * rows["ticket"]["distance"]
    assert rows["random"]["frechet"] > falls * rows["ticket"]["frechet"]
    assert rows["ticket"]["distance"] < of_dense * rows["dense"]["distance"]
    assert report["distance_ratio"] == rows["ticket"]["distance"] / rows["dense"]["distance"]
    assert 0 < report["test_split"]["distance"] < rows["ticket"]["distance"]
    assert report["weights_untouched"] is True
    assert report["kept"] == round(0.3 * report["weights"])
    ticket = st.Ticket.load(tmp_path / "ticket.safetensors")
    made = ticket.meta["extra"]["generator"]
    name, in_shape = made.pop("name"), tuple(made.pop("in_shape"))
    model = ticket.apply(build_generator(name, in_shape=in_shape, **made))
    for layer_name, entry in ticket.meta["layers"].items():
        layer, mask = model.get_submodule(layer_name), ticket.masks[layer_name].to_dense()
        drawn = st.regenerate(0, layer_name, entry["shape"], sigma=entry["sigma"])
        assert torch.equal(layer.weight, drawn * mask)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["run"] for row in log] == 10 * ["ticket"] + 10 * ["dense"]
    assert log[0]["mask_change"] > 0
    assert log[-1]["mask_change"] is None


def test_an_interrupted_run_continues_bit_for_bit(tmp_path, monkeypatch):
    """Interrupted once in the search and once in the dense control."""
    whole = run(tmp_path / "whole", **SMALL)
    write_logs = generative.write_logs
    for rows in (2, 4):

        def interrupt(folder, history, columns, rows=rows):
            if len(history) == rows:
                raise KeyboardInterrupt
            write_logs(folder, history, columns)

        with monkeypatch.context() as patch:
            patch.setattr(generative, "write_logs", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "parts", **SMALL)
    saved = torch.load(tmp_path / "parts" / "checkpoint-dense.pt", weights_only=True)["state"]
    assert saved["epoch"] == 1
    with pytest.raises(ValueError, match=r"belongs to another run, which differs in lr"):
        run(tmp_path / "parts", **SMALL, lr=0.5)
    parts = run(tmp_path / "parts", **SMALL)
    assert parts["rows"] == whole["rows"] and parts["test_split"] == whole["test_split"]
    for file in ("ticket.safetensors", "samples.png", "samples-dense.png", "config.yaml"):
        one, other = (tmp_path / folder / file for folder in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()
    assert {file.name for file in (tmp_path / "parts").iterdir()} == RESULTS


def test_command_and_its_config(tmp_path, capsys):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"experiment": "generative", "density": 0.2}))
    out = tmp_path / "run"
    assert main(["search", "--config", str(file), "--out", str(out), "--seed", "5"]) == 0
    text = capsys.readouterr().out
    assert "random masks   moment distance" in text and "ticket / dense" in text
    assert {file.name for file in out.iterdir()} == RESULTS
    report = json.loads((out / "report.json").read_text())
    assert report["rows"]["ticket"]["classes"] is None  # a random extractor names no classes
    assert (report["seed"], report["features"]) == (5, 1792)
    assert main(["search", "--config", str(out / "config.yaml"), "--out", f"{out}2"]) == 0
    same = (out / "ticket.safetensors").read_bytes()
    assert (tmp_path / "run2" / "ticket.safetensors").read_bytes() == same
    assert main(["search", "--config", str(file), "--out", str(out)]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["eval", str(out / "ticket.safetensors")]) == 2
    assert "does not say which model and data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--experiment", "music"],
            "experiment: got 'music', known: classification, attention, generative",
        ),
        (["--generator", "unet"], "generator: got 'unet', known: mlp, conv"),
        (["--extractor", "dino"], "extractor: got 'dino', known: random, lenet, vgg19-bn"),
        (["--samples", "10"], "samples: got 10, need at least 1000"),
        (["--lr", "nan"], "lr: got nan"),
        (["--beta1", "1"], "beta1: got 1.0"),
        (["--method", "supsup", "--tasks", "2"], "tasks: got 2, a generator has one"),
        (["--label-smoothing", "0.1"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    experiment = [] if arguments[0] == "--experiment" else ["--experiment", "generative"]
    assert main(["search", *experiment, "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("generative*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_understood(file, tmp_path, capsys):
    """With the data in an empty folder, a run gets as far as looking for them."""
    arguments = ["--config", str(file), "--out", str(tmp_path / "run"), "--data", str(tmp_path)]
    assert main(["search", *arguments]) == 2
    assert "no data found" in capsys.readouterr().err


def test_latents_are_a_stream_of_their_own():
    z = latents(3, "train", 2, 50, 40)
    assert torch.equal(z, latents(3, "train", 2, 50, 40))
    number = ops.signed64(layer_id("latent.train"))
    drawn = ops.regenerate(3, number, (50, 40), "normal", 1.0, stream="latent", draw=2)
    assert torch.equal(z, drawn) and bool(torch.isin(z, torch.tensor(normal_quantiles())).all())
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.05
    for other in ((4, "train", 2), (3, "judge", 2), (3, "train", 1)):
        assert not torch.equal(z, latents(*other, 50, 40))


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_give_pictures_and_have_no_biases(name):
    model = build_generator(name, in_shape=(3, 8, 12), latent=5, width=8)
    x = model(torch.randn(4, 5))
    assert x.shape == (4, 3, 8, 12) and x.abs().max() <= 1 and x.std() > 0
    kinds = {type(m) for m in model.modules() if getattr(m, "weight", None) is not None}
    assert all(
        getattr(m, "bias", None) is None or "Norm" in type(m).__name__ for m in model.modules()
    )
    assert nn.ConvTranspose2d in kinds or name == "mlp"
    with pytest.raises(ValueError, match="latent: got 0"):
        build_generator(name, in_shape=(1, 8, 8), latent=0, width=8)


@pytest.mark.parametrize("method", ["frozen", "multicoat"])
def test_other_methods_search_a_generator_too(tmp_path, method):
    tried = SMALL | {"epochs": 1, "steps": 1, "generator": "conv", "width": 8, "controls": False}
    report = run(tmp_path, method, 0.5, **tried)
    assert report["rows"]["ticket"]["distance"] > 0 and report["method"] == method
    assert list(report["rows"]) == ["ticket"] and report["distance_ratio"] is None
    labels = [label for label, _ in generative_lines(report)]
    assert labels == ["ticket", "test pictures", "kept", "size", "training"]


def test_sample_grid_shows_the_pictures(tmp_path):
    pictures = torch.zeros(5, 1, 2, 4)
    pictures[1] = 1.0
    pictures[3, 0, 1, 2] = 1.0
    plot_samples(pictures, tmp_path / "a.png", zoom=2)
    image = torch.from_numpy(matplotlib_image.imread(tmp_path / "a.png")[..., 0])
    assert image.shape == (2 * 5, 3 * 9)  # two rows of three, a line after each picture
    assert image[:4, :8].max() == 0 and image[:4, 9:17].min() == 1
    lit = image[5:9, :8]
    assert lit.sum() == 4 and lit[2:, 4:6].min() == 1
    assert image[:, 8].sub(0.5).abs().max() < 0.51 and abs(image[0, 8] - 0.5) < 0.01
    assert image[5:9, 18:26].min() == 1  # no sixth picture
