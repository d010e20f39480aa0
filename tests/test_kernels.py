"""Runs tests/kernels in Triton's interpreter, one process a file; see their conftest.py."""

from __future__ import annotations

import pytest
import tritons

# Triton 3.6 takes longest over select_mask; the words of every kind of scores, and every path.
SHORT = ("-k", "words_and_state or paths")
FILES = sorted((tritons.ROOT / "tests/kernels").glob("test_*.py"))


def _interpret(version, file):
    part = SHORT if version == "3.6" and file.stem == "test_triton_select_mask" else ()
    pytest_ = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file), *part)
    return tritons.run(version, *pytest_, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def runs(request):
    """Of the tests that were asked for, so that none waits for another's."""
    chosen = [i.callspec.params for i in request.session.items if i.module is request.module]
    with tritons.started([(p["version"], p["file"]) for p in chosen], _interpret) as futures:
        yield futures


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
@pytest.mark.parametrize("version", tritons.VERSIONS)
def test_in_the_interpreter(version, file, require, runs):
    tritons.check_there(version, require)
    run = runs[version, file].result()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
