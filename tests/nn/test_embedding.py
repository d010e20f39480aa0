"""SparseEmbedding against nn.Embedding with the masked weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sparseticket as st

INDICES = torch.tensor([[0, 3, 3], [11, 2, 0]])


def make(form, **options):
    torch.manual_seed(0)
    like = nn.Embedding(12, 5, **options)
    made = st.SparseEmbedding.from_dense(like, form=form, density=0.4, seed=2, layer="e")
    return made, made.to_dense()


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("form", ["masked", "scored", "ticket"])
def test_rows_of_the_masked_table(form, options):
    made, dense = make(form, **options)
    assert torch.equal(made(INDICES), dense(INDICES))
    for shape in ((), (0,), (1,), (2, 0), (2, 3, 4)):
        index = torch.randint(12, shape)
        assert torch.equal(made(index), dense(index))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
def test_gradients_of_the_masked_form(options):
    made, dense = make("masked", **options)
    for module in (made, dense):
        module(INDICES).square().sum().backward()
    live = made.mask.to_dense()
    torch.testing.assert_close(made.weight.grad, dense.weight.grad * live)


def test_scores_get_the_straight_through_gradient():
    made, _ = make("scored")
    grad = torch.randn(2, 3, 5)
    made(INDICES).backward(grad)
    table = torch.zeros(12, 5).index_add(0, INDICES.flatten(), grad.view(-1, 5))
    expected = table * made.weight * made.scores.detach().sign()  # of |score|
    torch.testing.assert_close(made.scores.grad, expected)
    untouched = [i for i in range(12) if i not in INDICES]
    assert (made.scores.grad[untouched] == 0).all()
    assert (made.scores.grad[~made.mask.to_dense()] != 0).any()  # dropped ones have one, too


def test_padding_row_of_random_weights_is_zero():
    made, _ = make("ticket", padding_idx=3)
    assert (made.weight[3] == 0).all() and (made.weight != 0).any()


@pytest.mark.parametrize("form", ["masked", "scored", "ticket"])
def test_copies_and_states(form):
    made, _ = make(form, padding_idx=3)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(INDICES), made(INDICES))
    fresh, _ = make(form, padding_idx=3)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(INDICES), made(INDICES))


def test_ticket_round_trip(tmp_path):
    def build():
        return nn.Sequential(nn.Embedding(12, 5, padding_idx=3), nn.Linear(5, 2, bias=False))

    model = build()
    st.sparsify_(model, st.EdgePopup(density=0.4, seed=2))
    st.Ticket.from_model(model).save(tmp_path / "t.safetensors")
    other = st.Ticket.load(tmp_path / "t.safetensors").apply(build())
    assert torch.equal(other[0](INDICES), model[0](INDICES))
    torch.testing.assert_close(other(INDICES), model(INDICES))


def test_compiled():
    made, _ = make("ticket")
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(INDICES), made(INDICES))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"max_norm: got 1\.0, need None"):
        st.SparseEmbedding(3, 2, max_norm=1.0)
    with pytest.raises(ValueError, match="compressed"):
        st.SparseEmbedding(3, 2, form="compressed")
    model = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Linear(2, 2))
    report = st.sparsify_(model, st.EdgePopup(density=0.5))
    assert "max_norm would rewrite" in dict(report.skipped)["0"]
