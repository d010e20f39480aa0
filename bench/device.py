"""``python -m bench.device --out FILE.csv``: every GPU case, cold caches, eager and as CUDA graph.

``ratio`` is the baseline's time over the contender's, of the graph times where there are both.
``share`` is the case's limit (bytes at the copy bandwidth measured here, operations at the rate of
a large product measured here, instructions of the decoder at the card's clock, whichever is
longest) over the time. ``bar``: what "ours" was set to reach. Every op gets its share of the time
that is left. ``--small`` rehearses on a CPU in Triton's interpreter: its times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from bench import gpu_cases
from bench.gpu_cases import GpuCase
from bench.gpu_networks import networks

ROOT = Path(__file__).resolve().parent.parent
GPU_CASES = {**gpu_cases.GPU_CASES, "networks": networks}
_FLUSH_BYTES = 256 << 20  # several times the L2


class Limits(NamedTuple):
    bytes_per_s: float
    flops_per_s: float
    instructions_per_s: float = float("inf")  # of single lanes


class Row(NamedTuple):
    op: str
    case: str
    contender: str
    eager_ms: float
    graph_ms: float
    baseline: str
    ratio: float
    limit_ms: float
    share: float
    bar: str


def limits(device: torch.device) -> Limits:
    """What this card copies and multiplies, measured."""
    if device.type == "cpu":
        return Limits(1e10, 1e11)
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    copy, product = _eager(lambda: target.copy_(source)), _eager(lambda: a @ b)
    card = torch.cuda.get_device_properties(device)
    issued = card.multi_processor_count * 4 * 32 * 1e3 * getattr(card, "clock_rate", 1_980_000)
    return Limits(2 * source.nbytes / copy, 2 * 8192**3 / product, issued)


def _flush() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def _median(call: Callable[[], object], budget: float = 0.15) -> float:
    """Seconds of one call with cold caches, by events."""
    flush, samples = _flush(), []
    deadline = time.perf_counter() + budget
    while len(samples) < 5 or (time.perf_counter() < deadline and len(samples) < 100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def _eager(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return _median(call)


def _graph(call: Callable[[], object]) -> float:
    """NaN where the call cannot be captured: it waits for the device."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return float("nan")
    graph.replay()
    return _median(graph.replay)


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _same(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    if not tolerance:
        return torch.equal(got, expected)
    error = (got.double() - expected.double()).abs().max()
    return bool(error <= tolerance * expected.double().abs().max())


def time_case(op: str, case: GpuCase, limit: Limits, device: torch.device) -> list[Row]:
    if case.expected is not None:
        got, expected = case.contenders["ours"](), case.expected()
        if not _same(got, expected, case.tolerance):
            raise AssertionError(f"{op} {case.name}: ours is not what it should be")
    times = {}
    for name, call in case.contenders.items():
        if device.type == "cpu":
            times[name] = (_wall(call), float("nan"))
        else:
            times[name] = (_eager(call), _graph(call) if case.graph else float("nan"))
    baseline, (eager0, graph0) = next(iter(times.items()))
    floor = max(
        case.bytes_moved / limit.bytes_per_s,
        case.flops / limit.flops_per_s,
        case.instructions / limit.instructions_per_s,
    )
    rows = []
    for name, (eager, graph) in times.items():
        both = graph == graph and graph0 == graph0
        best = min(t for t in (eager, graph) if t == t)
        ratio = graph0 / graph if both else eager0 / eager
        numbers = (round(1e3 * eager, 5), round(1e3 * graph, 5))
        limit_ms, share = round(1e3 * floor, 5), round(floor / best, 3)
        bar = case.bar if name == "ours" else ""
        ratio = round(ratio, 3)
        rows.append(Row(op, case.name, name, *numbers, baseline, ratio, limit_ms, share, bar))
    return rows


def environment(device: torch.device, limit: Limits) -> dict[str, str]:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True)
    return {
        "gpu": "none" if device.type == "cpu" else torch.cuda.get_device_name(),
        "copy_gb_per_s": str(round(limit.bytes_per_s / 1e9)),
        "tflops": str(round(limit.flops_per_s / 1e12)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CSV file, overwritten")
    parser.add_argument("--op", action="append", choices=GPU_CASES, help="default: all")
    parser.add_argument("--seconds", type=float, default=240, help="for all cases together")
    parser.add_argument("--small", action="store_true", help="rehearse on the CPU")
    args = parser.parse_args(arguments)
    device = torch.device("cpu" if args.small else "cuda")
    deadline = time.perf_counter() + args.seconds
    limit = limits(device)
    env = environment(device, limit)
    print(" ".join(f"{k}={v}" for k, v in env.items()), flush=True)
    failed = 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*Row._fields, *env])
        writer.writeheader()
        asked = args.op or list(GPU_CASES)
        for place, op in enumerate(asked):
            left = deadline - time.perf_counter()
            if left < 0:
                print(f"{op}: left out, no time")
                continue
            until = time.perf_counter() + left / (len(asked) - place)
            try:
                for case in GPU_CASES[op](device, args.small):
                    for row in time_case(op, case, limit, device):
                        writer.writerow({**row._asdict(), **env})
                        print(*row, sep="  ", flush=True)
                    file.flush()
                    if time.perf_counter() > until:
                        print(f"{op}: its other cases are left out, no time")
                        break
            except (AssertionError, RuntimeError, ValueError) as error:  # the others still count
                failed += 1
                print(f"{op}: FAILED: {error}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
