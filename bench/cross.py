"""Machine code of every shipped kernel configuration, without a GPU: sizes, budgets, instructions.

``python -m bench.cross`` compiles all of ``kernels.*.VARIANTS`` for every target and prints one
line each; it fails where a budget is broken. ``--brief`` takes all for sm_90, the target with
budgets, and one configuration of each kernel for the others. Works with every supported Triton.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import sparseticket.kernels
from sparseticket.kernels.variants import Variant

MAIN = "sm_90"  # whose instructions are counted against the ceilings
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
_SMALL_LOOP = 16  # instructions: loops that wait for a barrier


class Instruction(NamedTuple):
    address: int
    guard: str
    name: str  # with its suffixes
    operands: str


class Report(NamedTuple):
    """What one variant became on one target; counts of instructions are of NVIDIA code only."""

    variant: str
    target: str
    shared: int
    spills: int
    instructions: int  # of the main loop, or of the whole kernel
    per_element: float
    tensor: str  # which tensor-core instruction, if any
    failures: list[str]

    def __str__(self) -> str:
        line = (
            f"{self.variant:44} {self.target:7} {self.instructions:6} instr "
            f"{self.per_element:6.2f} each {self.shared:7} B {self.tensor}"
        )
        return line.rstrip() + "".join(f"\n  FAILED: {f}" for f in self.failures)


def variants() -> dict[str, list[Variant]]:
    """Every kernel file's configurations; a kernel's first one stands for it."""
    found = {}
    for module in pkgutil.iter_modules(sparseticket.kernels.__path__):
        name = f"sparseticket.kernels.{module.name}"
        declared = getattr(importlib.import_module(name), "VARIANTS", ())
        if declared:
            found[module.name] = list(declared)
    return found


def shipped(target: str) -> list[Variant]:
    """Every variant that ships for ``target``."""
    every = [v for listed in variants().values() for v in listed]
    return [v for v in every if not v.targets or target in v.targets]


def first_of_each_kernel(target: str) -> list[Variant]:
    """One variant per jitted kernel: enough for the targets that are not the main one."""
    return list({v.kernel.__name__: v for v in reversed(shipped(target))}.values())


def compile_variant(variant: Variant, target: str):
    """The compiled kernel (``.asm``, ``.metadata``) of ``variant`` for a name in TARGETS."""
    fn = variant.kernel
    signature = {n: variant.types.get(n, "constexpr") for n in fn.arg_names}
    missing = {n for n, t in signature.items() if t == "constexpr"} - set(variant.constants)
    if missing:
        raise ValueError(f"{variant.name}: arguments without a type: {', '.join(sorted(missing))}")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(fn.arg_names)
        if n in variant.aligned or (signature[n][0] == "*" and n not in variant.unaligned)
    }
    source = ASTSource(fn, signature, variant.constants, attrs)
    options = {
        "num_warps": variant.warps,
        "num_stages": variant.stages,
        "enable_fp_fusion": False,
    }
    return triton.compile(source, target=TARGETS[target], options=options)


def check(variant: Variant, target: str) -> Report:
    """Compile and hold against the budgets."""
    compiled = compile_variant(variant, target)
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        counts = re.findall(r"_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        spills, code = sum(map(int, counts)), []
    else:
        code = sass(compiled.asm["cubin"])
        spills = sum(i.name.startswith(("STL", "LDL")) for i in code)
    hot = main_loop(code)
    each = len(hot) * 32 * variant.warps / variant.elements if variant.elements else 0.0
    tensor = sorted({i.name.split(".")[0] for i in code if "MMA" in i.name.split(".")[0]})
    failures = []
    if spills:
        failures.append(f"{spills} spills")
    if shared > SHARED[target]:
        failures.append(f"{shared} bytes of shared memory, {target} has {SHARED[target]}")
    if target == MAIN and each > variant.ceiling:
        failures.append(f"{each:.2f} instructions per {variant.unit}, at most {variant.ceiling}")
    if target == MAIN and variant.wgmma and "HGMMA" not in tensor:
        failures.append("no wgmma")
    return Report(variant.name, target, shared, spills, len(hot), each, " ".join(tensor), failures)


def sass(cubin: bytes) -> list[Instruction]:
    """The disassembled kernel, without padding."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [tool, "--dump-sass", file.name], capture_output=True, text=True, check=True
        )
    line = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
    found = (line.match(text) for text in run.stdout.splitlines())
    every = [Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], m[4]) for m in found if m]
    return [i for i in every if i.name != "NOP"]


def _loops(code: list[Instruction]) -> Iterator[tuple[int, int]]:
    """(first, last) addresses of loops: conditional jumps back. Code moved out of line returns
    without a condition."""
    for i in code:
        target = re.search(r"0x([0-9a-f]+)", i.operands) if i.name.startswith("BRA") else None
        conditional = i.guard or re.search(r"\bU?P\d", i.operands)
        if target and conditional and int(target[1], 16) < i.address:
            yield int(target[1], 16), i.address


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The longest loop that holds no other but small ones; without loops, everything."""
    bodies = [[i for i in code if a <= i.address <= b] for a, b in _loops(code)]
    bodies = [b for b in bodies if len(b) > _SMALL_LOOP]

    def holds(outer, inner):
        return outer is not inner and outer[0] <= inner[0] and outer[-1] >= inner[-1]

    inner = [b for b in bodies if not any(holds(b, other) for other in bodies)]
    return max(inner, key=len, default=code)


def _chosen(kernels: list[str], targets: list[str], brief: bool) -> Iterator[tuple[str, str]]:
    """(variant's name, target) of what is asked for."""
    files = {v.name: file for file, listed in variants().items() for v in listed}
    for target in targets:
        listed = first_of_each_kernel(target) if brief and target != MAIN else shipped(target)
        yield from ((v.name, target) for v in listed if not kernels or files[v.name] in kernels)


def _check_named(name: str, target: str) -> Report:
    return check(next(v for v in shipped(target) if v.name == name), target)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cross", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--kernel", action="append", help="file in kernels/; default: all")
    parser.add_argument("--brief", action="store_true", help=f"all of them for {MAIN} only")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(args)
    names, targets = zip(
        *_chosen(options.kernel or [], options.target or list(TARGETS), options.brief), strict=True
    )
    failed = 0
    print(f"Triton {triton.__version__}, {len(names)} configurations", flush=True)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.jobs, mp_context=fork) as pool:
        for report in pool.map(_check_named, names, targets):
            print(report, flush=True)
            failed += bool(report.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
