"""Every shipped Triton configuration compiles for GPUs that are not here, within its budget."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import tritons

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: it is not installed", allow_module_level=True)

import triton

from bench import cross

SIMPLE = cross.variants()["regenerate"][0]  # without tensor cores
# All of sm_90 with either Triton; elsewhere one configuration a kernel (make cross: all of them).
ARGUMENTS = {"installed": ["--brief"], "3.6": ["--target", "sm_90"]}


@pytest.fixture(scope="module")
def runs(request):
    chosen = [i.callspec.params for i in request.session.items if hasattr(i, "callspec")]
    jobs = [(p["compiler"],) for p in chosen if "compiler" in p]
    with tritons.started(jobs, lambda v: tritons.run(v, "-m", "bench.cross", *ARGUMENTS[v])) as f:
        yield f


@pytest.mark.parametrize("compiler", tritons.VERSIONS)
def test_budgets(compiler, require, runs):
    tritons.check_there(compiler, require)
    run = runs[(compiler,)].result()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    lines = [line for line in run.stdout.splitlines() if " sm_90 " in line]
    assert len(lines) == len(cross.shipped("sm_90"))
    assert f"Triton {compiler.replace('installed', triton.__version__)}" in run.stdout


def test_brief_is_all_of_sm_90_and_every_kernel_elsewhere():
    chosen = list(cross._chosen([], list(cross.TARGETS), brief=True))
    kernels = {v.kernel.__name__ for listed in cross.variants().values() for v in listed}
    for target in cross.TARGETS:
        named = [v for v in cross.shipped(target) if (v.name, target) in chosen]
        assert {v.kernel.__name__ for v in named} == kernels
        assert target != "sm_90" or named == cross.shipped(target)


def test_names_are_unique():
    names = [v.name for listed in cross.variants().values() for v in listed]
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
