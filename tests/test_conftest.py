"""SPARSETICKET_REQUIRE: what a machine must run may not be skipped there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SKIPS = """
import pytest

def test_data(require):
    require("data", "none here")

@pytest.mark.skipif(True, reason="needs gpu: none here")
def test_gpu():
    pass

@pytest.mark.skipif(True, reason="without a word of what it needs")
def test_unsaid():
    pass
"""


def _outcome(folder: Path, required: str) -> str:
    (folder / "test_skips.py").write_text(SKIPS)
    place = {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, *sys.path)))}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", str(folder)],
        env={**os.environ, **place, "SPARSETICKET_REQUIRE": required},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return run.stdout + run.stderr


def test_required_skips_fail(tmp_path):
    assert "3 skipped" in _outcome(tmp_path, "")
    text = _outcome(tmp_path, "cpu, data")
    assert "1 failed, 1 skipped, 1 error" in text  # the error: a mark skips before the call
    assert "SPARSETICKET_REQUIRE has 'data', and this was skipped: Skipped: needs data" in text
    assert "SPARSETICKET_REQUIRE has 'cpu', and this was skipped: Skipped: without" in text
