"""Other people's sparse kernels as contenders, where they are installed; else the rows lack them.

SparseProp (arXiv 2302.04852): ``pip install --no-build-isolation sparseprop`` beside wheel,
setuptools and pybind11.
"""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["sparseprop_linear"]


def sparseprop_linear(weight: torch.Tensor) -> dict[str, torch.nn.Module]:
    """A layer of SparseProp with the live values of ``weight``; it runs on torch's number of
    threads, as it shares its OpenMP."""
    if importlib.util.find_spec("sparseprop") is None:
        return {}
    from sparseprop.modules import SparseLinear

    return {"SparseProp": SparseLinear(weight)}
