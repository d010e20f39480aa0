"""Matching of feature moments: Yeo, Jang, Sohn, Han, Yoo, "Can we find strong lottery tickets in
generative models?", AAAI 2023, whose loss is GFMN's (dos Santos et al., ICCV 2019).

A generator's pictures shall have the mean and the variance, feature by feature, that real ones have
in a frozen network. Averages over one batch are noisy, so that the loss is not the distance but
L_G = v_mu . (mu_r - mu_f) + v_var . (var_r - var_f), where the v's follow the differences by one
Adam step each before it (Adam moving averages) and are constants in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["MomentMatcher", "Moments", "frechet_distance", "moment_distance", "moments_of"]


@dataclass(frozen=True)
class Moments:
    """Mean and variance (n-1) of each of F features: float32 ``[F]`` both."""

    mean: Tensor
    variance: Tensor


def moments_of(batches: Iterable[Tensor]) -> Moments:
    """Of features ``[n, F]`` that come in batches; at least two rows in all."""
    count, total, squares, shift = 0, 0, 0, None
    for part in batches:
        if shift is None:
            shift = part.mean(0)  # near the mean: squares of differences stay small
        part = part - shift
        count, total = count + len(part), total + part.sum(0, dtype=torch.float64)
        squares = squares + part.square().sum(0, dtype=torch.float64)
    if count < 2:
        raise ValueError(f"moments_of: batches: got {count} rows, need at least 2")
    variance = (squares - total.square() / count) / (count - 1)
    return Moments((shift + total / count).float(), variance.clamp_min(0).float())


def moment_distance(a: Moments, b: Moments) -> float:
    """Root of the mean squared difference of the means plus that of the variances."""
    parts = zip((a.mean, a.variance), (b.mean, b.variance), strict=True)
    return sum((x.double() - y.double()).square().mean().item() for x, y in parts) ** 0.5


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians of the mean and covariance of samples ``[n, D]`` and ``[m, D]``:
    |mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64. FID has it on Inception's
    features; numbers on others do not compare with it."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"frechet_distance: got {len(a)} and {len(b)} samples, need 2 or more")
    a, b = a.double(), b.double()
    ca, cb = (torch.atleast_2d(x.mT.cov()) for x in (a, b))
    root = _root(ca)
    cross = _root(root @ cb @ root).trace()  # has the eigenvalues of (C_a C_b)^(1/2)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return max((gap + ca.trace() + cb.trace() - 2 * cross).item(), 0.0)


def _root(matrix: Tensor) -> Tensor:
    """Of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp_min(0).sqrt() @ vectors.mT


class MomentMatcher:
    """The loss and its two moving averages ``v_mu`` and ``v_var``, float32 ``[F]``, at first 0."""

    def __init__(
        self, real: Moments, lr: float = 1e-5, betas: tuple[float, float] = (0.5, 0.999)
    ) -> None:
        self.real = real
        self.v_mu, self.v_var = (torch.zeros_like(t) for t in (real.mean, real.variance))
        self.optimizer = torch.optim.Adam([self.v_mu, self.v_var], lr=lr, betas=betas)

    def update(self, mean: Tensor, variance: Tensor) -> None:
        """One Adam step of each v on the mean squared error to its difference."""
        pairs = ((self.v_mu, self.real.mean - mean), (self.v_var, self.real.variance - variance))
        for v, difference in pairs:
            v.grad = 2 * (v - difference.detach()) / v.numel()
        self.optimizer.step()

    def inner(self, mean: Tensor, variance: Tensor) -> Tensor:
        """L_G for the v's as they are: its gradients are -v_mu and -v_var."""
        gap = self.v_mu @ (self.real.mean - mean)
        return gap + self.v_var @ (self.real.variance - variance)

    def loss(self, features: Tensor) -> Tensor:
        """L_G of a batch of features ``[N, F]``, N > 1, the v's updated before."""
        mean = features.mean(0)
        variance = (features - mean).square().sum(0) / (len(features) - 1)  # var(0) is slower
        self.update(mean, variance)
        return self.inner(mean, variance)

    def state_dict(self) -> dict[str, Any]:
        return {"v": [self.v_mu, self.v_var], "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for v, saved in zip((self.v_mu, self.v_var), state["v"], strict=True):
            v.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
