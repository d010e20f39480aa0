"""SparseMultiheadAttention against nn.MultiheadAttention with the masked weights."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.nn.attention import PROJECTIONS

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "batch first": {"batch_first": True},
    "own sizes": {"kdim": 6, "vdim": 10},
    "own sizes, extra keys": {"kdim": 6, "vdim": 10, "add_bias_kv": True, "batch_first": True},
}
LENGTH, SOURCE, BATCH, HEADS = 5, 7, 3, 2


def pair(options, form="masked", **ours):
    """A sparse module and torch's with its masked weights."""
    torch.manual_seed(0)
    like = nn.MultiheadAttention(8, HEADS, **options)
    for p in like.parameters():
        nn.init.normal_(p, std=0.5)
    made = st.SparseMultiheadAttention.from_dense(like, form=form, seed=3, **ours)
    return made, made.to_dense()


def inputs(options, batched=True):
    torch.manual_seed(1)
    sizes = [(LENGTH, 8), (SOURCE, options.get("kdim", 8)), (SOURCE, options.get("vdim", 8))]
    first = options.get("batch_first", False)
    shapes = [
        (size if not batched else (BATCH, *size) if first else (size[0], BATCH, size[1]))
        for size in sizes
    ]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": "bool"},
    "padding floats": {"key_padding_mask": "float"},
    "mask": {"attn_mask": "bool"},
    "mask of every head": {"attn_mask": "heads"},
    "both": {"attn_mask": "float", "key_padding_mask": "float"},
}


def masks(kinds, batched):
    torch.manual_seed(2)
    n = BATCH if batched else 1
    given = {}
    for name, kind in kinds.items():
        shape = (LENGTH, SOURCE) if name == "attn_mask" else (n, SOURCE)
        if kind == "heads":
            shape = (n * HEADS, LENGTH, SOURCE)
        hidden = torch.rand(shape) < 0.3
        hidden[..., 0] = False  # a row without keys is NaN in both
        if name == "key_padding_mask" and not batched:
            hidden = hidden[0]
        given[name] = hidden if kind != "float" else torch.randn(hidden.shape)
    return given


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kinds", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_torch(options, kinds, batched):
    options = OPTIONS[options]
    made, dense = pair(options, density=0.6)
    given = masks(MASKS[kinds], batched)
    for weights, average in ((True, True), (True, False), (False, True)):
        results = []
        for module in (made, dense):
            x = inputs(options, batched)
            y, attention = module(*x, need_weights=weights, average_attn_weights=average, **given)
            y.square().sum().backward()
            results.append((y, attention, [t.grad for t in x]))
        (y, a, grads), (y2, a2, grads2) = results
        torch.testing.assert_close(y, y2, rtol=1e-4, atol=1e-5)
        assert (a is None) == (a2 is None) == (not weights)
        if weights:
            torch.testing.assert_close(a, a2, rtol=1e-4, atol=1e-6)
        for g, g2 in zip(grads, grads2, strict=True):
            torch.testing.assert_close(g, g2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_causal_hint(need_weights):
    made, dense = pair({"batch_first": True}, density=0.6)
    x = torch.randn(2, 6, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    torch.testing.assert_close(made(x, x, x, **options)[0], dense(x, x, x, **options)[0])
    with pytest.raises(ValueError, match="attn_mask: got None with is_causal=True"):
        made(x, x, x, is_causal=True)


def test_gradients_of_masked_weights_and_dead_ones():
    made, dense = pair({}, density=0.5)
    for module in (made, dense):
        module(*inputs({}))[0].square().sum().backward()
    packed = dense.in_proj_weight.grad.chunk(3)
    for name, expected in zip(PROJECTIONS, [*packed, dense.out_proj.weight.grad], strict=True):
        layer = getattr(made, name)
        live = layer.mask.to_dense()
        torch.testing.assert_close(layer.weight.grad, expected * live, rtol=1e-3, atol=1e-4)


def test_dropout_is_torchs():
    made, dense = pair({"dropout": 0.5}, density=0.5)
    outputs = []
    for module in (made.train(), dense.train()):
        torch.manual_seed(5)
        outputs.append(module(*inputs({}))[0])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert torch.equal(made.eval()(*inputs({}))[0], made(*inputs({}))[0])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_query_and_key_are_scaled_by_the_fourth_root_of_the_head(heads):
    plain, scaled = (
        st.SparseMultiheadAttention(
            16, heads, form="ticket", seed=3, layer="a", density=0.5, qk_scale=scale
        )
        for scale in (False, True)
    )
    for name in PROJECTIONS:
        one, other = getattr(plain, name), getattr(scaled, name)
        assert torch.equal(one.mask.words, other.mask.words)
        factor = (16 // heads) ** 0.25 if name in ("q_proj", "k_proj") else 1.0
        # sigma is rounded to bfloat16 once, after the factor
        kaiming = (2 / 16) ** 0.5
        expected = float(torch.tensor(kaiming * factor).bfloat16())
        assert other.recipe.sigma == expected
        assert torch.equal(one.weight.sign(), other.weight.sign())


def test_projections_have_streams_of_their_own():
    made = st.SparseMultiheadAttention(16, 2, form="ticket", seed=3, layer="a", density=0.5)
    weights = [getattr(made, name).weight.sign() for name in PROJECTIONS]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


@pytest.mark.parametrize("form", ["masked", "scored", "ticket"])
def test_copies_and_states(form):
    made, _ = pair({"add_bias_kv": True}, form, density=0.5)
    x = inputs({})
    expected = made(*x)[0]
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(*x)[0], expected)
    fresh, _ = pair({"add_bias_kv": True}, form, density=0.5)
    stored = io.BytesIO()
    torch.save(made.state_dict(), stored)
    stored.seek(0)
    fresh.load_state_dict(torch.load(stored))
    assert torch.equal(fresh(*x)[0], expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_dense_checkpoint_loads_strictly(options):
    made, _ = pair(OPTIONS[options], density=1.0)
    other = nn.MultiheadAttention(8, HEADS, **OPTIONS[options])
    made.load_state_dict(other.state_dict())
    x = inputs(OPTIONS[options])
    torch.testing.assert_close(made(*x)[0], other(*x)[0], rtol=1e-4, atol=1e-5)


def test_forms_hold_the_same_weights():
    made, _ = pair({}, "scored", density=0.5)
    st.update_masks(made)
    x = inputs({})
    expected = made(*x)[0]
    ticket = made.to_form("ticket")
    torch.testing.assert_close(ticket(*x)[0], expected, rtol=1e-4, atol=1e-5)
    for name in PROJECTIONS:
        live = getattr(made, name)
        assert torch.equal(getattr(ticket, name).weight, live.weight * live.mask.to_dense())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, HEADS, batch_first=True, bias=False)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def test_a_model_is_converted_and_its_ticket_reloads_to_the_same_logits(tmp_path):
    torch.manual_seed(0)
    model = Block()
    report = st.sparsify_(model, st.EdgePopup(density=0.4, seed=2))
    assert isinstance(model.attention, st.SparseMultiheadAttention) and not report.skipped
    x = torch.randn(3, 6, 8)
    st.Ticket.from_model(model).save(tmp_path / "t.safetensors")
    other = st.Ticket.load(tmp_path / "t.safetensors").apply(Block())
    assert torch.equal(other(x), st.Ticket.load(tmp_path / "t.safetensors").apply(Block())(x))
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    again = st.Ticket.from_model(other)
    assert again.meta["masks_sha256"] == st.Ticket.from_model(model).meta["masks_sha256"]


def test_torchs_encoder_layer_takes_it():
    """Not its fast path, which would read packed weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, HEADS, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = layer(x)
        layer.self_attn = st.SparseMultiheadAttention.from_dense(layer.self_attn, form="masked")
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_compiled_and_autocast():
    made, _ = pair({"batch_first": True}, "ticket", density=0.5)
    x = torch.randn(2, 5, 8)
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x)[0], made(x, x, x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = made(x, x, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), made(x, x, x)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 9, "num_heads": 2}, "embed_dim, num_heads: got 9, 2"),
        ({"embed_dim": 8, "num_heads": 0}, "embed_dim, num_heads: got 8, 0"),
        ({"embed_dim": 8, "num_heads": 2, "form": "masked", "qk_scale": True}, "qk_scale=True"),
    ],
)
def test_bad_constructions(arguments, message):
    with pytest.raises(ValueError, match=message):
        st.SparseMultiheadAttention(**arguments)


def test_bad_calls():
    made, _ = pair({}, density=0.5)
    q, k, v = inputs({})
    with pytest.raises(ValueError, match=r"key: got shape \(7, 8\), need 3 dimensions"):
        made(q, k[:, 0], v)
    with pytest.raises(ValueError, match="a batch of 3, the query's"):
        made(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match=r"attn_mask: got shape \(5, 5\)"):
        made(q, k, v, attn_mask=torch.zeros(5, 5))
    with pytest.raises(TypeError, match=r"key_padding_mask: got torch\.int64"):
        made(q, k, v, key_padding_mask=torch.zeros(3, 7, dtype=torch.int64))
    with pytest.raises(TypeError, match="is not exactly"):
        st.SparseMultiheadAttention.from_dense(nn.Linear(2, 2))
