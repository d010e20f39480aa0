"""Lottery-ticket theorems made runnable: the subset-sum solver and the constructions on it."""

from .solver import NOT_FOUND, OK, SubsetSum, subset_sum

__all__ = ["NOT_FOUND", "OK", "SubsetSum", "subset_sum"]
