"""Masks of published checkpoints, each by the keys and the rounding of its own code.

This is the one place of foreign rounding rules; everywhere else a mask keeps floor(density*n + 0.5)
weights. Their weights are torch's, not those of a seed, so that the layers take form ``masked``.

| source | keys of a layer | kept |
|---|---|---|
| ``hidden-networks`` (allenai/hidden-networks) | weight, scores | all but the int((1 - density) * n) lowest abs(scores) of the layer |
| ``gem-miner`` (ksreenivasan/pruning_is_enough) | weight, scores, flag | flag = 1 and scores > 0.5; with ``unflag`` flag = 1; with ``density``, its global edge-popup: abs(scores) above the ceil((1 - density) * N)-th lowest of the net |
| ``frozen`` (Hikari43/slt_within_frozen_network) | weight, score, ternary_frozen_mask, kthvalue, scale | frozen 1, not -1, else abs(score) > kthvalue; the weight is weight * scale |
| ``torch-prune`` (torch.nn.utils.prune) | weight_orig, weight_mask | weight_mask |
| ``zeros`` (any dense checkpoint) | weight | weight != 0 |

Where equal scores would be told apart by the order of a sort, the lowest index is kept; the strict
comparisons drop all of them, as the codes do.
"""  # noqa: E501

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..formats import check_density
from ..masks import PackedMask, select_mask
from ..nn import SparseModule, sparsify_
from .ticket import unwrap

__all__ = ["SOURCES", "ImportReport", "import_masks"]

_WRAPPERS = ("module.", "_orig_mod.")
_INSIDE = ("state_dict", "model_state_dict", "model")  # where training code puts the state_dict
_UNREADABLE = (
    *(EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, SafetensorError),
)


@dataclass
class _Layer:
    """One layer of a checkpoint: dense weight and bias, and where the weight is kept."""

    weight: Tensor
    mask: Any  # bool tensor; PackedMask once it is fitted to the model
    bias: Tensor | None = None


@dataclass
class ImportReport:
    """What an import did; print it.

    ``masks``: of the layers that were installed; ``loaded``: other tensors of the model that took
    the checkpoint's value; ``unmatched``: layers of the checkpoint that got no sparse layer, and
    why; ``unmasked``: layers of the model that could have one and have no mask in the checkpoint;
    ``unused``: the checkpoint's other keys.
    """

    source: str
    masks: dict[str, PackedMask] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    unmatched: list[tuple[str, str]] = field(default_factory=list)
    unmasked: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = sum(mask.kept for mask in self.masks.values())
        total = sum(mask.numel for mask in self.masks.values())
        lines = [f"{self.source}: {len(self.masks)} masks, {kept:,} of {total:,} weights kept"]
        lines += [f"{name}: {m.kept:,} of {m.numel:,}" for name, m in self.masks.items()]
        lines += [f"unmatched {name}: {reason}" for name, reason in self.unmatched]
        for what in ("loaded", "unmasked", "unused"):
            if names := getattr(self, what):
                lines.append(f"{what}: {', '.join(names)}")
        return "\n".join(lines)


def import_masks(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    model: nn.Module,
    source: str = "auto",
    *,
    density: float | None = None,
    unflag: bool = False,
    rename: Callable[[str], str] | None = None,
) -> ImportReport:
    """Put the masks and weights of a published checkpoint into ``model``, in place.

    ``checkpoint``: a file of torch (read without unpickling objects) or safetensors, or a mapping;
    the state_dict may lie in it under ``state_dict``, ``model_state_dict`` or ``model``, its keys
    behind ``module.``. ``source``: one of ``SOURCES``, or ``auto``, which looks at the keys.
    ``density``: the kept fraction, of ``hidden-networks`` (its ``--prune-rate``; the file does not
    say) and ``gem-miner`` in global edge-popup. ``rename`` maps the checkpoint's keys to the
    model's.

    Matched layers become sparse modules in form ``masked``; ones that are already keep their place
    and take mask and weight. A weight with trailing dimensions of 1 fits a linear layer, and the
    other way round. The model's other tensors take the checkpoint's values where name and shape
    agree. ValueError or TypeError if the file cannot be read, a tensor does not fit, or nothing
    matches; the model is then as it was.
    """
    model = unwrap(model, "import_masks")
    state = _state(checkpoint)
    if rename is not None:
        state = {rename(key): tensor for key, tensor in state.items()}
    if source == "auto":
        marked = (name for name, (mark, _) in _READERS.items() if _names(state, mark))
        source = next(marked, "zeros")
    if source not in _READERS:
        raise ValueError(f"import_masks: source: got {source!r}, accepted: auto, {_LISTED}")
    mark, read = _READERS[source]
    names = _names(state, mark)
    if not names:
        raise ValueError(f"import_masks: checkpoint: has no keys *.{mark}, as {source} files have")
    if density is not None and source not in ("hidden-networks", "gem-miner"):
        raise ValueError(f"import_masks: density: a {source} file says itself what is kept")
    if unflag and source != "gem-miner":
        raise ValueError(f"import_masks: unflag: is of gem-miner files, got source {source!r}")
    layers, used = read(state, names, density, unflag)
    rest = {key: tensor for key, tensor in state.items() if key not in used}
    return _Import(model, source, layers, rest).run(model)


# Reading --------------------------------------------------------------------------------------


def _state(checkpoint: Any) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names of the unwrapped model."""
    where = "import_masks: checkpoint"
    if not isinstance(checkpoint, Mapping):
        if not isinstance(checkpoint, str | os.PathLike):
            raise TypeError(f"{where}: got {type(checkpoint).__name__}, need a path or a mapping")
        where, checkpoint = str(checkpoint), _read(Path(checkpoint))
    for key in _INSIDE:
        if isinstance(inside := checkpoint.get(key), Mapping):
            checkpoint = inside
            break
    state = {}
    for key, value in checkpoint.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            while key.startswith(_WRAPPERS):
                key = key.partition(".")[2]
            state[key] = value.detach()
    if not any("." in key for key in state):
        raise ValueError(f"{where}: no state_dict in it: no tensors under names of layers")
    return state


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path}: not a checkpoint of tensors: damaged, or with pickled objects in it, which "
            "are not loaded; save its state_dict alone where you trust the file"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, need a mapping of tensors")
    return content


def _names(state: Mapping[str, Tensor], mark: str) -> list[str]:
    """Layers that have a tensor ``mark``, in the order of the checkpoint."""
    return [
        key.removesuffix(f".{mark}")
        for key, tensor in state.items()
        if key.endswith(f".{mark}") and (mark != "weight" or tensor.ndim > 1)
    ]


class _Keys:
    """Tensors of a checkpoint, and which of them were asked for."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.used = state, set()

    def __call__(self, name: str, key: str, like: Tensor | None = None) -> Tensor:
        """``name.key``, finite; ValueError if it is missing or not in the shape of ``like``."""
        full = f"{name}.{key}"
        if full not in self.state:
            raise ValueError(f"import_masks: checkpoint: has no {full}")
        tensor = self.state[full]
        if like is not None and tensor.shape != like.shape:
            raise ValueError(
                f"import_masks: checkpoint: {full} has shape {tuple(tensor.shape)}, its weight "
                f"{tuple(like.shape)}"
            )
        if tensor.isnan().any():
            raise ValueError(f"import_masks: checkpoint: {full} holds NaN")
        self.used.add(full)
        return tensor

    def optional(self, name: str, key: str) -> Tensor | None:
        return self(name, key) if f"{name}.{key}" in self.state else None


_Read = tuple[dict[str, _Layer], set[str]]


# Rules ----------------------------------------------------------------------------------------


def _hidden_networks(state, names, density, unflag) -> _Read:
    if density is None:
        raise ValueError(
            "import_masks: density: hidden-networks files do not say what is kept; give the "
            "fraction, their --prune-rate"
        )
    keys, layers = _Keys(state), {}
    for name in names:
        weight = keys(name, "weight")
        scores = keys(name, "scores", weight).float()
        kept = scores.numel() - int((1 - check_density(density)) * scores.numel())
        mask = select_mask(scores, kept=kept)
        layers[name] = _Layer(weight, mask.to_dense(), keys.optional(name, "bias"))
    return layers, keys.used


def _gem_miner(state, names, density, unflag) -> _Read:
    keys, layers, scores = _Keys(state), {}, {}
    for name in names:
        weight = keys(name, "weight")
        flag = keys(name, "flag", weight) == 1
        scores[name] = keys(name, "scores", weight)
        layers[name] = _Layer(weight, flag)
        _gem_miner_bias(keys, name, layers[name])
    threshold = None if density is None else _gem_miner_threshold(layers, scores, density)
    for name, layer in layers.items() if not unflag else ():
        if threshold is None:
            layer.mask = layer.mask & (scores[name].clamp(0, 1) > 0.5)
        else:
            layer.mask = scores[name].abs() > threshold
    return layers, keys.used


def _gem_miner_threshold(layers, scores, density) -> float:
    """That of its global edge-popup; the lowest possible if nothing is dropped."""
    active = torch.cat([scores[name][layer.mask] for name, layer in layers.items()]).abs()
    dropped = math.ceil((1 - check_density(density)) * active.numel())
    return active.sort().values[dropped - 1].item() if dropped else -1.0


def _gem_miner_bias(keys: _Keys, name: str, layer: _Layer) -> None:
    """Its scores and flags are dummies of size 1 where there is no bias."""
    scores, flag = (keys.optional(name, key) for key in ("bias_scores", "bias_flag"))
    layer.bias = keys.optional(name, "bias")
    if layer.bias is not None and scores is not None and scores.shape == layer.bias.shape:
        layer.bias = layer.bias * (scores.clamp(0, 1) > 0.5) * (flag == 1)


def _frozen(state, names, density, unflag) -> _Read:
    keys, layers = _Keys(state), {}
    for name in names:
        weight = keys(name, "weight")
        frozen = keys(name, "ternary_frozen_mask", weight)
        if not bool(((frozen == -1) | (frozen == 0) | (frozen == 1)).all()):
            raise ValueError(f"import_masks: checkpoint: {name}.ternary_frozen_mask: not -1, 0, 1")
        mask = keys(name, "score", weight).abs() > keys(name, "kthvalue")
        mask = torch.where(frozen == 0, mask, frozen == 1)
        for unread in ("mask", "local_sparsity", "global_sparsity"):
            keys.optional(name, unread)
        layers[name] = _Layer(weight * keys(name, "scale"), mask, keys.optional(name, "bias"))
    return layers, keys.used


def _torch_prune(state, names, density, unflag) -> _Read:
    keys, layers = _Keys(state), {}
    for name in names:
        weight = keys(name, "weight_orig")
        mask = keys(name, "weight_mask", weight) != 0
        bias = keys.optional(name, "bias")
        if f"{name}.bias_orig" in state:
            bias = keys(name, "bias_orig")
            bias = bias * keys(name, "bias_mask", bias)
        layers[name] = _Layer(weight, mask, bias)
    return layers, keys.used


def _zeros(state, names, density, unflag) -> _Read:
    keys, layers = _Keys(state), {}
    for name in names:
        weight = keys(name, "weight")
        layers[name] = _Layer(weight, weight != 0, keys.optional(name, "bias"))
    return layers, keys.used


_READERS: dict[str, tuple[str, Callable[..., _Read]]] = {  # by the key that marks a layer
    "frozen": ("ternary_frozen_mask", _frozen),
    "gem-miner": ("flag", _gem_miner),
    "hidden-networks": ("scores", _hidden_networks),
    "torch-prune": ("weight_mask", _torch_prune),
    "zeros": ("weight", _zeros),
}
SOURCES = tuple(_READERS)
_LISTED = ", ".join(SOURCES)


# Installing -----------------------------------------------------------------------------------


class _Import:
    """One import, as a config of ``sparsify_``: everything is checked before the model changes."""

    def __init__(self, model, source, layers: dict[str, _Layer], rest: dict[str, Tensor]) -> None:
        self.report, self.rest, self.layers = ImportReport(source), dict(rest), {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, layer in layers.items():
            if reason := _misfit(modules.get(name)):
                self.report.unmatched.append((name, reason))
            else:
                self.layers[name] = _fitted(name, layer, modules[name])
        self._sort_rest(model.state_dict(keep_vars=True))
        if not self.layers:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.report.unmatched)
            raise ValueError(f"import_masks: model: nothing matches the checkpoint ({reasons})")

    def _sort_rest(self, tensors: Mapping[str, Tensor]) -> None:
        for key, value in self.rest.items():
            if key not in tensors:
                self.report.unused.append(key)
                continue
            _check_shape(key, value.shape, tensors[key].shape)
            self.report.loaded.append(key)

    def run(self, model: nn.Module) -> ImportReport:
        refused = {}
        if all(isinstance(model.get_submodule(name), SparseModule) for name in self.layers):
            self.finish(model, None)
        else:
            refused = dict(sparsify_(model, self).skipped)
        for name, layer in self.layers.items():
            if isinstance(model.get_submodule(name), SparseModule):
                self.report.masks[name] = layer.mask
            else:
                why = refused.get(name, "not replaced")
                reason = f"{why}; it has the weight under the mask"
                self.report.unmatched.append((name, reason))
        self.report.unmasked = [
            name for name, why in refused.items() if name not in self.layers and why == _NO_MASK
        ]
        return self.report

    def plan(self, name: str, module: nn.Module) -> dict[str, Any] | None:
        return {"mask": self.layers[name].mask} if name in self.layers else None

    @torch.no_grad()
    def finish(self, model: nn.Module, wanted: Any) -> list[str]:
        """The checkpoint's values, now that the layers are in."""
        for name, layer in self.layers.items():
            module, weight = model.get_submodule(name), layer.weight
            if isinstance(module, SparseModule):
                module.mask, module.recipe = layer.mask, None  # no longer the weights of a seed
            else:
                weight = weight * layer.mask.to_dense()
            module.weight.copy_(weight)
            if (bias := module._parameters.get("bias")) is not None:
                bias.copy_(torch.zeros_like(bias) if layer.bias is None else layer.bias)
        tensors = model.state_dict(keep_vars=True)
        for key in self.report.loaded:
            tensors[key].copy_(self.rest[key])
        return []


_NO_MASK = "left dense by the config"  # what sparsify_ says where plan gave nothing


def _misfit(module: nn.Module | None) -> str | None:
    """Why a layer of the checkpoint has no place here; None if it may have."""
    if module is None:
        return "the model has no such layer"
    if isinstance(module, SparseModule) and module.form != "masked":
        return f"form {module.form!r} takes no weights of others; build the dense model anew"
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.is_meta or weight.ndim < 2:
        return f"the model's {type(module).__name__} has no weight to set"
    return None


def _fitted(name: str, layer: _Layer, module: nn.Module) -> _Layer:
    """``layer`` in the shape of ``module``; ValueError if it has another one."""
    shape, own = tuple(layer.weight.shape), tuple(module.weight.shape)
    _check_shape(f"{name}.weight", _unpadded(shape), _unpadded(own))
    bias = module._parameters.get("bias")
    if layer.bias is not None and bias is None and bool(layer.bias.any()):
        raise ValueError(f"import_masks: model: {name} has no bias, the checkpoint's has")
    if layer.bias is not None and bias is not None:
        _check_shape(f"{name}.bias", layer.bias.shape, bias.shape)
    mask = PackedMask.from_dense(layer.mask.reshape(own)).to(module.weight.device)
    return _Layer(layer.weight.reshape(own).to(module.weight), mask, layer.bias)


def _unpadded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing ones: a linear layer may be a 1x1 convolution elsewhere."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _check_shape(key: str, theirs: Any, ours: Any) -> None:
    if tuple(theirs) != tuple(ours):
        raise ValueError(
            f"import_masks: model: {key} has shape {tuple(ours)}, the checkpoint's {tuple(theirs)}"
        )
