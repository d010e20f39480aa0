"""``python -m bench.run``: time every op beside dense torch and others, append rows, print them.

An op is timed only if its own tests pass in this tree (``--no-gate``, for profiling, skips them
and writes no rows). ``speedup``: the baseline's median over the contender's in the same interleaved
run; above 1 wins. ``SPARSETICKET_ISA`` chooses the level. At the end every bar that the run touched
is held against its rows (see bench/report.py).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparseticket
from bench import report
from bench.cases import CASES, SWEEPS, Case, Sweep
from bench.memory import memory_rows
from bench.timing import copy_bandwidth, interleaved
from sparseticket import _C
from sparseticket.ops import explain_op

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    op: str
    case: str
    contender: str
    threads: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    baseline: str
    speedup: float
    bytes_moved: int
    gb_per_s: float
    share_of_copy: float
    clean: int
    kernel: str


@dataclass(frozen=True)
class Crossover:
    case: str
    threads: int
    density: float | None  # the highest swept density at which ours is not slower than dense
    speedups: str


def environment() -> dict[str, str]:
    """What a row must say about where it was measured."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    changed = [line for line in dirty.stdout.splitlines() if "bench/results" not in line]
    return {
        "machine": _cpu_model(),
        "cores": str(os.cpu_count()),
        "isa": _C.isa(),
        "sparseticket": sparseticket.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() + ("+changes" if changed else ""),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in info.read_text().splitlines()
            if ":" in line
        )
        name = fields.get("model name", platform.processor())
        return f"{name} family {fields.get('cpu family')} model {fields.get('model')}"
    return platform.processor() or platform.machine()


def tests_pass(op: str) -> bool:
    test = ROOT / "tests" / "ops" / f"test_{op}.py"
    run = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", str(test)]
    strict = {**os.environ, "SPARSETICKET_REQUIRE": "cpu"}  # a skip is no proof
    if not test.exists():
        return False
    return subprocess.run(run, cwd=ROOT, capture_output=True, env=strict).returncode == 0


class _Explain(TorchDispatchMode):
    """Asks ``explain`` about every op of ours that is called."""

    def __init__(self):
        super().__init__()
        self.kernels: dict[str, None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparseticket":
            choice = explain_op(func._schema.name.split("::")[1], *args, **(kwargs or {}))
            self.kernels[f"{choice.op}: {choice.kernel}"] = None
        return func(*args, **(kwargs or {}))


def kernels_of(call) -> str:
    """What ``explain`` says of the ops in ``call``: each once, in the order of their calls."""
    with _Explain() as seen:
        call()
    return "; ".join(seen.kernels)


def time_case(op: str, case: Case, threads: int, budget: float, peak: float) -> list[Row]:
    contenders = case.make()
    kernels = {name: kernels_of(call) for name, call in contenders.items() if "ours" in name}
    timed = interleaved(contenders, threads, budget)
    baseline = next(iter(timed))
    rows = []
    for name, q in timed.items():
        rate = case.bytes_moved / q.p50 if name == "ours" else float("nan")
        rows.append(
            Row(
                op,
                case.name,
                name,
                threads,
                *(round(1e3 * t, 4) for t in (q.p20, q.p50, q.p80)),
                baseline,
                round(timed[baseline].p50 / q.p50, 3),
                case.bytes_moved,
                round(rate / 1e9, 2),
                round(rate / peak, 3),
                q.clean,
                kernels.get(name, ""),
            )
        )
    return rows


def time_sweep(sweep: Sweep, threads: int, budget: float) -> Crossover:
    speedups = {}
    for density in sweep.densities:
        contenders = sweep.make(density)
        timed = interleaved({k: contenders[k] for k in ("dense", "ours")}, threads, budget)
        speedups[density] = timed["dense"].p50 / timed["ours"].p50
    wins = [d for d, s in speedups.items() if s >= 1]
    listed = " ".join(f"{d}:{s:.2f}" for d, s in speedups.items())
    return Crossover(sweep.name, threads, max(wins, default=None), listed)


def append(path: Path, rows: list, env: dict[str, str]) -> None:
    """Add rows to a CSV file; columns that its rows lack stay empty there."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    old, new = report.read(path), [{**asdict(row), **env} for row in rows]
    columns = list(dict.fromkeys([*(old[0] if old else ()), *new[0]]))
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(old + new)
    fresh.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="*", choices=sorted(CASES), help="default: all")
    parser.add_argument("--cases", default="", help="only cases with this in their name")
    parser.add_argument("--barred", action="store_true", help="only cases that a bar stands for")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case and thread count")
    parser.add_argument("--no-gate", action="store_true", help="skip the tests, write no rows")
    parser.add_argument("--no-sweeps", action="store_true", help="skip the crossover sweeps")
    args = parser.parse_args(argv)
    env = environment()
    print(" ".join(f"{k}={v}" for k, v in env.items()))
    part = args.ops or args.cases or args.barred
    crossovers, red, timed = [], [], []
    for op in args.ops or CASES:
        cases = [
            c
            for c in CASES[op]
            if args.cases in c.name and (not args.barred or report.barred(op, c.name))
        ]
        if not cases:
            continue
        if not args.no_gate and not tests_pass(op):
            print(f"{op}: its tests do not pass here; not timed")
            red.append(op)
            continue
        rows = []
        for threads in sorted(set(args.threads)):
            torch.set_num_threads(threads)
            peak = copy_bandwidth(threads)
            for case in cases:
                fresh = time_case(op, case, threads, args.budget, peak)
                rows += fresh
                for row in fresh:
                    print(
                        f"{row.op:14} {row.case:42} {row.contender:18} {threads}t "
                        f"{row.p50_ms:10.3f} ms {row.speedup:8.2f}x"
                        f"{'' if row.clean else '  disturbed'}  {row.kernel}",
                        flush=True,
                    )
        timed += rows
        if not args.no_gate:  # op by op, or a failure later would cost them all
            append(RESULTS / "cpu.csv", rows, env)
    if not args.no_sweeps and not part and not red:
        torch.set_num_threads(1)
        for sweep in SWEEPS:
            crossovers.append(time_sweep(sweep, 1, args.budget / 10))
            print(f"crossover {sweep.name:44} {crossovers[-1].density} ({crossovers[-1].speedups})")
    memory = [] if part or red else memory_rows()
    for row in memory:
        print(f"memory {row.model:10} {row.form:18} {row.weight_bytes:12} B  fp32/{row.fp32_over}")
    if not args.no_gate:
        append(RESULTS / "cpu-crossover.csv", crossovers, env)
        append(RESULTS / "memory.csv", memory, env)
    stored = report.read(RESULTS / "cpu.csv")
    times = report.newest([*stored, *({**asdict(row), **env} for row in timed)])
    print("\n".join(report.judge(times, {(row.op, row.case) for row in timed})))
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
