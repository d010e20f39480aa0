"""Weights in powers of a base below 1: Orseau, Hutter, Rivasplata, "Logarithmic pruning is all you
need", NeurIPS 2020 (arXiv 2006.12156).

A weight is approximated from above by one random weight of each of K bins [gamma^(i+1), gamma^i],
greedily: take it if it still fits. For gamma at least the inverse golden ratio the remainder is at
most gamma^(K-1) whatever the weights are (gamma^2 + gamma >= 1 is needed and enough), so that
O(log(1/eps)) weights do. Those of a hyperbolic law fall into every bin alike, and weights that
share an input share its pool: what one releases serves the next ("batch sampling").

Deviations: the paper's constants are not known here; the size of a pool, 2 K (m + ln(K/delta)) for
m weights, is proved in :func:`pool_size`; the hyperbolic law is that of the first factor, the
second is +1 or -1 by chance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparseticket.masks import PackedMask, regenerate
from sparseticket.prng import check_seed

from .pairs import drawn
from .ticket import Construction, check_target, linear_with

__all__ = ["GOLDEN", "golden_bins", "golden_greedy", "log_ticket", "pool_size"]

GOLDEN = (math.sqrt(5) - 1) / 2
_BOUND = "a weight is off by at most gamma^(K-1) of the largest, with probability >= 1 - delta"


def golden_bins(eps: float, gamma: float) -> int:
    """K with gamma^(K-1) <= ``eps``."""
    return 1 + max(math.ceil(math.log(1 / eps) / math.log(1 / gamma)), 0)


def pool_size(bins: int, weights: int, delta: float) -> int:
    """Draws from which ``weights``, one after the other, each find in every one of ``bins`` bins an
    unused neuron of the right sign, with probability at least 1 - ``delta``.

    Bins are hit alike, signs are fair coins of their own for every weight. At most m - 1 neurons of
    a bin of N are used, so that none is right with probability E 2^(m-1-N) <= 2^(m-1) e^(-M/2K);
    with M = 2 K (m + ln(K/delta)) the sum over m weights and K bins is below delta.
    """
    return math.ceil(2 * bins * (weights + math.log(bins / delta)))


def golden_greedy(products: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ``products`` [..., K], one per bin from the largest on, are taken, and what remains
    of ``target`` [...] >= 0."""
    rest, taken = target.clone(), torch.zeros(products.shape, dtype=torch.bool)
    for i in range(products.shape[-1]):
        taken[..., i] = products[..., i] <= rest
        rest = rest - products[..., i] * taken[..., i]
    return taken, rest


@torch.no_grad()
def log_ticket(
    target: nn.Sequential,
    eps: float,
    *,
    delta: float = 0.1,
    gamma: float = 2 / 3,
    draws: int | None = None,
    seed: int = 0,
) -> Construction:
    """``target``, Linear and ReLU in turn and without biases, in a source of twice its depth.

    For each input and each sign of it the source has a pool of neurons, :func:`pool_size` of them
    or ``draws``. Weights of a layer are measured by its largest one. ``eps``: of a weight. A bin
    without a neuron left is skipped; a weight that this puts off by more than ``eps`` has failed.
    """
    layers = check_target("log_ticket", target)
    check_seed(seed)
    if not GOLDEN <= gamma < 1:
        raise ValueError(f"gamma: got {gamma}, need at least {GOLDEN:.4f} and below 1")
    if not (eps > 0 and 0 < delta < 1):
        raise ValueError(f"eps, delta: got {eps}, {delta}, need eps > 0 and delta in (0, 1)")
    pools = 2 * sum(m.in_features for m in layers)
    modules, masks, errors = [], {}, []
    for i, layer in enumerate(layers):
        scale = float(layer.weight.abs().max()) or 1.0
        bins = golden_bins(min(eps / scale, 1.0), gamma)
        size = draws or pool_size(bins, layer.out_features, delta / pools)
        first, second = _pools(layer.weight, scale, bins, gamma, size, f"log.{i}", seed)
        chosen, error = _take(layer.weight, first, second, scale, bins, gamma)
        weight = layer.weight.new_zeros(layer.in_features, 2 * size, layer.in_features)
        own = torch.arange(layer.in_features)
        weight[own, :, own] = first.flatten(1)
        weight = weight.flatten(0, 1)
        chosen = chosen.flatten(1)
        used = chosen.any(0)[:, None] & (weight != 0)
        for k, mask in ((0, used), (2, chosen)):
            masks[f"{len(modules) + k}.weight"] = PackedMask.from_dense(mask)
        modules += [linear_with(weight), nn.ReLU(), linear_with(second.flatten(1)), nn.ReLU()]
        errors.append(error)
    source = nn.Sequential(*modules[:-1])
    return Construction.of(source, masks, layers, torch.cat(errors), eps, _BOUND)


def _pools(weight, scale, bins, gamma, size, name, seed) -> tuple[Tensor, Tensor]:
    """First factors [d, 2, size], hyperbolic on scale * [gamma^K, 1], one half of each sign; second
    ones [m, d, 2, size], +1 or -1."""
    rows, columns = weight.shape
    exponent = drawn(seed, f"{name}.v", (columns, 2, size), 1.0, weight).abs() * bins
    first = scale * gamma**exponent * torch.tensor([1.0, -1.0], dtype=weight.dtype)[:, None]
    second = regenerate(seed, f"{name}.u", (rows, columns, 2, size), sigma=1.0)
    return first, second.to(weight.dtype)


def _take(weight, first, second, scale, bins, gamma) -> tuple[Tensor, Tensor]:
    """The greedy choice, output after output, for all inputs and signs together."""
    place = (first.abs() / scale).log().div(math.log(gamma)).floor().clamp(0, bins - 1)
    free = torch.ones(first.shape, dtype=torch.bool)
    chosen = torch.zeros(second.shape, dtype=torch.bool)
    rest = weight.abs()[..., None].expand(-1, -1, 2).clone()  # [m, d, 2]
    magnitude = first.abs()
    for j in range(len(weight)):
        right = second[j] * first.sign() == weight[j].sign()[:, None, None]
        for b in range(bins):
            fits = free & right & (place == b)
            at = fits.to(torch.uint8).argmax(-1, keepdim=True)
            value = magnitude.gather(-1, at)
            take = fits.any(-1, keepdim=True) & (value <= rest[j][..., None])
            rest[j] -= (value * take).squeeze(-1)
            hit = torch.zeros_like(free).scatter(-1, at, take)
            chosen[j] |= hit
            free &= ~hit
    return chosen, rest.double().flatten()
