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


# base, target, eps, and what is found: mask (as a signed number), error, status
DEGENERATE = {
    "target 0": ([0.5, -0.3], 0.0, 0.01, 0, 0.0, theory.OK),
    "target within eps of 0": ([0.5, -0.3], 0.005, 0.01, 0, 0.005, theory.OK),
    "all zeros": ([0.0] * 5, 0.5, 0.01, 0, 0.5, theory.NOT_FOUND),
    "all zeros, target 0, eps 0": ([0.0] * 5, 0.0, 0.0, 0, 0.0, theory.OK),
    "n = 1, met": ([0.5], 0.5, 0.0, 1, 0.0, theory.OK),
    "n = 1, not met": ([0.5], 0.2, 0.01, 0, 0.2, theory.NOT_FOUND),
    "n = 0": ([], 0.5, 0.01, 0, 0.5, theory.NOT_FOUND),
    "eps 0, met exactly": ([0.5, 0.25, -1.0], -0.75, 0.0, 0b110, 0.0, theory.OK),
    "eps 0, not met": ([0.5, 0.25], 0.625, 0.0, 1, 0.125, theory.NOT_FOUND),
    "duplicates: the first ones": ([0.25] * 6, 0.5, 0.0, 0b11, 0.0, theory.OK),
    "out of reach": ([0.5, 0.25], 2.0, 0.01, 0b11, 1.25, theory.NOT_FOUND),
}


@pytest.mark.parametrize("objective", ["min_card", "min_error"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate(case, objective):
    base, target, eps, *want = DEGENERATE[case]
    base, target = (torch.tensor([v], dtype=torch.float64) for v in (base, target))
    found = theory.subset_sum(base, target, eps, objective=objective)
    assert [found.mask.item(), found.error.item(), found.status.item()] == want


def test_no_elements_of_a_row_count():
    base = torch.tensor([[0.5, float("nan")], [0.5, 0.25], [0.5, 0.25]])
    found = theory.subset_sum(
        base, torch.tensor([0.5, 0.5, 0.75]), 0.01, lengths=torch.tensor([0, 1, 2])
    )
    assert found.mask.tolist() == [0, 1, 3]
    assert found.error.tolist() == [0.5, 0, 0]
    assert found.status.tolist() == [theory.NOT_FOUND, theory.OK, theory.OK]


def test_the_longest_bases():
    ones = torch.ones(1, 64)
    found = theory.subset_sum(ones, torch.tensor([64.0]), 0.0)
    assert found.mask.item() == -1 and found.status.item() == theory.OK
    last = ones.clone()
    last[0, 63] = 3.5
    assert theory.subset_sum(last, torch.tensor([3.5]), 0.0).mask.item() == -(2**63)
    with pytest.raises(ValueError, match="base: got 65 elements a row, min_card"):
        theory.subset_sum(torch.ones(1, 65), torch.ones(1), 0.1)
    with pytest.raises(ValueError, match="base: got 41 elements a row, min_error"):
        theory.subset_sum(torch.ones(1, 41), torch.ones(1), 0.1, objective="min_error")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", ["base", "target", "eps"])
def test_what_is_not_finite_is_refused(at, value):
    inputs = {"base": torch.ones(2, 3), "target": torch.ones(2), "eps": torch.ones(2).double()}
    inputs[at].view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"subset_sum: {at}: .*(NaN|finite)"):
        theory.subset_sum(inputs["base"], inputs["target"], inputs["eps"])
