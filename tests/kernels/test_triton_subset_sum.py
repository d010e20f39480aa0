"""The CUDA body of subset_sum, bit by bit against the reference."""

from __future__ import annotations

import pytest
import torch

from sparseticket import ops
from sparseticket.reference.subset_sum import subset_sum as reference


def _check(device, on_cuda, base, target, eps, lengths, *options):
    given = [t if t is None else t.to(device) for t in (base, target, eps, lengths)]
    got = on_cuda(ops.subset_sum, *given, *options)
    for part, expected in zip(got, reference(base, target, eps, lengths, *options), strict=True):
        assert part.dtype == expected.dtype and torch.equal(part.cpu(), expected)


@pytest.mark.parametrize("max_card", [1, 2, 3, 4])
def test_few(device, on_cuda, launches, max_card):
    torch.manual_seed(0)
    for n, rows, shared in [(0, 2, 2), (1, 3, 1), (4, 9, 1), (18, 2, 5)]:
        base, target = torch.rand(rows, n) * 2 - 1, torch.rand(rows, shared) * 2 - 1
        eps = 0.05 * torch.rand(rows, shared, dtype=torch.float64)
        for lengths in (None, torch.randint(0, n + 1, (rows,))):
            for fallback in ("dp", "none"):
                _check(device, on_cuda, base, target, eps, lengths, "min_card", max_card, fallback)
    assert set(launches) == {"_few"}


def test_duplicates_and_other_grids(device, on_cuda):
    torch.manual_seed(0)
    zero = torch.zeros((), dtype=torch.float64)
    coarse = torch.randint(-4, 5, (4, 12)) / 4
    _check(device, on_cuda, coarse, torch.tensor([[0.0], [0.5], [7.25], [-40]]), zero, None)
    for scale in (1e-30, 1e30):
        base, target = torch.randn(4, 10) * scale, torch.randn(4, 2) * scale
        _check(device, on_cuda, base, target, zero + scale / 50, None)
    _check(device, on_cuda, torch.zeros(2, 5), torch.tensor([[0.0], [1.0]]), zero, None)


def test_long_rows(device, on_cuda):
    torch.manual_seed(0)
    base, target = torch.rand(2, 64) * 2 - 1, torch.rand(2, 1) * 20
    eps = torch.tensor(1e-3, dtype=torch.float64)
    _check(device, on_cuda, base, target, eps, None, "min_card", 2)
    base[:, 63] = target[:, 0] = 100
    _check(device, on_cuda, base, target, eps, None, "min_card", 2)


@pytest.mark.parametrize("n", [0, 5, 8, 11, 17])
def test_least(device, on_cuda, launches, n):
    torch.manual_seed(n)
    eps = torch.tensor(0.01, dtype=torch.float64)
    base, target = torch.rand(5, n) * 2 - 1, torch.rand(5, 2) * 2 - 1
    for given in (base, (base * 4).round() / 4):
        for lengths in (None, torch.randint(0, n + 1, (5,))):
            _check(device, on_cuda, given, target, eps, lengths, "min_error")
    assert set(launches) == (set() if n == 17 else {"_least"})


def test_refuses_what_is_not_finite(device, on_cuda):
    base, eps = torch.ones(1, 2, device=device), torch.zeros((), dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="subset_sum: base: got an infinite number or NaN"):
        on_cuda(ops.subset_sum, base * float("inf"), base[:, :1], eps)
    with pytest.raises(ValueError, match="subset_sum: target: got an infinite number or NaN"):
        on_cuda(ops.subset_sum, base, base[:, :1] * float("nan"), eps)
