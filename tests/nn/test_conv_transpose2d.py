"""SparseConvTranspose2d: every form against torch's layer with the masked weight."""

from __future__ import annotations

import copy
import io

import oracle
import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.formats import kept_count
from sparseticket.tickets import get_method

FORMS = ("masked", "scored", "ticket", "compressed")
LAYERS = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1, "output_padding": 1},
    "groups": {"groups": 2, "stride": (2, 1), "padding": (1, 0), "bias": False},
    "dilated": {"dilation": (2, 1), "kernel_size": (2, 3), "padding": 1},
    "point": {"kernel_size": 1},
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def build(layer="stride", form="scored", **ours):
    given = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | LAYERS[layer]
    return st.SparseConvTranspose2d(**given, form=form, **({"density": 0.4, "seed": 1} | ours))


def images(*shape):
    return torch.randn(shape or (2, 4, 5, 7))


def assert_like_dense(module, x, **call):
    """Output and input gradient within the element-wise bound of the dense layer in float64."""
    dense, x = module.to_dense(), x.clone().requires_grad_()
    y = module(x, **call)
    grad = torch.randn(y.shape).to(y.dtype)
    y.backward(grad)

    def run(change):
        twin = copy.deepcopy(dense).double()
        with torch.no_grad():
            for p in twin.parameters():
                p.copy_(change(p))
        x64 = change(x.detach().double()).requires_grad_()
        y64 = twin(x64, **call)
        y64.backward(change(grad.double()))
        return y64.detach(), x64.grad

    runs = zip(run(lambda t: t), run(torch.abs), run(torch.ones_like), strict=True)
    for got, (ref, bound, terms) in zip((y.detach(), x.grad), runs, strict=True):
        oracle.assert_bounded(got, ref, bound, terms)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_the_dense_layer_with_masked_weight(layer, form):
    module = build(layer, form)
    dense = module.to_dense()
    assert type(dense) is nn.ConvTranspose2d
    assert module.mask.shape == tuple(dense.weight.shape)  # [in, out/groups, kh, kw]
    assert module.mask.kept == kept_count(0.4, dense.weight.numel())
    assert torch.equal(dense.weight != 0, module.mask.to_dense())
    x = images()
    for part in (x, x[:1], x[0]):
        assert_like_dense(module, part)
    assert module(x[:0]).shape == dense(x[:0]).shape
    assert str(module.explain(x)).endswith(
        "(transposed convolutions are torch's own, on the masked weight)"
    )
    for density in (0.0, 1.0):
        edge = build(layer, form, density=density)
        assert edge.mask.density == density
        assert_like_dense(edge, x)


@pytest.mark.parametrize("form", FORMS)
def test_the_output_size_may_be_asked_for(form):
    module, x = build("stride", form), images()
    for size in ([9, 13], [10, 14]):
        assert module(x, size).shape[-2:] == tuple(size)
        assert_like_dense(module, x, output_size=size)
    with pytest.raises(ValueError, match="requested an output size"):
        module(x, [40, 40])


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize("layer", ["stride", "groups"])
def test_straight_through_gradient(layer, transform):
    module = build(layer, transform=transform, weights="uniform")
    x, dense = images(), module.to_dense()  # its weight is the leaf W_eff
    grad = torch.randn_like(dense(x))
    module(x).backward(grad)
    dense(x).backward(grad)
    expected = dense.weight.grad * module.weight
    if transform == "abs":
        expected = expected * module.scores.sign()
    torch.testing.assert_close(module.scores.grad, expected.detach(), rtol=1e-4, atol=1e-5)
    dropped = ~module.mask.to_dense()
    assert (module.scores.grad[dropped] != 0).float().mean() > 0.9
    assert module.weight.grad is None


@pytest.mark.parametrize("raw", [False, True])
def test_trained_forms_learn_what_is_live(raw):
    module, x = build(form="masked"), images()
    dense, keep = module.to_dense(), module.mask.to_dense()
    small = module.to_form("compressed")
    optimizer = st.MaskedSGD(module, 0.1, raw_grad=raw)
    for layer in (module, dense, small):
        layer(x).square().sum().backward()
    if not raw:
        assert not module.weight.grad[~keep].any()
    torch.testing.assert_close(
        module.weight.grad, dense.weight.grad if raw else dense.weight.grad * keep
    )
    torch.testing.assert_close(small.values.grad, small._live(dense.weight.grad))
    optimizer.step()
    with torch.no_grad():
        dense.weight -= 0.1 * dense.weight.grad * keep
    torch.testing.assert_close(module.to_dense().weight, dense.weight)


@pytest.mark.parametrize("optimizer", [st.PopupSGD, st.PopupAdamW])
def test_a_search_steps_the_scores_and_never_the_weights(optimizer):
    ours, theirs = build(), build()
    plain = {st.PopupSGD: torch.optim.SGD, st.PopupAdamW: torch.optim.AdamW}[optimizer]
    settings = {"lr": 0.01, "weight_decay": 0.0}
    if optimizer is st.PopupSGD:
        settings["momentum"] = 0.9
    before = ours.weight.clone()
    fused, other = optimizer(ours, **settings), plain([theirs.scores], **settings)
    st.attach(theirs, other)
    for _ in range(5):
        x = images()
        for model, step in ((ours, fused), (theirs, other)):
            step.zero_grad()
            model(x).square().mean().backward()
            step.step()
    assert torch.equal(ours.weight, before) and torch.equal(theirs.weight, before)
    assert ours.mask == theirs.mask != build().mask
    torch.testing.assert_close(ours.scores, theirs.scores)


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_to_form_keeps_weights_bit_for_bit(source, target):
    module = build(form=source, weights="signed_constant", scale="density").eval()
    new = module.to_form(target)
    assert (new.form, new.training, new.mask) == (target, False, module.mask)
    assert torch.equal(new.to_dense().weight, module.to_dense().weight)
    assert torch.equal(new.bias, module.bias)
    x = images()
    torch.testing.assert_close(new(x), module(x))
    assert torch.equal(module.to_form(source)(x), module(x))


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_state_give_the_same_output(form):
    module, x = build(form=form), images()
    pickled = io.BytesIO()
    torch.save(module, pickled)
    pickled.seek(0)
    other = build(form=form, seed=7)
    if form == "compressed":
        other = st.SparseConvTranspose2d.from_dense(other.to_dense(), form=form, density=0.4)
    other.load_state_dict(module.state_dict())
    twins = [copy.deepcopy(module), torch.load(pickled, weights_only=False), other]
    for twin in twins:
        assert torch.equal(twin(x), module(x)) and twin.mask == module.mask


@pytest.mark.parametrize("form", FORMS)
def test_autocast_and_compile(form):
    module, x = build(form=form), images()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    expected = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert torch.equal(y, expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    with pytest.raises(TypeError, match="need torch"):
        module(x.double())


def test_dense_checkpoint_loads_strictly_into_masked():
    dense, module = build().to_dense(), build(form="masked")
    mask = module.mask
    module.load_state_dict(dense.state_dict())
    assert torch.equal(module.weight, dense.weight) and module.mask == mask
    largest = st.SparseConvTranspose2d.from_dense(dense, density=0.2)
    assert largest.mask == st.select_mask(dense.weight, density=0.2)
    assert (largest.stride, largest.output_padding) == ((2, 2), (1, 1))


def test_codes_and_bad_input_are_refused():
    with pytest.raises(ValueError, match="codes: got True"):
        build(form="ticket", codes=True)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 3, 5, 7\), need .* C = 4"):
        build(form="ticket")(images(2, 3, 5, 7))
    with pytest.raises(ValueError, match="zeros"):
        build(padding_mode="reflect")


# In models --------------------------------------------------------------------------------------


def generator() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 32, bias=False),
        nn.Unflatten(1, (8, 2, 2)),
        nn.BatchNorm2d(8, affine=False),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
        nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1, groups=2, bias=False),
        nn.Conv2d(2, 1, 3),
    )


METHODS = ("edge-popup", "gem-miner", "frozen", "iterand", "biprop", "multicoat")


@pytest.mark.parametrize("method", METHODS)
def test_ticket_file_round_trip(tmp_path, method):
    """From the search's own layers through a file into a new model: the same pictures."""
    model, z = generator(), torch.randn(3, 5)
    report = st.sparsify_(model, get_method(method)(density=0.4, seed=3))
    assert [c.name for c in report.converted] == ["0", "3", "4", "5"]
    model(z).sum().backward()
    assert all(layer.scores.grad.abs().sum() > 0 for layer in (model[3], model[4]))
    st.Ticket.from_model(model).save(tmp_path / "a.safetensors")
    ticket = st.Ticket.load(tmp_path / "a.safetensors")
    assert ticket.meta["format_version"] == 3
    assert ticket.meta["layers"]["4"]["output_padding"] == [1, 1]
    again = ticket.apply(generator())
    torch.testing.assert_close(again.eval()(z), model.eval()(z))
    assert all(again[i].mask == model[i].mask for i in (0, 3, 4, 5))
    other = generator()
    other[4] = nn.ConvTranspose2d(4, 2, 3, stride=2, groups=2, bias=False)
    with pytest.raises(st.TicketError, match=r"4: output_padding: the ticket has \[1, 1\]"):
        ticket.apply(other)


def test_a_tuned_layer_gives_the_same_output():
    model, x = nn.Sequential(build(form="masked")).eval(), images()
    y = model(x)
    (tuned,) = st.tune(model, x, samples=1).values()
    assert tuned.kernel == "materialised"
    assert torch.equal(model(x), y)


def test_densify_and_forms_of_a_model():
    model, z = generator().eval(), torch.randn(3, 5)
    st.sparsify_(model, st.EdgePopup(density=0.4))
    y = model(z)
    st.to_form_(model, "ticket")
    assert type(model[3]) is st.SparseConvTranspose2d
    torch.testing.assert_close(model(z), y)
    st.densify_(model)
    assert type(model[3]) is nn.ConvTranspose2d
    torch.testing.assert_close(model(z), y)
