"""One file that a run continues from, written atomically and read without unpickling objects."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from ..io.files import replacing

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = 1


def save_checkpoint(path: Path, description: dict[str, Any], state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) of the run that ``description`` describes."""
    content = {
        "format": _FORMAT,
        "description": json.dumps(description, sort_keys=True, default=str),
        "state": state,
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The saved state; ValueError if the file is damaged or of another run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, theirs, state = content["format"], content["description"], content["state"]
    except (EOFError, KeyError, OSError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a checkpoint, or a damaged one; remove it") from error
    if version != _FORMAT:
        raise ValueError(f"{path}: checkpoint format {version}, this version reads {_FORMAT}")
    ours = json.loads(json.dumps(description, sort_keys=True, default=str))
    differs = [
        f"{key} (checkpoint {_short(theirs_value)}, now {_short(ours.get(key))})"
        for key, theirs_value in json.loads(theirs).items()
        if theirs_value != ours.get(key)
    ]
    if differs:
        raise ValueError(
            f"{path}: belongs to another run, which differs in {'; '.join(differs)}; use another "
            "output folder, or start anew (resume=False, --overwrite)"
        )
    return state


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else f"#{hashlib.sha256(text.encode()).hexdigest()[:8]}"
