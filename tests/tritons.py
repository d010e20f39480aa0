"""Processes with each Triton that the kernels support, several at a time where there are cores."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("installed", "3.6")
# `make test` installs it there; beside the installed one, for an environment has but one.
OLDEST = Path(os.environ.get("SPARSETICKET_TRITON36", Path(sys.prefix) / "triton-3.6"))


def check_there(version: str, require: Callable[[str, str], object]) -> None:
    """Skip, or fail where it is required, if this Triton is not there."""
    if importlib.util.find_spec("triton") is None:
        require("triton", "it is not installed")
    if version != "installed" and not OLDEST.is_dir():
        require("triton36", f"no folder {OLDEST}; `make test` makes it")


def run(version: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``python arguments`` in the root of the tree."""
    oldest = [str(OLDEST)] if version != "installed" else []
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *oldest])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=1200,
    )


@contextmanager
def started(
    jobs: Iterable[tuple], call: Callable[..., subprocess.CompletedProcess]
) -> Iterator[dict[tuple, Future]]:
    """``call(*job)`` of every job, in their order, while the tests wait for the one they check."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        yield {job: pool.submit(call, *job) for job in jobs}
    finally:
        pool.shutdown(cancel_futures=True)
