"""Loads the compiled module, and says clearly what to do when it is missing or stale."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

__all__ = ["csrc_hash", "load_compiled"]


def csrc_hash(csrc: Path) -> str:
    """SHA-256 over names and contents of the C++ sources; setup.py compiles the same in."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".cpp", ".h")):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def load_compiled(package: Path) -> None:
    """Import ``sparseticket._C``; ImportError if it is missing or was built from other sources."""
    try:
        compiled = importlib.import_module("sparseticket._C")
    except ImportError as error:
        if "SPARSETICKET_ISA" in str(error):  # loaded, but asked for a level it does not have
            raise
        raise ImportError(
            "sparseticket: the compiled module sparseticket._C cannot be loaded "
            f"({error}); build it with 'pip install .' in the source tree"
        ) from error
    csrc = package.parent / "csrc"
    if csrc.is_dir() and csrc_hash(csrc) != compiled.csrc_hash:
        raise ImportError(
            "sparseticket: sparseticket._C was built from other sources than the csrc/ beside it; "
            "rebuild it with 'pip install -e .'"
        )
