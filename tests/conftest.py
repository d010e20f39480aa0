"""Fixtures of the whole suite: poisoned memory, ISA levels, thread counts, data, required skips."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from sparseticket import _C

_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _require(name: str, reason: str) -> NoReturn:
    """Skip, or fail where SPARSETICKET_REQUIRE names ``name``."""
    pytest.skip(f"needs {name}: {reason}")


@pytest.fixture
def require() -> Callable[[str, str], NoReturn]:
    return _require


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised tensors hold NaN or the largest integer, through torch's deterministic mode."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture(params=_C.isas())
def isa(request) -> Iterator[str]:
    """Each instruction set that this machine has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def data_dir() -> Path:
    """The folder with mnist/, cifar10/, ...: SPARSETICKET_DATA, or ../shared/data."""
    given = os.environ.get("SPARSETICKET_DATA")
    folder = Path(given) if given else _DATA
    if not folder.is_dir():
        _require("data", f"{folder} does not exist; set SPARSETICKET_DATA")
    return folder


# What a skip lacked is in its reason; one that does not say counts as "cpu".
def _lacked(longrepr: object) -> str:
    reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    found = re.search(r"needs (\w+): ", str(reason))
    return found[1] if found else "cpu"


def _fail_if_required(report) -> None:
    required = os.environ.get("SPARSETICKET_REQUIRE", "").replace(" ", "").split(",")
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    lacked = _lacked(report.longrepr)
    if lacked in required:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"SPARSETICKET_REQUIRE has {lacked!r}, and this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    _fail_if_required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    _fail_if_required(report)
    return report
