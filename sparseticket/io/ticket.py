"""A ticket on disk: seeds and masks in one safetensors file that contains no weights.

The file's only metadata entry is ``sparseticket``: JSON with sorted keys and no spaces. It holds no
time, path, host or thread count, so the same model gives the same bytes. Stored tensors:

- ``mask:<layer>``: the coded mask of a layer, uint8 (``io/codecs.py``); of a layer with a frozen
  pattern, which the seed gives back, only its free part, as a 1-D mask;
- ``plane1:<layer>``, ``plane2:<layer>``, ...: further masks of a superposed layer, each coded over
  the weights that the one before keeps (over all weights for kind ``tasks``);
- the statistics of normalisation layers, under their state_dict names (``normalisation``);
- ``not_weight_free``: whatever else a seed cannot give back, e.g. a dense layer or learned biases.

Tensors that are all zeros or all ones, such as frozen biases and affine norms, are listed with that
value (``constants``). ``sha256`` is the hash of the whole file with its own 64 digits set to "0";
``masks_sha256`` is that of the decoded masks. Loading checks both; nothing is ever unpickled.
Patterns and planes make a file's version 2, layers other than linear and conv2d its version 3;
without them it is version 1, byte for byte.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import __version__, ops
from ..masks import PackedMask
from ..nn import (
    FrozenPattern,
    Plane,
    ScoreLayer,
    SparseConv1d,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseEmbedding,
    SparseLinear,
    SparseModule,
    Superposed,
    WeightRecipe,
    close_attention_,
    open_attention_,
)
from ..nn._sparse import has_hooks
from ..prng import GENERATOR_VERSION
from .codecs import decode_mask, encode_mask
from .files import replacing

__all__ = ["FORMAT_VERSION", "Ticket", "TicketError"]

FORMAT_VERSION = 3  # the newest one; a file has the oldest that can hold it
_KEY = "sparseticket"
_ZEROS = "0" * 64
_SPARSE = {
    "linear": SparseLinear,
    "conv1d": SparseConv1d,
    "conv2d": SparseConv2d,
    "conv_transpose2d": SparseConvTranspose2d,
    "embedding": SparseEmbedding,
}
_DENSE = {kind: sparse._BASE for kind, sparse in _SPARSE.items()}
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
_MALFORMED = (
    *(SafetensorError, MemoryError, RuntimeError),
    *(AttributeError, KeyError, TypeError, ValueError),
)
_GROUPS = ("normalisation", "not_weight_free")


class TicketError(ValueError):
    """The file is not a whole ticket of this format, or it does not fit the model."""


class Ticket:
    """A checked ticket file in memory. Make one with ``from_model`` or ``load``.

    ``meta`` is the metadata, ``masks`` maps layer names to ``PackedMask``, ``tensors`` holds all
    that the file stores, under the names listed above. ``planes`` maps the names of superposed
    layers to all their masks; ``masks`` then has where any of these holds.
    """

    def __init__(self, raw: bytes) -> None:
        """Parse and check the bytes of a ticket file."""
        self.raw = raw
        self.meta, self.tensors, self.planes = _parse(raw)
        self.masks = {n: functools.reduce(operator.or_, m) for n, m in self.planes.items()}
        self.planes = {name: masks for name, masks in self.planes.items() if len(masks) > 1}

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        method: str | None = None,
        config: Any = None,
        extra: Mapping[str, Any] | None = None,
        parent: Ticket | None = None,
    ) -> Ticket:
        """The ticket of a model whose sparse layers are under search or in ticket form.

        ``config`` is a dataclass or a mapping, ``method`` defaults to its ``name``; ``extra`` is
        kept as it is (the trainer describes model and data there). ``parent`` is the ticket that
        this one was derived from; its ``sha256`` is recorded.
        """
        model = unwrap(model, "Ticket.from_model")
        layers, tensors, masks = {}, {}, {}
        for name, module in model.named_modules():
            if isinstance(module, SparseModule | Superposed | ScoreLayer):
                if not name:
                    raise TicketError(
                        "Ticket.from_model: model: is itself a sparse layer; wrap it in "
                        "nn.Sequential, so that it has a name"
                    )
                if isinstance(module, ScoreLayer):
                    module = module.to_ticket()
                masks[name] = _regenerable_masks(name, module)
                layers[name], payloads = _encode_layer(module, masks[name])
                tensors |= dict(zip(_payload_names(name, len(payloads)), payloads, strict=True))
        if not layers:
            raise TicketError(
                "Ticket.from_model: model: has no sparse layers; convert it with "
                "sparsify_(model, config) first"
            )
        groups, constants = _sort_tensors(model)
        for group in groups.values():
            tensors |= {name: t.detach().cpu().contiguous().clone() for name, t in group.items()}
        meta = {
            "format_version": _version_for(layers),
            "generator_version": GENERATOR_VERSION,
            "library_version": __version__,
            "method": method or getattr(config, "name", None),
            "config": dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config,
            "extra": extra,
            "parent": parent.meta["sha256"] if parent else None,
            "layers": layers,
            "constants": constants,
            "masks_sha256": _masks_sha256(masks),
            "sha256": _ZEROS,
        }
        meta |= {name: sorted(group) for name, group in groups.items()}
        return cls(_serialise(meta, tensors))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ticket:
        """Read a ticket; TicketError if it is damaged, cut, newer than this library, or none."""
        raw = Path(path).read_bytes()
        try:
            return cls(raw)
        except TicketError as error:
            raise TicketError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file under a temporary name and move it into place."""
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(self.raw)

    def verify(self) -> None:
        """Check the bytes again: both hashes, every count and every code. TicketError if wrong."""
        _parse(self.raw)

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the ticket into a freshly built ``model`` of the same architecture; returns it.

        Its layers take ticket form, in place; biases, norms and statistics get the ticket's
        values. If anything does not fit, TicketError names it and the model stays as it was.
        """
        target = unwrap(model, "Ticket.apply")
        opened, _ = open_attention_(target, lambda module, name: name in self.meta["layers"])
        try:
            self._put_into(target)
        except BaseException:
            close_attention_(target, opened)
            raise
        return model

    def _put_into(self, target: nn.Module) -> None:
        modules = dict(target.named_modules(remove_duplicate=False))
        for name, entry in self.meta["layers"].items():
            _check_layer(name, entry, modules.get(name))
        for name, module in modules.items():
            if isinstance(module, SparseModule):
                _check_fresh(name, module)
        values = self._values_for(target)
        replacements = {
            id(modules[name]): self._ticket_form(name, modules[name])
            for name in self.meta["layers"]
        }
        for name, module in modules.items():  # one module may stand under several names
            if id(module) in replacements:
                owner, _, child = name.rpartition(".")
                setattr(modules[owner], child, replacements[id(module)])
        tensors = target.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[name].copy_(value)
                else:
                    tensors[name].fill_(value).requires_grad_(False)

    def _ticket_form(self, name: str, module: nn.Module) -> nn.Module:
        entry = self.meta["layers"][name]
        if has_hooks(module):
            raise TicketError(f"{name}: it carries hooks, which would be lost; remove them first")
        dense = module.to_dense() if isinstance(module, SparseModule) else module
        if "planes" in entry:
            return self._superposed(name, dense)
        try:
            new = _SPARSE[entry["kind"]].from_dense(
                dense,
                form="ticket",
                mask=self.masks[name],
                seed=entry["seed"],
                layer=entry["layer"],
                weights=entry["dist"],
                keep_bias=entry["bias"] and f"{name}.bias" not in self.meta["constants"],
            )
        except (TypeError, ValueError) as error:
            raise TicketError(f"{name}: {error}") from error
        new.recipe = _recipe(entry)  # its sigma has the scale that the search used
        new.frozen_pattern = _pattern(entry)
        return new

    def _superposed(self, name: str, module: nn.Module) -> nn.Module:
        """``module`` is a plain one of the entry's shape."""
        entry = self.meta["layers"][name]
        made = entry["planes"]
        planes = map(Plane, self.planes_of(name), made["coefficients"])
        return Superposed.of(module, _recipe(entry), made["kind"], list(planes))

    def planes_of(self, name: str) -> list[PackedMask]:
        """All masks of a layer, one for most."""
        return self.planes.get(name, [self.masks[name]])

    def _values_for(self, target: nn.Module) -> dict[str, Tensor | int]:
        """New values of all tensors of ``target`` but its ticket layers' own."""
        values = dict(self.meta["constants"])
        values |= {name: self.tensors[name] for group in _GROUPS for name in self.meta[group]}
        found = _other_tensors(target, [target.get_submodule(name) for name in self.meta["layers"]])
        for name in sorted(found.keys() ^ values.keys()):
            where = "in the model, not in the ticket" if name in found else "not in the model"
            raise TicketError(
                f"{name}: this tensor is {where}; build the model that the ticket was made from"
            )
        for name, value in values.items():
            if is_lazy(found[name]) or found[name].is_meta:
                raise TicketError(f"{name}: it has no storage yet; initialise the model first")
            if isinstance(value, Tensor) and value.shape != found[name].shape:
                raise TicketError(
                    f"{name}: the model's shape is {tuple(found[name].shape)}, the ticket's "
                    f"{tuple(value.shape)}"
                )
        return values

    def info(self) -> dict[str, Any]:
        """Contents and sizes as plain values; ``raw_bits``, ``coded_bits`` and
        ``normalisation_bits`` are the three lines of a size report.

        ``dense_bytes`` is the same model in float32: weights, statistics, and what is not
        weight-free. Constant biases and affine norms count on neither side.
        """
        rows = [
            {"name": name, "weights": math.prod(entry["shape"])}
            | entry
            | {"coded_bytes": _coded_bytes(name, entry, self.tensors)}
            for name, entry in self.meta["layers"].items()
        ]
        weights, kept = sum(row["weights"] for row in rows), sum(row["kept"] for row in rows)
        norm, other = (sum(self.tensors[n].nbytes for n in self.meta[group]) for group in _GROUPS)
        return self.meta | {
            "weights": weights,
            "kept": kept,
            "density": kept / weights if weights else 0.0,
            "raw_bits": sum(map(_raw_bits, rows)),
            "coded_bits": 8 * sum(row["coded_bytes"] for row in rows),
            "normalisation_bits": 8 * norm,
            "not_weight_free_bits": 8 * other,
            "file_bytes": len(self.raw),
            "dense_bytes": 4 * weights + norm + other,
            "layers": rows,
        }


def unwrap(model: nn.Module, where: str) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DDP's wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model: got {type(model).__name__}, need an nn.Module")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _signature(module: nn.Module) -> dict[str, Any]:
    """What a layer and its entry must agree on."""
    if isinstance(module, nn.Linear):
        shape = [module.out_features, module.in_features]
        return {"kind": "linear", "shape": shape, "bias": module.bias is not None}
    if isinstance(module, nn.Embedding):
        shape = [module.num_embeddings, module.embedding_dim]
        rows = {"padding_idx": module.padding_idx}
        return {"kind": "embedding", "shape": shape, "bias": False, **rows}
    values = {key: getattr(module, key) for key in _GEOMETRY}
    geometry = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    shape = [module.out_channels, module.in_channels // module.groups, *module.kernel_size]
    kind = f"conv{len(module.kernel_size)}d"
    if isinstance(module, nn.ConvTranspose2d):
        shape = [module.in_channels, module.out_channels // module.groups, *module.kernel_size]
        kind, geometry["output_padding"] = "conv_transpose2d", list(module.output_padding)
    return {"kind": kind, "shape": shape, "bias": module.bias is not None, **geometry}


def _regenerable_masks(name: str, module: nn.Module) -> list[PackedMask]:
    if isinstance(module, Superposed):
        return module.masks
    if module.form in ("masked", "compressed"):
        raise TicketError(
            f"{name}: form {module.form!r} has weights of its own, a ticket stores none; "
            "to_form('ticket') converts it if they are still those of its seed"
        )
    if module.mask_words.is_meta:
        raise TicketError(f"{name}: it is on the meta device, where there is no mask to store")
    _check_fresh(name, module)
    try:
        module._check_remakes("ticket")
    except ValueError as error:
        raise TicketError(f"{name}: {error}") from error
    return [module.mask]


def _check_fresh(name: str, module: SparseModule) -> None:
    try:
        module._check_fresh()
    except RuntimeError as error:
        raise TicketError(f"{name}: {error}") from error


def _encode_layer(
    module: nn.Module, masks: list[PackedMask]
) -> tuple[dict[str, Any], list[Tensor]]:
    """The layer's entry in the metadata and its payloads, the mask's first."""
    entry = _signature(module) | dataclasses.asdict(module.recipe)
    if isinstance(module, Superposed):
        return _encode_planes(module, masks, entry)
    (mask,) = masks
    pattern = module.frozen_pattern
    if pattern is None:
        code, payload = _encode(mask)
        return entry | {"kept": mask.kept} | code, [payload]
    code, payload = _encode(pattern.restrict(mask))
    entry |= {"kept": mask.kept, "frozen": [pattern.pruned, pattern.locked]} | code
    return entry, [payload]


def _encode(mask: PackedMask) -> tuple[dict[str, Any], Tensor]:
    codec, parameter, payload = encode_mask(mask.words, mask.shape)
    return {"codec": codec, "parameter": parameter}, payload


def _encode_planes(
    module: Superposed, masks: list[PackedMask], entry: dict[str, Any]
) -> tuple[dict[str, Any], list[Tensor]]:
    (code, payload), payloads, codes = _encode(masks[0]), [], []
    for outer, inner in itertools.pairwise(masks):
        one, more = _encode(inner if module.kind == "tasks" else _inside(outer, inner))
        codes.append({"kept": inner.kept} | one)
        payloads.append(more)
    planes = {"kind": module.kind, "coefficients": module.alpha.tolist(), "codes": codes}
    return entry | {"kept": masks[0].kept, "planes": planes} | code, [payload, *payloads]


def _inside(outer: PackedMask, inner: PackedMask) -> PackedMask:
    """``inner`` over the weights that ``outer`` keeps, in their canonical order: 1-D."""
    bits = ops.gather_live(inner.to_dense().float(), outer.words, outer.kept)
    return PackedMask.from_dense(bits != 0)


def _outside(outer: PackedMask, inside: PackedMask) -> PackedMask:
    """Inverse of :func:`_inside`."""
    values = inside.to_dense().float()
    return PackedMask.from_dense(ops.scatter_live(values, outer.words, outer.shape) != 0)


def _payload_names(name: str, count: int) -> list[str]:
    return [f"mask:{name}", *(f"plane{i}:{name}" for i in range(1, count))]


def _plane_count(entry: Mapping[str, Any]) -> int:
    return 1 + len(entry["planes"]["codes"]) if "planes" in entry else 1


def _version_for(layers: Mapping[str, Any]) -> int:
    entries = layers.values()
    if any(entry["kind"] not in ("linear", "conv2d") for entry in entries):
        return 3
    return 2 if any({"frozen", "planes"} & entry.keys() for entry in entries) else 1


def _coded_bytes(name: str, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> int:
    return sum(tensors[key].nbytes for key in _payload_names(name, _plane_count(entry)))


def _raw_bits(row: Mapping[str, Any]) -> int:
    """One bit for every weight that a mask says something of."""
    planes = row.get("planes")
    bits = row["weights"] - sum(row.get("frozen", ()))
    if planes is None:
        return bits
    counts = [row["kept"], *(code["kept"] for code in planes["codes"])][:-1]
    return bits + sum(row["weights"] if planes["kind"] == "tasks" else kept for kept in counts)


def _sort_tensors(model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """({group: {name: tensor}}, {name: 0 or 1}) of all tensors but the sparse layers' own."""
    kinds = SparseModule | Superposed | ScoreLayer
    sparse = [m for m in model.modules() if isinstance(m, kinds)]
    statistics = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name, _ in module.named_buffers(recurse=False)
    }
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    constants = {}
    for name, tensor in _other_tensors(model, sparse).items():
        constant = next((v for v in (0, 1) if bool((tensor == v).all())), None)
        if name in statistics:
            groups["normalisation"][name] = tensor
        elif constant is not None:
            constants[name] = constant
        else:
            groups["not_weight_free"][name] = tensor
    return groups, constants


def _other_tensors(model: nn.Module, layers: list[nn.Module]) -> dict[str, Tensor]:
    """The model's state_dict without what ``layers`` hold of it, except their biases."""
    owned = {
        f"{prefix}.{key}"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if any(module is layer for layer in layers)
        for key in module.state_dict(keep_vars=True)
        if key != "bias"
    }
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TicketError(f"{name}: a ticket stores tensors, got {type(value).__name__}")
    return {name: tensor for name, tensor in state.items() if name not in owned}


def _masks_sha256(planes: Mapping[str, list[PackedMask]]) -> str:
    """Over each layer's name, shape and the words of its masks, in the order of names."""
    digest = hashlib.sha256()
    for name, masks in sorted(planes.items()):
        digest.update(json.dumps([name, list(masks[0].shape)]).encode())
        for mask in masks:
            digest.update(mask.words.cpu().numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def _serialise(meta: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    try:
        text = json.dumps(meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TicketError(f"config, extra: need plain JSON values: {error}") from error
    raw = safetensors.save(tensors, {_KEY: text})
    start = _digest_position(raw, _ZEROS)
    return raw[:start] + _file_sha256(raw, start).encode() + raw[start + 64 :]


def _digest_position(raw: bytes, digest: str) -> int:
    """Where the file's own digest stands: after its key, inside a JSON string inside JSON."""
    field = rf"\"sha256\":\"{digest}".encode()
    if raw.count(field) != 1:
        raise TicketError("the metadata does not have one sha256 entry")
    return raw.index(field) + len(field) - 64


def _file_sha256(raw: bytes, start: int) -> str:
    digest = hashlib.sha256(raw[:start])
    digest.update(_ZEROS.encode())
    digest.update(raw[start + 64 :])
    return digest.hexdigest()


def _parse(raw: bytes) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, list[PackedMask]]]:
    """(metadata, tensors, masks of each layer) of a ticket file; TicketError at the first fault."""
    meta = _metadata(raw)
    # versions first: a newer format may well define its digest differently
    versions = {
        "format_version": range(1, FORMAT_VERSION + 1),
        "generator_version": [GENERATOR_VERSION],
    }
    for key, known in versions.items():
        if meta.get(key) not in known:
            listed = " and ".join(map(str, known))
            raise TicketError(
                f"{key}: got {meta.get(key)!r}, this sparseticket {__version__} reads {listed}; a "
                "newer version of the library may read the file"
            )
    start = _digest_position(raw, str(meta.get("sha256")))
    if _file_sha256(raw, start) != meta["sha256"]:
        raise TicketError("sha256 mismatch: the file is damaged; copy or fetch it again")
    try:
        tensors = safetensors.load(raw)
        masks = {name: _decode_layer(name, e, tensors) for name, e in meta["layers"].items()}
        named = {key for n, e in masks.items() for key in _payload_names(n, len(e))}
        named = named.union(*(meta[group] for group in _GROUPS))
        if tensors.keys() != named:
            raise ValueError(f"tensors: {sorted(tensors.keys() ^ named)} do not match the metadata")
    except _MALFORMED as error:
        raise TicketError(f"not a valid ticket: {error!r}") from error
    if _masks_sha256(masks) != meta.get("masks_sha256"):
        raise TicketError("masks_sha256 mismatch: the decoded masks are not those that were saved")
    return meta, tensors, masks


def _metadata(raw: bytes) -> dict[str, Any]:
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > len(raw) - 8:
        raise TicketError("not a ticket: not a safetensors file, or cut inside its header")
    try:
        metadata = json.loads(raw[8 : 8 + length]).get("__metadata__", {})
        if metadata.keys() != {_KEY}:
            raise TicketError("not a ticket: a safetensors file without sparseticket's metadata")
        meta = json.loads(metadata[_KEY])
    except (AttributeError, RecursionError, TypeError, UnicodeError, json.JSONDecodeError) as error:
        raise TicketError(f"not a ticket: its header is damaged or foreign ({error})") from error
    if not isinstance(meta, dict):
        raise TicketError("not a ticket: its metadata is no JSON object")
    return meta


def _decode_layer(name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> list[PackedMask]:
    if entry["kind"] not in _SPARSE:
        raise ValueError(f"{name}: kind: got {entry['kind']!r}, known: {', '.join(_SPARSE)}")
    first, *more = _payload_names(name, _plane_count(entry))
    shape, pattern = tuple(entry["shape"]), _pattern(entry)
    _recipe(entry)
    if pattern is None:
        masks = [_decode(entry, tensors[first], shape, entry["kept"])]
    else:
        kept = entry["kept"] - pattern.locked
        masks = [pattern.expand(_decode(entry, tensors[first], (pattern.free_count,), kept))]
    planes = entry.get("planes", {"codes": ()})
    for key, code in zip(more, planes["codes"], strict=True):
        outer = masks[-1]
        if planes["kind"] == "tasks":
            masks.append(_decode(code, tensors[key], shape, code["kept"]))
        else:
            inside = _decode(code, tensors[key], (outer.kept,), code["kept"])
            masks.append(_outside(outer, inside))
    return masks


def _decode(
    code: Mapping[str, Any], payload: Tensor, shape: tuple[int, ...], kept: int
) -> PackedMask:
    words = decode_mask(code["codec"], code["parameter"], payload, shape, kept)
    return PackedMask(words, shape)


def _pattern(entry: Mapping[str, Any]) -> FrozenPattern | None:
    if "frozen" not in entry:
        return None
    return FrozenPattern(entry["seed"], entry["layer"], tuple(entry["shape"]), *entry["frozen"])


def _recipe(entry: Mapping[str, Any]) -> WeightRecipe:
    return WeightRecipe(*(entry[field.name] for field in dataclasses.fields(WeightRecipe)))


def _check_layer(name: str, entry: Mapping[str, Any], module: nn.Module | None) -> None:
    kind = entry["kind"]
    if type(module) not in (_DENSE[kind], _SPARSE[kind]):
        found = "no such module" if module is None else f"a {type(module).__name__}"
        raise TicketError(f"{name}: the ticket has a {kind} layer, the model {found}")
    for key, value in _signature(module).items():
        if value != entry[key]:
            raise TicketError(f"{name}: {key}: the ticket has {entry[key]}, the model {value}")
