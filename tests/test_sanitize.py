"""Every kernel of csrc/core under AddressSanitizer and UBSan, at each ISA level of this machine.

``tests/native/run.cpp`` drives them, outside of Python.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from sparseticket import _C

ROOT = Path(__file__).resolve().parents[1]
CASES = 60  # a kernel
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O0", "-g1", "-w", "-fopenmp", "-DST_X86", *SANITIZERS]


@pytest.fixture(scope="module")
def runners(tmp_path_factory) -> dict[str, Path]:
    """The runner of each level, all compiled at once, with the flags that ship."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs build: there is no C++ compiler")
    for module in ("pybind11", "setuptools"):
        pytest.importorskip(module, reason=f"needs build: {module} is not installed")
    with mock.patch("setuptools.setup"):
        levels = runpy.run_path(str(ROOT / "setup.py"))["LEVELS"]
    sources = [*(ROOT / "csrc/core").glob("*.cpp"), ROOT / "tests/native/run.cpp"]
    folder, builds = tmp_path_factory.mktemp("sanitize"), {}
    for level in _C.isas():
        flags = [*FLAGS, *levels[level], f"-DST_ISA={level}", f"-I{ROOT / 'csrc/core'}"]
        build = [compiler, *flags, *sources, "-o", folder / level]
        builds[level] = subprocess.Popen(build, stderr=subprocess.PIPE, text=True)
    errors = {level: build.communicate()[1] for level, build in builds.items()}
    assert not any(build.returncode for build in builds.values()), errors
    return {level: folder / level for level in builds}


@pytest.mark.parametrize("level", _C.isas())
def test_kernels_stay_in_their_memory(runners, level):
    # Leaks would be the runner's own, kernels allocate nothing; looking for them needs ptrace.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "3"}
    run = subprocess.run([runners[level], str(CASES)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"kernels, {CASES} cases each" in run.stdout
