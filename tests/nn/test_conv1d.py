"""SparseConv1d beside SparseConv2d of height 1 and nn.Conv1d; the forms that test_modules lacks."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket import ops
from sparseticket.nn import SuperposedConv1d
from sparseticket.tickets import get_method

LAYERS = {
    "plain": ((24, 32, 3), {"padding": 1}),
    "same, even kernel": ((8, 12, 4), {"padding": "same", "bias": False}),
    "strided groups": ((8, 12, 3), {"padding": 2, "stride": 2, "groups": 2}),
    "depthwise reflect": ((6, 6, 3), {"padding": 1, "padding_mode": "reflect", "groups": 6}),
    "dilated": ((5, 16, 3), {"padding": 2, "dilation": 2}),
    "point": ((7, 3, 1), {}),
}


@pytest.fixture(params=LAYERS)
def dense(request):
    torch.manual_seed(0)
    args, kwargs = LAYERS[request.param]
    return nn.Conv1d(*args, **kwargs)


def _sequence(module, *size):
    return torch.randn(*size[:-1], module.in_channels, size[-1])


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def _net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 8, 5, padding=2, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 6, 3, stride=2, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 8, 3, bias=False),
    )


@pytest.mark.parametrize("form", ["masked", "scored", "ticket"])
def test_is_the_two_dimensional_layer_of_height_one(form):
    given = {"form": form, "density": 0.3, "seed": 5, "layer": "c", "weights": "signed_constant"}
    flat = st.SparseConv1d(10, 6, 3, bias=False, **given)
    image = st.SparseConv2d(10, 6, (1, 3), bias=False, **given)
    assert torch.equal(flat.mask_words, image.mask_words)
    assert torch.equal(flat.weight, image.weight.squeeze(2))
    x = torch.randn(4, 10, 21)
    assert torch.equal(flat(x), image(x.unsqueeze(2)).squeeze(2))
    if form == "scored":
        assert torch.equal(flat.scores, image.scores.squeeze(2))
        assert flat.state_dict()["scores"].shape == flat.state_dict()["weight"].shape == (6, 10, 3)


def test_a_dense_checkpoint_loads_and_comes_back(dense):
    sparse = st.SparseConv1d.from_dense(dense, density=0.5)
    other = copy.deepcopy(dense)
    nn.init.normal_(other.weight)
    sparse.load_state_dict(other.state_dict())
    assert torch.equal(sparse.weight, other.weight)
    back = sparse.to_dense()
    assert type(back) is nn.Conv1d and back.state_dict().keys() == dense.state_dict().keys()
    assert torch.equal(back.weight, other.weight * sparse.mask.to_dense())


def test_compressed_forward_and_gradients_are_the_dense_layers(dense):
    sparse = st.SparseConv1d.from_dense(dense, density=0.3, form="compressed")
    dense = sparse.to_dense()
    for size in [(2, 40), (40,), (3, 11), (1, 11), (1, 11), (2, 40)]:
        x = _sequence(sparse, *size).requires_grad_()
        y, expected = sparse(x), dense(x)
        _close(y, expected)
        grad = torch.randn_like(y)
        gx, gv = torch.autograd.grad(y, [x, sparse.values], grad)
        ex, ew = torch.autograd.grad(expected, [x, dense.weight], grad)
        _close(gx, ex)
        _close(gv, ops.gather_live(ew, sparse.mask_words, gv.numel()))
    assert sparse.explain(x).kernel
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(sparse), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), sparse(x))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), sparse(x))


@pytest.mark.parametrize("codes", [False, True])
def test_a_ticket_keeps_codes(codes):
    ticket = st.SparseConv1d(8, 8, 3, form="ticket", density=0.4, seed=1, codes=codes)
    x = torch.randn(2, 8, 30)
    _close(ticket(x), ticket.to_dense()(x).detach())
    assert (ticket.codes is not None) == codes


@pytest.mark.parametrize("method", ["edge-popup", "frozen", "iterand", "multicoat", "supsup"])
def test_a_search_and_its_ticket(method, tmp_path):
    config = get_method(method)(
        seed=2, **({"period": 1, "redraw": 1.0} if method == "iterand" else {})
    )
    batches = [(torch.randn(8, 1, 16), torch.randint(3, (8,))) for _ in range(3)]
    settings = {"lr": 0.05, **config.recipe}
    result = st.search(_net(), batches, None, config, epochs=2, progress=False, **settings)
    result.ticket.save(tmp_path / "a.safetensors")
    ticket = st.Ticket.load(tmp_path / "a.safetensors")
    assert ticket.meta["layers"]["0"]["kind"] == "conv1d"
    assert ticket.meta["format_version"] == 3
    fresh = ticket.apply(_net()).eval()
    x = torch.randn(5, 1, 16)
    assert torch.equal(fresh(x), result.model.eval()(x))
    planes = method in ("iterand", "multicoat")
    assert type(fresh[3]) is (SuperposedConv1d if planes else st.SparseConv1d)
    with pytest.raises(st.TicketError, match="3: the ticket has a conv1d layer"):
        other = _net()
        other[3] = nn.Conv2d(8, 6, 3)
        ticket.apply(other)


@pytest.mark.parametrize("optimizer", ["PopupSGD", "MaskedSGD", "MaskedAdamW"])
def test_the_fused_optimizers_are_torchs(optimizer):
    """Two layers, the same but for a torch optimizer under the same mask, stay the same."""
    form = "scored" if optimizer == "PopupSGD" else "masked"
    ours = nn.Sequential(st.SparseConv1d(6, 8, 3, form=form, density=0.4, seed=3, bias=False))
    theirs = copy.deepcopy(ours)
    kwargs = {"lr": 0.1} | ({} if optimizer == "MaskedAdamW" else {"momentum": 0.9})
    kind = torch.optim.AdamW if optimizer == "MaskedAdamW" else torch.optim.SGD
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizers = [getattr(st, optimizer)(ours, **kwargs), kind(trained, **kwargs)]
    if form == "scored":
        st.attach(theirs, optimizers[1])
    for _ in range(3):
        x = torch.randn(4, 6, 20)
        for model, step in zip((ours, theirs), optimizers, strict=True):
            step.zero_grad()
            model(x).square().mean().backward()
            step.step()
        assert torch.equal(ours[0].mask_words, theirs[0].mask_words)
        _close(ours(x), theirs(x))


def test_autocast_is_in_its_dtype():
    layer = st.SparseConv1d(6, 8, 3, density=0.4, padding=1, padding_mode="reflect")
    x = torch.randn(4, 6, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = layer.to_dense()(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_the_first_layer_of_edge_popup_may_be_one():
    model = _net()
    st.sparsify_(model, st.EdgePopup(density=0.5, first_layer="full"))
    assert model[0].mask.density == 1 and model[3].mask.density == 0.5


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 6, 3, 9), (9,)])
def test_a_wrong_input_is_named(shape):
    layer = st.SparseConv1d(6, 8, 3, form="ticket", seed=0)
    with pytest.raises(ValueError, match=r"SparseConv1d: x: got shape .*, need \[N, C, L\]"):
        layer(torch.randn(shape))
