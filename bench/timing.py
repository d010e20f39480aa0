"""Interleaved timing on a shared machine, and what the machine itself can do.

One thread: CPU time of this thread, which pre-emption does not touch. More threads: wall time of
samples without an involuntary context switch. Contenders take turns, so that drift hits all alike;
each starts its turn with an untimed call, so that all are timed with their own data in the caches.
"""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Quantiles", "copy_bandwidth", "interleaved", "keep_heap"]

_SAMPLE_SECONDS = 0.002
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt
_PATIENCE = 4  # budgets that a busy machine gets until every contender has five clean samples


@dataclass(frozen=True)
class Quantiles:
    """Seconds per call."""

    p20: float
    p50: float
    p80: float
    clean: int  # samples that nothing interrupted; 0: all were, and these are no measurement


def keep_heap() -> None:
    """Have glibc keep what is freed. A step of a network frees and takes hundreds of megabytes, and
    it is the history of the heap, not the contender, that says how many of their pages are given
    back and faulted in anew: between none and a fifth of the step."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_MAX, 0)


def interleaved(
    contenders: dict[str, Callable[[], object]], threads: int, budget: float, least: int = 5
) -> dict[str, Quantiles]:
    """Quantiles of every contender; ``budget``: seconds for all of them together, more where the
    machine is busy or ``least`` samples take longer."""
    loops = {name: _loops(call) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    kept: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()

    def enough() -> bool:
        spent, clean = time.perf_counter() - start, min(map(len, kept.values()))
        return min(map(len, samples.values())) >= least and (
            spent > budget if clean >= least else spent > _PATIENCE * budget
        )

    while not enough():
        for name, call in contenders.items():
            seconds, clean = _sample(call, loops[name], threads)
            samples[name].append(seconds)
            if clean:
                kept[name].append(seconds)
    return {name: _quantiles(kept[name] or samples[name], len(kept[name])) for name in contenders}


def _loops(call: Callable[[], object]) -> int:
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    return max(1, int(_SAMPLE_SECONDS / once))


def _sample(call: Callable[[], object], loops: int, threads: int) -> tuple[float, bool]:
    call()  # the contender before has filled the caches with its own data
    clock = time.thread_time if threads == 1 else time.perf_counter
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = clock()
    for _ in range(loops):
        call()
    seconds = (clock() - start) / loops
    preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != switches
    return seconds, threads == 1 or not preempted


def _quantiles(samples: list[float], clean: int) -> Quantiles:
    p20, p50, p80 = np.quantile(samples, [0.2, 0.5, 0.8])
    return Quantiles(float(p20), float(p50), float(p80), clean)


def copy_bandwidth(threads: int) -> float:
    """Bytes a second, read plus written, of a 128 MiB torch copy: what rows are held against."""
    source = torch.ones(32 * 2**20)
    target = torch.empty_like(source)
    quantiles = interleaved({"copy": lambda: target.copy_(source)}, threads, budget=0.5)["copy"]
    return 2 * source.numel() * 4 / quantiles.p20
