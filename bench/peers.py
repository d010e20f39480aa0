"""Other people's kernels and solvers as contenders, where they are installed; else the rows lack
them.

SparseProp (arXiv 2302.04852): ``pip install --no-build-isolation sparseprop`` beside wheel,
setuptools and pybind11. Solvers of one subset sum at a time: ``pip install 'sparseticket[bench]'``
(SciPy's HiGHS, OR-Tools' CP-SAT).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

__all__ = ["sparseprop_linear", "subset_sum_solvers"]


def sparseprop_linear(weight: torch.Tensor) -> dict[str, torch.nn.Module]:
    """A layer of SparseProp with the live values of ``weight``; it runs on torch's number of
    threads, as it shares its OpenMP."""
    if importlib.util.find_spec("sparseprop") is None:
        return {}
    from sparseprop.modules import SparseLinear

    return {"SparseProp": SparseLinear(weight)}


def subset_sum_solvers() -> dict[str, Callable]:
    """``solve(a [n], target [1], eps, objective)``: the chosen elements, by name of the solver."""
    known = {"scipy": ("HiGHS", _highs), "ortools": ("CP-SAT", _cp_sat)}
    return dict(v for package, v in known.items() if importlib.util.find_spec(package) is not None)


def _highs(a, target, eps, objective):
    """A mixed-integer programme of chosen elements and the error z: least z, or fewest elements
    with z at most eps."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    a, t = a.double().numpy(), float(target)
    n, least = len(a), objective == "min_error"
    cost = np.append(np.full(n, 0.0 if least else 1.0), 1.0 if least else 0.0)
    sides = np.vstack([np.append(a, -1), np.append(-a, -1)])
    solved = milp(
        cost,
        constraints=LinearConstraint(sides, ub=[t, -t]),
        integrality=np.append(np.ones(n), 0),
        bounds=Bounds(0, np.append(np.ones(n), np.inf if least else eps)),
        options={"mip_rel_gap": 0.01},
    )
    return None if solved.x is None else solved.x[:n] > 0.5


def _cp_sat(a, target, eps, objective, scale=10**7):
    from ortools.sat.python import cp_model

    weights, t = (a.double() * scale).round().long().tolist(), round(float(target) * scale)
    model = cp_model.CpModel()
    chosen = [model.new_bool_var("") for _ in weights]
    error = model.new_int_var(0, 2**40 if objective == "min_error" else int(eps * scale), "")
    off = sum(w * x for w, x in zip(weights, chosen, strict=True)) - t
    model.add(off <= error)
    model.add(-off <= error)
    model.minimize(error if objective == "min_error" else sum(chosen))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    found = solver.solve(model) in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return [bool(solver.value(x)) for x in chosen] if found else None
