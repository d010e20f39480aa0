"""Every shipped Triton configuration compiles for GPUs that are not here, within its budget."""

from __future__ import annotations

import functools
import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: it is not installed", allow_module_level=True)

from bench import cross

VARIANTS = [v for listed in cross.variants().values() for v in listed]
SIMPLE = cross.variants()["regenerate"][0]  # without tensor cores
OTHERS = [t for t in cross.TARGETS if t != "sm_90"]


def _check(variant, target):
    report = cross.check(variant, target)
    assert not report.failures, str(report)


@pytest.mark.parametrize("variant", cross.shipped("sm_90"), ids=lambda v: v.name)
def test_budgets_on_hopper(variant):
    _check(variant, "sm_90")


@pytest.mark.parametrize(
    ("target", "variant"),
    [(target, v) for target in OTHERS for v in cross.first_of_each_kernel(target)],
    ids=lambda value: getattr(value, "name", value),
)
def test_compiles_elsewhere(target, variant):
    _check(variant, target)


def test_names_are_unique():
    names = [v.name for v in VARIANTS]
    assert len(set(names)) == len(names)


LOOP = [(0x0, "MOV"), (0x10, "IADD3"), *((0x20 + 16 * i, "FFMA") for i in range(20))]


def _code(*more):
    return [cross.Instruction(a, "", name, " R0") for a, name in LOOP] + [
        cross.Instruction(*m) for m in more
    ]


def test_main_loop():
    straight = _code((0x200, "", "EXIT", ""))
    assert cross.main_loop(straight) == straight
    back, wait = (0x200, "@P0", "BRA", " 0x20"), (0x220, "", "BRA", " 0x220")
    looped = cross.main_loop(_code(back, (0x210, "", "EXIT", ""), wait))
    assert (looped[0].address, looped[-1].address) == (0x20, 0x200)
    out_of_line = _code((0x200, "", "EXIT", ""), (0x210, "", "BRA", " 0x0"))
    assert cross.main_loop(out_of_line) == out_of_line


def test_budgets_are_held(monkeypatch):
    variant = SIMPLE
    monkeypatch.setattr(cross, "SHARED", dict.fromkeys(cross.SHARED, -1))
    broken = cross.check(variant._replace(ceiling=0.01, wgmma=True), "sm_90")
    assert len(broken.failures) == 3 and "FAILED" in str(broken)
    with pytest.raises(ValueError, match="arguments without a type: "):
        cross.compile_variant(variant._replace(types={}), "sm_90")


@functools.cache
def _report():
    return cross.check(SIMPLE, "sm_90")


def test_reads_machine_code():
    code = cross.sass(cross.compile_variant(SIMPLE, "sm_90").asm["cubin"])
    names = {i.name.split(".")[0] for i in code}
    assert {"EXIT", "STG"} <= names and "NOP" not in names
    assert _report().instructions > 0 and not _report().spills
