"""Out of the library: plain torch modules, their weights, and ONNX.

What leaves is dense: every layer of ours becomes the torch layer it stands for, with the weights
that it computes with, zeros included; nothing of it needs this library.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import warnings
from pathlib import Path

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from ..nn import ScoreLayer, SparseModule, SparseMultiheadAttention, Superposed, densify_
from .files import replacing

__all__ = ["export_dense", "export_onnx", "to_dense"]

_OURS = SparseModule | ScoreLayer | Superposed


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with plain torch layers in place of ours, bit for bit their weights.

    A model without layers of ours is copied as it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_dense: model: got {type(model).__name__}, need an nn.Module")
    if isinstance(model, _OURS):
        return model.to_dense()
    dense = copy.deepcopy(model)
    if any(isinstance(m, _OURS) for m in dense.modules()):
        densify_(dense)
    return dense.to_dense() if isinstance(dense, SparseMultiheadAttention) else dense


def export_dense(model: nn.Module, path: str | os.PathLike[str], example: Tensor | None = None):
    """Write the dense model; the end of the name says how.

    ``.safetensors`` and ``.pt`` hold the state_dict, under the names of the torch modules; ``.pt2``
    is a whole program (``torch.export.load(path).module()``) of one input like ``example``, whose
    first dimension may vary, in evaluation mode. ValueError for another name, or a program
    without ``example``.
    """
    path = Path(path)
    dense = to_dense(model).cpu()
    if path.suffix == ".pt2":
        if example is None:
            raise ValueError("export_dense: example: a .pt2 program needs an example input")
        program = _program(dense, example)
        with replacing(path) as temporary:
            torch.export.save(program, temporary)
        return
    state = {name: t.detach().contiguous().clone() for name, t in dense.state_dict().items()}
    writers = {".safetensors": safetensors.save_file, ".pt": torch.save}
    if path.suffix not in writers:
        accepted = ", ".join([*writers, ".pt2"])
        raise ValueError(f"export_dense: path: got {path.name!r}, need a name in {accepted}")
    with replacing(path) as temporary:
        writers[path.suffix](state, temporary)


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example: Tensor) -> None:
    """Write the dense model as ONNX: ``input`` like ``example``, its first dimension free, to
    ``output``, in evaluation mode.

    The initializers are the weights, bit for bit: torch's optimizer, which would fold batch norms
    into them, is off. ImportError, naming the extra, without onnx and onnxscript.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {' and '.join(missing)}: pip install 'sparseticket[onnx]'"
        )
    path = Path(path)
    program = _program(to_dense(model).cpu(), example)
    with _quiet():
        onnx = torch.onnx.export(
            program,
            input_names=["input"],
            output_names=["output"],
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    with replacing(path) as temporary:
        onnx.save(temporary, external_data=False)


def _program(dense: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The model in evaluation mode as a graph; a batch of 1 would become a constant of it."""
    dense.eval().requires_grad_(False)
    example = example.detach().cpu()
    if len(example) < 2:
        example = example.new_zeros(2, *example.shape[1:])
    batch = ({0: torch.export.Dim.DYNAMIC},)
    with _quiet():
        return torch.export.export(dense, (example,), dynamic_shapes=batch)


@contextlib.contextmanager
def _quiet():
    """torch's exporters warn of what they do to themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
