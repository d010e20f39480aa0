from __future__ import annotations

from collections.abc import Iterator

import oracle
import pytest
import torch

from sparseticket import _C


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Op tests are thousands of tiny calls; ``threads`` and tests of threads say otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["fused", "materialised"])
def path(request, monkeypatch) -> str:
    """Dispatch tables that send everything they can one way; ``live``: of masked_linear only."""
    fused = request.param == "fused"
    linear, conv = oracle.module_of("masked_linear"), oracle.module_of("masked_conv2d")
    ticket = oracle.module_of("ticket_linear")
    for module, table in ((linear, "FUSED_ROWS"), (ticket, "LOOKUP_ROWS")):
        rows = dict.fromkeys(getattr(module, table), 10**6 if fused else -1)
        monkeypatch.setattr(module, table, rows)
    monkeypatch.setattr(ticket, "LOOKUP_OUTPUTS", 0)
    monkeypatch.setattr(ticket, "LARGE_OUTPUTS", 10**6)
    density = 1.0 if request.param == "live" else -1.0
    monkeypatch.setattr(linear, "LIVE_DENSITY", dict.fromkeys(linear.LIVE_DENSITY, (density,) * 2))
    monkeypatch.setattr(linear, "LIVE_ROWS", dict.fromkeys(linear.LIVE_ROWS, 0))
    monkeypatch.setattr(linear, "WIDE_ROWS", {})
    monkeypatch.setattr(linear, "FEW_ROWS", 0)
    for name in ("FUSED_DENSITY", "FEW_DENSITY"):
        monkeypatch.setattr(conv, name, 1.0 if fused else -1.0)
    sparse = oracle.module_of("sparse_linear_dw")
    most = dict.fromkeys(sparse.SPARSE_DENSITY, 1.0 if fused else -1.0)
    monkeypatch.setattr(sparse, "SPARSE_DENSITY", most)
    return request.param


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the fused kernels called so far."""
    made: list[str] = []

    def spy(name, kernel):
        monkeypatch.setattr(_C, name, lambda *args: (made.append(name), kernel(*args)))

    kernels = ("masked_linear", "masked_linear_live", "ticket_linear", "lookup_linear")
    others = ("ticket_codes", "sparse_linear", "sparse_linear_dw")
    for name in (*kernels, *others, "masked_conv2d", "ticket_conv2d"):
        spy(name, getattr(_C, name))
    return made
