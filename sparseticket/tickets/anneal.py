"""Published schedules of the density of an annealed edge-popup, as closed forms.

- ``power``: density^(e/E) in epochs e = 1..E (PlantNSeek: Fischer and Burkholz, ICLR 2022).
- ``levels``: levels of ``period`` epochs, 0.6 * (density/0.6)^(l/L) in level l = 1..L (sparse_to_
  sparse, Gadhikar et al., ICML 2023; there also clipped to the density of a random mask, which we
  have none of). Whether their first level is at 0.6 or already below cannot be told; ours is below,
  so that the last is at the target.
- ``iterated``: every ``period`` epochs the same fraction of the kept goes, never before the first:
  density^(floor(e/T) / floor((E-1)/T)) in e = 0..E-1 (Gem-Miner's ``global_ep_iter``: Sreenivasan
  et al., NeurIPS 2022).
- ``cubic``: sparsity s + (0.5-s) * (1-e/10)^3 in epochs e < 10, then s, if s > 0.5 (biprop:
  Diffenderfer and Kailkhura, ICLR 2021); over the run less one epoch where it has fewer than 11.
"""

from __future__ import annotations

__all__ = ["SCHEDULES", "density_at"]

SCHEDULES = ("none", "power", "levels", "iterated", "cubic")


def density_at(schedule: str, density: float, epoch: int, epochs: int, period: int = 5) -> float:
    """Density in ``epoch``, counted from 0, of ``epochs``; never below the final ``density``."""
    if schedule == "none" or epochs < 2 or density == 0:
        return density
    if schedule == "power":
        return density ** ((epoch + 1) / epochs)
    if schedule == "levels":
        levels = max(epochs // period, 1)
        level = min(epoch // period + 1, levels)
        start = max(0.6, density)
        return start * (density / start) ** (level / levels) if level < levels else density
    if schedule == "iterated":
        rounds = (epochs - 1) // period
        return density ** (min(epoch // period, rounds) / rounds) if rounds else density
    span, sparsity = min(10, epochs - 1), 1 - density
    if epoch >= span or sparsity <= 0.5:
        return density
    return 1 - (sparsity + (0.5 - sparsity) * (1 - epoch / span) ** 3)
