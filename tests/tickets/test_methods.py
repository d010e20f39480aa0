"""Every registered method on one small residual net: what all of them promise.

A new method is covered by being in the registry; its own test file checks its formulas.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.cli import main
from sparseticket.nn import ScoreLayer, SparseModule, Superposed
from sparseticket.tickets import METHODS
from sparseticket.tickets.engine import live_layers
from sparseticket.train import Callback, evaluate
from sparseticket.train.checks import CONTROLS, check_layers
from sparseticket.train.loop import Recipe, masks_of
from sparseticket.train.models import _ResNet

NAMES = sorted(METHODS)
LAYERED = [name for name in NAMES if hasattr(METHODS[name], "make")]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return _ResNet((1, 8, 8), 4, depths=(3, 3, 3), width=4, image_stem=False).to(dtype)


def config_of(name, seed=1):
    return METHODS[name](seed=seed)


def converted(name, seed=1, dtype=torch.float32):
    model, config = net(dtype), config_of(name, seed)
    if hasattr(config, "adapt"):
        config.adapt(model)
    return model, config, st.sparsify_(model, config)


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 16, 1, 8, 8, generator=generator)
    y = torch.randint(4, (count, 16), generator=generator)
    return list(zip(x, y, strict=True))


def run(name, seed=1, epochs=3, **options):
    config = config_of(name, seed)
    settings = {"lr": 0.05, **config.recipe, **options}
    return st.search(
        net(), batches(), None, config, epochs=epochs, seed=3, progress=False, **settings
    )


@pytest.fixture(scope="module")
def finished():
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = run(name)
        return cache[name]

    return get


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ScoreLayer | SparseModule)}


@pytest.mark.parametrize("name", NAMES)
def test_a_search_moves_scores_only(name):
    model, config, _ = converted(name)
    weights = {n: layer.weight.clone() for n, layer in layers(model).items()}
    scores = {n: layer.scores.clone() for n, layer in layers(model).items()}
    st.search(model, batches(), None, config, epochs=0, progress=False)
    model, config, _ = converted(name)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    seen = {}

    class Watch(Callback):
        def on_epoch_end(self, state):
            seen["held"] = {id(p) for g in state.optimizer.param_groups for p in g["params"]}
            seen["layers"] = {n: copy.deepcopy(m) for n, m in layers(model).items()}
            seen["grads"] = [m.weight.grad for m in layers(model).values()]

    settings = {"lr": 0.05} | config.recipe
    st.search(
        model, batches(), None, config, epochs=1, progress=False, callbacks=[Watch()], **settings
    )
    assert seen["held"] == trained
    assert not any(seen["grads"])
    moved = 0
    for n, layer in seen["layers"].items():
        assert not layer.weight.requires_grad
        moved += int((layer.scores != scores[n]).sum())
        if config.freezes.startswith("weights") and layer.recipe.sigma and not _rescaled(layer):
            assert torch.equal(layer.weight.view(torch.int32), weights[n].view(torch.int32)), n
    assert moved


def _rescaled(layer):
    return getattr(layer, "scale", None) in ("dynamic", "inverse")


@pytest.mark.parametrize("name", NAMES)
def test_the_ticket_gives_the_logits_of_the_search(finished, name):
    result = finished(name)
    buffer = io.BytesIO(result.ticket.raw)
    ticket = st.Ticket(buffer.getvalue())
    fresh, config = net(), config_of(name)
    if hasattr(config, "adapt"):
        config.adapt(fresh)
    torch.nn.init.normal_(fresh.fc.weight)
    ticket.apply(fresh)
    x = torch.cat([x for x, _ in batches()])
    result.model.eval(), fresh.eval()
    assert torch.equal(result.model(x), fresh(x))
    assert torch.equal(fresh(x), fresh(x))
    assert ticket.masks == masks_of(result.model)
    affine = getattr(config, "affine", False)
    assert bool(ticket.meta["not_weight_free"]) == affine
    for tensor in ticket.tensors:
        assert tensor.startswith(("mask:", "plane")) or "bn" in tensor or "downsample" in tensor


@pytest.mark.parametrize("name", LAYERED)
def test_the_ticket_has_the_weights_of_the_search(name):
    model, config, _ = converted(name)
    for step in range(1, 4):
        for layer in live_layers(model):
            with torch.no_grad():
                layer.scores.add_(0.05 * torch.randn_like(layer.scores))
        config.after_step(model, step)
    before = {n: layer.effective_weight().detach() for n, layer in layers(model).items()}
    for n, layer in layers(model).items():
        assert torch.equal(layer.to_ticket().weight, before[n]), n


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_bytes(finished, name):
    assert run(name).ticket.raw == finished(name).ticket.raw
    assert run(name, seed=2).ticket.masks != finished(name).ticket.masks


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_search_gives_the_same_bytes(finished, tmp_path, name):
    class Stop(Callback):
        def on_epoch_end(self, state):
            if state.epoch == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(name, out=tmp_path, callbacks=[Stop()])
    assert run(name, out=tmp_path).ticket.raw == finished(name).ticket.raw


@pytest.mark.parametrize("name", LAYERED)
def test_gradients_are_straight_through(name):
    """G * W * d surrogate / d scores, G the gradient by the effective weight, taken densely."""
    model, config, _ = converted(name, dtype=torch.float64)
    for layer in (model.conv1, model.fc):
        x = torch.randn(3, 1, 8, 8) if layer is model.conv1 else torch.randn(3, 16)
        x = x.double()
        layer(x).square().sum().backward()
        weight = layer.effective_weight().detach().requires_grad_()
        layer._call(x, weight).square().sum().backward()
        dense = weight.grad * layer.weight
        if layer.pattern is not None:
            dense = layer.pattern.compact(dense)
        scores = layer.scores.detach().double().requires_grad_()
        twin = copy.copy(layer)
        twin._parameters = {**layer._parameters, "scores": scores}
        (config.surrogate(twin) * dense).sum().backward()
        torch.testing.assert_close(layer.scores.grad.double(), scores.grad, rtol=1e-5, atol=1e-9)
        if layer.pattern is None:
            dropped = ~layer.mask.to_dense()
            assert bool(layer.scores.grad[dropped].any()) or not bool(dropped.any())
        assert layer.weight.grad is None


@pytest.mark.parametrize("name", LAYERED)
def test_a_loop_of_ones_own(finished, name):
    """config.attach, before_epoch and complete are all that a search adds to a plain loop."""
    result = finished(name)
    model, config, _ = converted(name)
    settings = {"lr": 0.05, "weight_decay": 1e-4} | dict(config.recipe)
    recipe = Recipe(epochs=3, **settings)
    kind = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}[recipe.optimizer]
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    scores = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(scores, weight_decay=recipe.weight_decay, lr=recipe.lr, **more)
    with pytest.raises(ValueError, match=r"use config\.attach\(model, optimizer\)"):
        st.attach(model, optimizer)
    config.attach(model, optimizer)
    for epoch in range(3):
        config.before_epoch(model, epoch, 3)
        optimizer.param_groups[0]["lr"] = recipe.lr_at(epoch)
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    config.complete(model)
    assert st.Ticket.from_model(model, config=config).raw == result.ticket.raw


@pytest.mark.parametrize("name", LAYERED)
def test_layers_compile_whole(name):
    model, _, _ = converted(name)
    layer, x = model.fc, torch.randn(5, 16, requires_grad=True)

    def gradients(call):
        y = call(x)
        return y, torch.autograd.grad(y.square().sum(), [x, layer.scores])

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x), fullgraph=True, backend="aot_eager")
    (y, grads), (y2, grads2) = gradients(layer), gradients(compiled)
    for a, b in zip((y, *grads), (y2, *grads2), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_ranks_in_float32(name):
    result = run(name, epochs=1, amp=True)
    assert all(m.numel for m in result.ticket.masks.values())


@pytest.mark.parametrize("name", NAMES)
def test_converted_models_copy_pickle_and_load(name):
    model, _, _ = converted(name)
    x = batches()[0][0]
    model.eval()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    other, _, _ = converted(name, seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_scores_stay_float32(name):
    model, _, _ = converted(name)
    masks = masks_of(model)
    model.to(torch.bfloat16)
    assert masks_of(model) == masks
    for layer in layers(model).values():
        assert layer.scores.dtype == torch.float32 and layer.dtype == torch.bfloat16
    assert model.eval()(batches()[0][0].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_are_left_out_stay_dense_and_are_told(name):
    model, config = net(), config_of(name)
    report = st.sparsify_(model, config, lambda module, n: n != "fc")
    assert type(model.fc) is nn.Linear
    assert "fc.weight" in report.not_weight_free
    assert ("fc", "left out by filter_fn") in report.skipped
    assert str(report)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_says_what_it_is(name):
    config = METHODS[name]
    for field in dataclasses.fields(config):
        assert field.metadata["help"]
    text = sys.modules[config.__module__].__doc__
    assert "Deviations from" in text and any(str(year) in text for year in range(2019, 2027))
    assert set(config.recipe) <= {f.name for f in dataclasses.fields(Recipe)}
    Recipe(**config.recipe)
    assert config.freezes
    with pytest.raises(ValueError, match="seed"):
        config(seed=-1)
    with pytest.raises((TypeError, ValueError), match="density"):
        config(density=1.5)


@pytest.mark.parametrize("name", NAMES)
def test_search_from_the_command_line(tmp_path, capsys, name):
    pytest.importorskip("sklearn", reason="digits need the [demo] extra")
    out = tmp_path / "run"
    assert main(["search", "--method", name, "--epochs", "1", "--out", str(out)]) == 0
    found = capsys.readouterr().out
    assert main(["eval", str(out / "ticket.safetensors")]) == 0
    accuracy = found.split("test accuracy")[1].split("%")[0].strip()
    assert f"test accuracy {accuracy} %" in capsys.readouterr().out
    assert main(["info", str(out / "ticket.safetensors")]) == 0
    assert f"method {name}," in capsys.readouterr().out
    assert main(["check", str(out / "ticket.safetensors"), "--seeds", "1"]) == 0
    title, _, _, _, ticket, *controls = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{name}, ") and ticket.split()[:2] == ["ticket", accuracy]
    assert [line.rpartition(" %")[0].split("  ")[0] for line in controls] == list(CONTROLS)


def rebuilt(ticket, name):
    model, config = net(), config_of(name)
    if hasattr(config, "adapt"):
        config.adapt(model)
    return ticket.apply(model)


def ticket_layers(model):
    return [m for m in model.modules() if isinstance(m, SparseModule | Superposed)]


def planes(layer):
    return layer.masks if isinstance(layer, Superposed) else [layer.mask]


@pytest.mark.parametrize("name", NAMES)
def test_each_control_changes_one_thing(finished, name):
    def build():
        return rebuilt(finished(name).ticket, name)

    seen = []
    rows = check_layers(build, lambda model: seen.append(model) or float(len(seen)), seeds=2)
    assert [row["control"] for row in rows] == ["ticket", *CONTROLS]
    assert [row["scores"] for row in rows] == [[1], [2, 3], [4, 5], [6, 7]]
    assert rows[0]["std"] is None and rows[1]["mean"] == 2.5
    assert rows[1]["std"] == pytest.approx(0.5**0.5)
    own, *rest = map(ticket_layers, seen)
    for twins in zip(own, *rest, strict=True):
        ticket, shuffled, shuffled2, redrawn, redrawn2, inverted, inverted2 = twins
        assert planes(redrawn) == planes(redrawn2) == planes(ticket)
        assert len({layer.recipe.seed for layer in (ticket, redrawn, redrawn2)}) == 3
        assert dataclasses.replace(redrawn.recipe, seed=ticket.recipe.seed) == ticket.recipe
        moved = [shuffled, shuffled2, inverted, inverted2]
        together = not (isinstance(ticket, Superposed) and ticket.kind == "tasks")
        for layer in moved:
            assert layer.recipe == ticket.recipe
            assert [m.kept for m in planes(layer)] == [m.kept for m in planes(ticket)]
            if together:  # the weights' multipliers are the same ones, elsewhere
                assert layer.mask.kept == ticket.mask.kept
        n, kept = ticket.mask.numel, ticket.mask.kept
        for layer in (inverted, inverted2):
            assert (layer.mask & ticket.mask).kept == max(2 * kept - n, 0)
        if 50 < kept < n - 50:
            different = {hash(tuple(planes(layer))) for layer in [ticket, *moved]}
            half = 2 * kept == n and len(planes(ticket)) == 1  # which has one complement only
            assert len(different) == (4 if half else 5)


def test_methods_lists_them_all(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for name, config in METHODS.items():
        assert f"{name}: " in text and f"frozen: {config.freezes}" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_export_has_the_weights_of_the_ticket(finished, name):
    model = rebuilt(finished(name).ticket, name).eval()
    dense = st.to_dense(model)
    for own, plain in zip(model.modules(), dense.modules(), strict=True):
        if isinstance(own, SparseModule | Superposed):
            assert type(plain) is own._BASE and torch.equal(plain.weight, own.weight)
    x = torch.cat([x for x, _ in batches()])
    torch.testing.assert_close(dense(x), model(x), rtol=1e-5, atol=1e-5)
    searched = finished(name).model.eval()
    torch.testing.assert_close(st.to_dense(searched)(x), searched(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_found(finished, name):
    raw = finished(name).ticket.raw
    for place in range(len(raw) // 3, len(raw), max(len(raw) // 40, 1)):
        damaged = raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :]
        with pytest.raises(st.TicketError):
            st.Ticket(damaged)


def test_superposed_layers_are_tickets(finished):
    kinds = {
        m.kind
        for name in NAMES
        for m in finished(name).model.modules()
        if isinstance(m, Superposed)
    }
    assert "sum" in kinds
    assert evaluate(finished("multicoat").model, batches())[1] > 0
