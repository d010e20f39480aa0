"""``python -m bench.run``: time every op beside dense torch and others, append rows, print them.

An op is timed only if its own tests pass in this tree (``--no-gate``, for profiling, skips them
and writes no rows). ``speedup``: the baseline's median over the contender's in the same interleaved
run; above 1 wins.
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

import sparseticket
from bench.cases import CASES, SWEEPS, Case, Sweep
from bench.memory import memory_rows
from bench.timing import copy_bandwidth, interleaved
from sparseticket import _C

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


def time_case(op: str, case: Case, threads: int, budget: float, peak: float) -> list[Row]:
    timed = interleaved(case.make(), threads, budget)
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
    """Add rows to a CSV file, header first if it is new."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    dicts = [{**asdict(row), **env} for row in rows]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(dicts[0]))
        if new:
            writer.writeheader()
        writer.writerows(dicts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="*", choices=sorted(CASES), help="default: all")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case and thread count")
    parser.add_argument("--no-gate", action="store_true", help="skip the tests, write no rows")
    parser.add_argument("--no-sweeps", action="store_true", help="skip the crossover sweeps")
    args = parser.parse_args(argv)
    env = environment()
    print(" ".join(f"{k}={v}" for k, v in env.items()))
    crossovers, red = [], []
    for op in args.ops or CASES:
        if not args.no_gate and not tests_pass(op):
            print(f"{op}: its tests do not pass here; not timed")
            red.append(op)
            continue
        rows = []
        for threads in sorted(set(args.threads)):
            torch.set_num_threads(threads)
            peak = copy_bandwidth(threads)
            for case in CASES[op]:
                fresh = time_case(op, case, threads, args.budget, peak)
                rows += fresh
                for row in fresh:
                    print(
                        f"{row.op:14} {row.case:42} {row.contender:18} {threads}t "
                        f"{row.p50_ms:10.3f} ms {row.speedup:8.2f}x",
                        flush=True,
                    )
        if not args.no_gate:  # op by op, or a failure later would cost them all
            append(RESULTS / "cpu.csv", rows, env)
    if not args.no_sweeps and not args.ops and not red:
        torch.set_num_threads(1)
        for sweep in SWEEPS:
            crossovers.append(time_sweep(sweep, 1, args.budget / 10))
            print(f"crossover {sweep.name:44} {crossovers[-1].density} ({crossovers[-1].speedups})")
    memory = [] if args.ops or red else memory_rows()
    for row in memory:
        print(f"memory {row.model:10} {row.form:18} {row.weight_bytes:12} B  fp32/{row.fp32_over}")
    if not args.no_gate:
        append(RESULTS / "cpu-crossover.csv", crossovers, env)
        append(RESULTS / "memory.csv", memory, env)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
