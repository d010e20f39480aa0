"""``python -m bench.report``: every bar beside what the newest rows say, met or missed, and why.

``bars.csv``: one bar a line, for ops and, as op ``network``, for the rows of bench/networks.py.
``bar``: at least so many times faster than the fastest contender that ``over`` names (a pattern),
or than itself with ``1 thread``, or than its own ``avx512`` row.
``notes.csv``: what the profile and the variants tried say of a missed one. Cases are patterns of
fnmatch. Medians; one thread and AVX-512 unless the bar says otherwise.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

__all__ = ["barred", "judge", "network_case", "newest", "of_networks", "read"]

HERE = Path(__file__).resolve().parent


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


BARS, NOTES = read(HERE / "bars.csv"), read(HERE / "notes.csv")
Times = dict[tuple[str, str, str, int, str], float]  # op, case, contender, threads, isa: ms


def newest(rows: Iterable[dict]) -> Times:
    """The last median of every contender."""
    return {
        (r["op"], r["case"], r["contender"], int(r["threads"]), r["isa"]): float(r["p50_ms"])
        for r in rows
    }


def network_case(model: str, batch: int | str, density: float | str) -> str:
    """The case of a network's rows."""
    return f"{model} batch {batch} keep {density}"


def of_networks(rows: Iterable[dict]) -> Iterable[dict]:
    """Rows of networks.csv as the op ``network``."""
    for r in rows:
        yield {**r, "op": "network", "case": network_case(r["model"], r["batch"], r["density"])}


def barred(op: str, case: str) -> bool:
    return any(b["op"] == op and fnmatchcase(case, b["case"]) for b in BARS)


def judge(times: Times, only: set[tuple[str, str]] | None = None) -> list[str]:
    """One line a bar and case that has rows; ``only``: (op, case) pairs, else all."""
    lines = []
    for bar in BARS:
        threads, isa = int(bar["threads"] or 1), bar["isa"] or "avx512"
        for (op, case, contender, *level), ms in times.items():
            if (op, contender, level) != (bar["op"], bar["contender"] or "ours", [threads, isa]):
                continue
            if not fnmatchcase(case, bar["case"]) or (only is not None and (op, case) not in only):
                continue
            against = _against(bar["over"] or "dense", times, op, case, contender, threads, isa)
            if against is not None:
                lines.append(_line(bar, case, threads, isa, against / ms))
    return lines


def _against(over, times, op, case, contender, threads, isa) -> float | None:
    if over == "1 thread":
        return times.get((op, case, contender, 1, isa))
    if over == "avx512":
        return times.get((op, case, contender, threads, over))
    same = [
        ms
        for (o, c, name, *level), ms in times.items()
        if (o, c, level) == (op, case, [threads, isa]) and fnmatchcase(name, over)
    ]
    return min(same, default=None)


def _line(bar, case, threads, isa, ratio) -> str:
    wanted, over = float(bar["bar"]), bar["over"] or "dense"
    met = ratio >= wanted
    line = (
        f"{'met' if met else 'MISSED':6} {bar['op']:14} {case:42} {bar['contender'] or 'ours'} "
        f"{threads}t {isa}: {ratio:.2f}x {over}, bar {wanted:g}"
    )
    notes = [n["note"] for n in NOTES if n["op"] == bar["op"] and fnmatchcase(case, n["case"])]
    return line if met or not notes else f"{line}\n       {' '.join(notes)}"


def main() -> int:
    results = HERE / "results"
    networks = of_networks(read(results / "networks.csv"))
    print("\n".join(judge(newest([*read(results / "cpu.csv"), *networks]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
