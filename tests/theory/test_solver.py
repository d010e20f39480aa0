from __future__ import annotations

import pytest
import torch

import sparseticket as st
from sparseticket import theory


def test_shapes():
    torch.manual_seed(0)
    for rows, shared in [
        ((), (5,)),
        ((), ()),
        ((4,), ()),
        ((3,), (7,)),
        ((2, 3), (2, 2)),
        ((0,), ()),
    ]:
        base, target = torch.rand((*rows, 9)), torch.rand(rows + shared)
        found = st.theory.subset_sum(base, target, 0.05)
        assert all(part.shape == target.shape for part in found)
        bits = (found.mask[..., None] >> torch.arange(9) & 1).double()
        wide = base.view(*rows, *[1] * len(shared), 9).double()
        torch.testing.assert_close((bits * wide).sum(-1), found.value, rtol=0, atol=1e-12)
        assert torch.equal(found.error, (found.value - target.double()).abs())
        assert torch.equal(found.status == theory.OK, found.error <= 0.05)


def test_eps_lengths_and_dtypes():
    base, target = torch.tensor([[0.5, 0.3], [0.5, 0.3]]), torch.tensor([0.3, 0.3])
    found = theory.subset_sum(base, target, 0.0, lengths=torch.tensor([2, 1], dtype=torch.int32))
    assert found.mask.tolist() == [2, 1] and found.status.tolist() == [theory.OK, theory.NOT_FOUND]
    found = theory.subset_sum(base, target, torch.tensor([0.0, 0.25]))
    assert found.mask.tolist() == [2, 1]
    found = theory.subset_sum(base[0], torch.tensor([0.3], dtype=torch.float64), 0.0)
    assert found.status.item() == theory.NOT_FOUND, "0.3 in float32 is not 0.3"


def test_needs_no_detaching():
    base = torch.rand(5, requires_grad=True)
    found = theory.subset_sum(base, torch.zeros(2, requires_grad=True), 0.0)
    assert not any(part.requires_grad for part in found)


def test_refuses_targets_of_other_rows():
    for base, target in [((3, 5), (2,)), ((3, 5), ()), ((), (2,))]:
        with pytest.raises(ValueError, match=r"subset_sum: target: got shape .*need base \[\*rows"):
            theory.subset_sum(torch.ones(base), torch.ones(target), 0.1)
