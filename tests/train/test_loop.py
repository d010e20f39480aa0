"""The loop: its recipe, its determinism, its checkpoints, its control."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.train import Callback, Recipe, evaluate, search, train_dense
from sparseticket.train.data import TensorLoader

BATCHES = 10


def clusters(n: int, name: str) -> TensorLoader:
    """Three Gaussian clusters in 16 dimensions, in the loaders' [N, C, H, W]."""
    generator = torch.Generator().manual_seed(len(name))
    centres = torch.eye(3).repeat_interleave(6, 1)[:, :16] * 3 - 1
    y = torch.arange(n) % 3
    x = centres[y] + 1.5 * torch.randn(n, 16, generator=generator)
    return TensorLoader(x.view(n, 1, 4, 4), y, 20, name == "train", 0, name=name)


TRAIN, VAL = clusters(20 * BATCHES, "train"), clusters(60, "val")


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(16, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(32, 3, bias=False),
    )


CONFIG = st.EdgePopup(density=0.5)


def run(model: nn.Module | None = None, config=CONFIG, train=TRAIN, val=VAL, **options):
    defaults = {"epochs": 4, "lr": 0.1, "progress": False}
    return search(model or build(), train, val, config, **(defaults | options))


class StopAfter(Callback):
    """Interrupts, as Ctrl-C would, at the end of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, state) -> None:
        if state.epoch == self.epoch:
            raise KeyboardInterrupt


def weight_hashes(model: nn.Module) -> list[str]:
    weights = [m.weight.detach().numpy().tobytes() for m in model if isinstance(m, nn.Linear)]
    return [hashlib.sha256(w).hexdigest() for w in weights]


def test_search_finds_a_ticket_and_leaves_the_weights_alone():
    model = build()
    report = st.sparsify_(model, CONFIG)
    before = weight_hashes(model)
    start = st.Ticket.from_model(model)
    result = run(model)
    assert report.converted and result.report is None
    assert weight_hashes(model) == before
    assert not any(
        m.weight.requires_grad or m.weight.grad is not None for m in (model[1], model[5])
    )
    assert result.val_accuracy == evaluate(model, VAL)[0] >= 0.9
    assert result.val_accuracy == result.history[-1]["val_accuracy"]
    assert result.ticket.masks["1"] == model[1].mask != start.masks["1"]
    assert result.ticket.masks["1"].kept == 256
    assert result.ticket.meta["method"] == "edge-popup"


def test_same_seed_same_ticket_whatever_the_global_generator_holds():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = run()
    build()  # resets the generator to build's seed, as run did
    reset = torch.get_rng_state()
    model = build()
    torch.manual_seed(77)
    second = run(model)
    assert first.ticket.raw == second.ticket.raw
    assert not torch.equal(before, reset)
    assert run(seed=1).ticket.raw != first.ticket.raw  # dropout differs
    model = build()
    state = torch.get_rng_state()
    run(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("select", ["last", "best"])
def test_interrupted_run_continues_bit_for_bit(tmp_path, optimizer, select):
    options = {"optimizer": optimizer, "select": select, "lr": 0.02, "epochs": 5}
    whole = run(out=tmp_path / "whole", **options)
    part = tmp_path / "part"
    for epoch in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            run(out=part, callbacks=[StopAfter(epoch)], **options)
    resumed = run(build(), out=part, **options)
    assert resumed.ticket.raw == whole.ticket.raw
    without_times = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
        for result in (whole, resumed)
    ]
    assert without_times[0] == without_times[1]
    assert len((part / "log.csv").read_text().splitlines()) == 6
    assert {file.name for file in part.iterdir()} == {"checkpoint.pt", "log.csv", "log.jsonl"}


def test_resume_starts_where_the_last_checkpoint_is(tmp_path):
    class Count(Callback):
        steps = 0

        def on_step_end(self, state) -> None:
            self.steps += 1

    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path, callbacks=[StopAfter(4)], epochs=5, checkpoint_every=2)
    count = Count()
    run(out=tmp_path, callbacks=[count], epochs=5, checkpoint_every=2)
    assert count.steps == 3 * BATCHES  # epochs 3, 4, 5: the checkpoint was of epoch 2
    count = Count()
    run(out=tmp_path, callbacks=[count], epochs=5, checkpoint_every=2)
    assert count.steps == 0
    count = Count()
    run(out=tmp_path, callbacks=[count], epochs=5, resume=False)
    assert count.steps == 5 * BATCHES


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"config": st.EdgePopup(density=0.4)}, "config"),
        ({"lr": 0.2}, "recipe"),
        ({"seed": 3}, "seed"),
        ({"train": clusters(60, "train")}, "batches"),
        ({"extra": {"data": "others"}}, "extra"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False))}, "model"),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, changed, named):
    run(out=tmp_path, epochs=1)
    with pytest.raises(ValueError, match=f"belongs to another run, which differs in {named}"):
        run(out=tmp_path, **({"epochs": 1} | changed))


def test_damaged_checkpoint_is_refused(tmp_path):
    run(out=tmp_path, epochs=1)
    path = tmp_path / "checkpoint.pt"
    for damaged in (path.read_bytes()[:500], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a checkpoint, or a damaged one"):
            run(out=tmp_path, epochs=1)


def test_logs_hold_every_epoch(tmp_path):
    result = run(out=tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["val_accuracy"]) for row in rows] == [
        row["val_accuracy"] for row in result.history
    ]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert all(0 < row["mask_change"] < 1 for row in result.history)


def test_no_epoch_leaves_logs_without_rows(tmp_path):
    run(out=tmp_path, epochs=0)
    run(out=tmp_path / "one", epochs=1)
    header = (tmp_path / "one" / "log.csv").read_text().splitlines()[0]
    assert (tmp_path / "log.csv").read_text() == header + "\n"
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_refused_checkpoint_leaves_the_model_dense(tmp_path):
    run(out=tmp_path, epochs=1)
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="belongs to another run"):
        run(model, st.EdgePopup(density=0.25), out=tmp_path, epochs=1)
    assert type(model[1]) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    run(model, st.EdgePopup(density=0.25), out=tmp_path, epochs=1, resume=False)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scores_are_trained_by_the_fused_optimizers(optimizer):
    seen = []

    class Look(Callback):
        def on_epoch_end(self, state) -> None:
            seen.append(type(state.optimizer))

    model = run(epochs=1, optimizer=optimizer, callbacks=[Look()]).model
    assert seen == [{"sgd": st.PopupSGD, "adamw": st.PopupAdamW}[optimizer]]
    # Its scores get their own gradients again, in a loop of the caller's.
    assert all(m._raw_grad_for is None for m in model if isinstance(m, st.SparseLinear))


def test_learning_rates_of_the_recipe():
    cosine = Recipe(epochs=10, lr=0.1)
    assert [cosine.lr_at(e) for e in (0, 5, 9)] == pytest.approx(
        [0.1, 0.05, 0.05 * (1 + math.cos(0.9 * math.pi))]
    )
    warm = Recipe(epochs=10, lr=0.1, warmup_epochs=5)
    assert [warm.lr_at(e) for e in range(7)] == pytest.approx(
        [0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.05 * (1 + math.cos(0.2 * math.pi))]
    )
    flat = Recipe(epochs=10, lr=0.1, schedule="constant", warmup_epochs=2)
    assert [flat.lr_at(e) for e in (0, 1, 2, 9)] == pytest.approx([0.05, 0.1, 0.1, 0.1])
    result = run(epochs=3, warmup_epochs=1)
    assert [row["lr"] for row in result.history] == pytest.approx([0.1, 0.1, 0.05])


def test_one_step_is_sgd_on_the_straight_through_gradient():
    """Two batches by hand against the loop: momentum, weight decay, label smoothing."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False))
    st.sparsify_(model, CONFIG)
    weight, scores = model[1].weight.clone(), model[1].scores.detach().clone()
    velocity = torch.zeros_like(scores)
    loader = TensorLoader(TRAIN.x[:40], TRAIN.y[:40], 20, True, 0)
    for x, y in loader:
        mask = st.select_mask(scores, density=0.5).to_dense()
        leaf = (weight * mask).requires_grad_()
        logits = nn.functional.linear(x.flatten(1), leaf)
        nn.functional.cross_entropy(logits, y, label_smoothing=0.1).backward()
        gradient = leaf.grad * weight * scores.sign() + 0.01 * scores
        velocity = 0.5 * velocity + gradient
        scores = scores - 0.3 * velocity
    options = {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.01, "label_smoothing": 0.1}
    run(model, epochs=1, train=loader, val=None, **options)
    torch.testing.assert_close(model[1].scores.detach(), scores, rtol=1e-5, atol=1e-6)
    assert model[1].mask == st.select_mask(model[1].scores, density=0.5)


def test_best_epoch_is_kept_by_validation_accuracy():
    class Spoilt:
        """Wrong labels from the third epoch on."""

        def set_epoch(self, epoch: int) -> None:
            self.wrong = int(epoch >= 2)

        def __iter__(self):
            for x, y in TRAIN:
                yield x, (y + self.wrong) % 3

    result = run(train=Spoilt(), select="best", epochs=4, schedule="constant")
    accuracies = [row["val_accuracy"] for row in result.history]
    assert result.val_accuracy == max(accuracies) > accuracies[-1]
    assert evaluate(result.model, VAL)[0] == max(accuracies)
    applied = result.ticket.apply(build())
    assert evaluate(applied, VAL)[0] == pytest.approx(max(accuracies), abs=1 / 60)


def test_without_validation(tmp_path):
    for val in (None, TensorLoader(VAL.x[:0], VAL.y[:0], 20, False, 0)):
        result = run(val=val, epochs=1)
        assert result.val_accuracy is None and result.history[0]["val_loss"] is None
        with pytest.raises(ValueError, match="select='best' needs a validation loader"):
            run(val=val, select="best")


def test_amp_keeps_scores_in_float32():
    result = run(amp=True, epochs=2)
    assert result.model[1].scores.dtype == torch.float32
    assert result.val_accuracy > 0.8
    assert result.ticket.raw != run(epochs=2).ticket.raw


def test_dense_control_trains_weights_through_the_same_loop():
    model = build()
    before = weight_hashes(model)
    result = train_dense(model, TRAIN, VAL, Recipe(epochs=4), progress=False)
    assert weight_hashes(model) != before
    assert result.val_accuracy >= 0.9
    assert result.history[0]["mask_change"] is None


def test_search_beats_the_random_mask_it_starts_from():
    model = build()
    st.sparsify_(model, CONFIG)
    random_accuracy, _ = evaluate(model, VAL)
    assert run(model).val_accuracy > random_accuracy + 0.3


def test_callbacks_see_every_step_and_epoch():
    seen = []

    class Watch(Callback):
        def on_step_end(self, state) -> None:
            assert state.model[1].mask == st.select_mask(state.model[1].scores, density=0.5)
            seen.append((state.epoch, state.step))

        def on_epoch_end(self, state) -> None:
            seen.append((state.epoch, len(state.history), state.recipe.epochs))

    run(epochs=2, callbacks=[Watch()])
    first = [(0, step) for step in range(1, BATCHES + 1)]
    second = [(1, step) for step in range(BATCHES + 1, 2 * BATCHES + 1)]
    assert seen == [*first, (1, 1, 2), *second, (2, 2, 2)]


def test_the_hook_is_gone_after_a_run_that_fails():
    class Fail(Callback):
        def on_step_end(self, state) -> None:
            self.optimizer = state.optimizer
            raise KeyboardInterrupt

    fail = Fail()
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[fail])
    assert not fail.optimizer._optimizer_step_post_hooks


def test_evaluate_counts_and_puts_modes_back():
    model = build().train()
    model[2].eval()
    accuracy, loss = evaluate(model, VAL)
    assert [m.training for m in model] == [True, True, False, True, True, True] and model.training
    model.eval()
    logits = model(VAL.x)
    assert accuracy == (logits.argmax(1) == VAL.y).double().mean().item()
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, VAL.y).item(), rel=1e-5)
    with pytest.raises(ValueError, match="no examples"):
        evaluate(model, [])


def test_diverged_training_says_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(FloatingPointError, match=r"epoch 1: the loss is (nan|inf); lower lr"):
        train_dense(model, TRAIN, VAL, Recipe(lr=1e38), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs: got -1"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"momentum": 1.0}, "momentum: got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
        ({"optimizer": "lion"}, "optimizer: got 'lion', need sgd, adam, adamw or rmsprop"),
        ({"schedule": "step"}, "schedule: got 'step'"),
        ({"select": "test"}, "select: got 'test'"),
        ({"warmup_epochs": 5}, "warmup_epochs: got 5"),
        ({"label_smoothing": 1.0}, "label_smoothing: got 1.0"),
        ({"checkpoint_every": 0}, "checkpoint_every: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"train": []}, "train_loader: has no examples"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"select": "best", "val": None}, "needs a validation loader"),
        ({"device": "gpu"}, "device: got 'gpu'"),
        ({"device": "cuda:99"}, "device: got 'cuda:99'"),
    ],
)
def test_a_refused_search_leaves_the_model_dense(options, message):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        run(model, **options)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert type(model[1]) is nn.Linear and model[2].weight.requires_grad


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (st.EdgePopup(density=0.1), "config: density is 0.1, the layer '1' was made with 0.5"),
        (st.EdgePopup(density=0.5, seed=3), "config: seed is 3, the layer '1' was made with 0"),
    ],
)
def test_a_ticket_quotes_the_config_that_made_its_layers(other, message):
    model = build()
    st.sparsify_(model, CONFIG)
    with pytest.raises(ValueError, match=message):
        run(model, config=other)
    result = run(model, epochs=1)
    assert result.report is None and result.ticket.meta["config"]["density"] == 0.5


def test_nothing_to_train():
    model = build().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train_dense(model, TRAIN, VAL, Recipe(epochs=1), progress=False)
