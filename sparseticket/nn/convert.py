"""Whole models in place: dense to sparse and back, form to form, with a report of what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import nn
from torch.nn.parameter import is_lazy

from sparseticket import ops

from ._sparse import SparseModule, refusal, reselect
from .attention import PROJECTIONS, SparseMultiheadAttention, close_attention_, open_attention_
from .conv1d import SparseConv1d
from .conv2d import SparseConv2d
from .conv_transpose2d import SparseConvTranspose2d
from .embedding import SparseEmbedding
from .linear import SparseLinear
from .score_layer import ScoreLayer
from .superposed import Superposed

__all__ = ["Report", "SparsityConfig", "densify_", "explain", "sparsify_", "to_form_"]

_SPARSE: dict[type[nn.Module], type[SparseModule]] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.ConvTranspose2d: SparseConvTranspose2d,
    nn.Embedding: SparseEmbedding,
}
# Owners (by class name, so that torchvision is not imported) that use children's tensors directly.
_READERS = {
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
    "ShiftedWindowAttention": ("qkv", "proj"),
    "ShiftedWindowAttentionV2": ("qkv", "proj"),
}
_RECIPE_BYTES = 40  # five int64: WeightRecipe.to_tensor
_BATCHES = (1, 128)  # of which the report tells the kernels


class SparsityConfig(Protocol):
    """What :func:`sparsify_` asks of a config.

    ``finish(model, wanted)`` is optional: called once the layers are in, to prepare the rest of the
    model where ``wanted(module, name)`` holds; it returns the names of the modules it has reset.
    ``make(name, module)`` is optional: the new layer itself, where no SparseModule will do.
    ``bind(model)`` is optional: the config to take in its place, which may know the model.
    ``qk_scale`` is optional: whether random query and key weights get SparseMultiheadAttention's
    factor head_dim^(1/4); by default they do.
    """

    def plan(self, name: str, module: nn.Module) -> Mapping[str, Any] | None:
        """Keyword arguments of ``from_dense`` for this layer, or None to leave it dense."""


@dataclass(frozen=True)
class Converted:
    """One layer of a report; ``kind`` is the new module's class and form."""

    name: str
    kind: str
    shape: tuple[int, ...]
    kept: int
    density: float


@dataclass
class Report:
    """What a conversion did; print it.

    Bytes are those of the converted layers: as dense weights and biases, as they are in memory now,
    and as packed masks and recipes only. ``not_weight_free`` names what a ticket of this model
    must store besides seed, mask and normalisation statistics, ``reset`` the norms that the config
    has set to 1 and 0.
    """

    converted: list[Converted] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)
    not_weight_free: list[str] = field(default_factory=list)
    dense_bytes: int = 0
    now_bytes: int = 0
    ticket_bytes: int = 0
    kernels: dict[int, Counter[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layer", "now", "shape", "kept", "density")]
        for c in self.converted:
            shape = "x".join(map(str, c.shape))
            rows.append((c.name, c.kind, shape, f"{c.kept:,}", f"{c.density:.4f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        if self.reset:
            lines.append(f"reset to 1 and 0, frozen: {', '.join(self.reset)}")
        if self.not_weight_free:
            lines.append(f"not weight-free: {', '.join(self.not_weight_free)}")
        lines.append(
            f"bytes: {self.dense_bytes:,} dense, {self.now_bytes:,} now, "
            f"{self.ticket_bytes:,} as seed + mask"
        )
        for batch, kernels in self.kernels.items():
            counted = ", ".join(f"{n} {kernel}" for kernel, n in kernels.items())
            lines.append(f"kernels at batch {batch}: {counted}")
        lines.append("speed: a materialised layer runs at dense speed; `make bench` measures both")
        return "\n".join(lines)


def sparsify_(
    model: nn.Module,
    config: SparsityConfig,
    filter_fn: Callable[[nn.Module, str], bool] | Iterable[str] | None = None,
) -> Report:
    """Convert the layers with weights of ``model`` in place as ``config`` plans.

    They are linear and convolution layers, ``nn.Embedding`` and the projections ``q_proj``,
    ``k_proj``, ``v_proj`` and ``out_proj`` of ``nn.MultiheadAttention``, which becomes a
    SparseMultiheadAttention where ``filter_fn`` wants one of them.

    ``filter_fn(module, name) -> bool``, or a list of globs over qualified names, limits what is
    converted, and which norms the config may reset. A layer's qualified name seeds its random
    streams. Everything is checked and built before the model changes; ValueError if nothing is to
    convert.
    """
    _check_module(model, "sparsify_")
    if not callable(getattr(config, "plan", None)):
        raise TypeError(
            f"sparsify_: config: got {config!r}, need an object with plan(name, module), such as "
            "st.EdgePopup()"
        )
    single = _SPARSE | {nn.MultiheadAttention: SparseMultiheadAttention}
    if type(model) in single or isinstance(model, SparseModule):
        raise ValueError(
            f"sparsify_: model: a single {type(model).__name__} cannot be replaced in place; use "
            f"{single.get(type(model), type(model)).__name__}.from_dense(module, ...)"
        )
    wanted = _filter(filter_fn)
    opened, closed = open_attention_(model, wanted, getattr(config, "qk_scale", True))
    try:
        return _sparsify(model, config, wanted, Report(skipped=closed), opened)
    except BaseException:
        close_attention_(model, opened)
        raise


def _sparsify(model, config, wanted, report, opened) -> Report:
    if bind := getattr(config, "bind", None):
        config = bind(model)
    replaced, names = {}, _names(model)
    reasons = _reasons(names)
    for module, (name, *_) in names.items():
        base = next((base for base in _SPARSE if isinstance(module, base)), None)
        if base is None:
            known = isinstance(module, nn.MultiheadAttention | SparseMultiheadAttention)
            if not known and any(p.ndim > 1 for p in module.parameters(recurse=False)):
                report.skipped.append((name, f"{type(module).__name__} has no sparse form yet"))
            continue
        reason = reasons.get(module) or refusal(module, base)
        if reason is None and not wanted(module, name):
            reason = "left out by filter_fn"
        plan = None if reason else config.plan(name, module)
        if plan is None:
            report.skipped.append((name, reason or "left dense by the config"))
        else:
            replaced[module] = _new_layer(config, base, name, module, plan)
    if not replaced:
        skipped = "; ".join(f"{name}: {reason}" for name, reason in report.skipped)
        raise ValueError(f"sparsify_: nothing to convert ({skipped or 'no layers with weights'})")
    sparse = (m for m in replaced.values() if isinstance(m, SparseModule))
    reselect(m for m in sparse if m.form == "scored")

    def finish() -> list[str]:
        for attention in opened:
            attention.freeze_bias_kv()
        return config.finish(model, wanted) if hasattr(config, "finish") else []

    return _commit(report, model, names, replaced, finish)


def _new_layer(config, base, name, module, plan) -> nn.Module:
    if make := getattr(config, "make", None):
        return make(name, module)
    return _SPARSE[base].from_dense(module, **{"layer": name, **plan})


def densify_(model: nn.Module) -> Report:
    """Replace every layer of ours, under search too, by its plain torch module, in place."""
    kinds = SparseModule | ScoreLayer | Superposed
    report = _convert_all(model, lambda m: m.to_dense(), "densify_", ".to_dense()", kinds)
    plain = [
        module
        for module in model.modules()
        if isinstance(module, SparseMultiheadAttention) and module is not model
        if all(type(getattr(module, name)) is nn.Linear for name in PROJECTIONS)
    ]
    close_attention_(model, {module: module.to_dense() for module in plain})
    return report


def to_form_(model: nn.Module, form: str, **options: Any) -> Report:
    """Replace every sparse module by its ``to_form(form, **options)``, in place."""
    report = _convert_all(
        model, lambda module: module.to_form(form, **options), "to_form_", f".to_form({form!r})"
    )
    for module in model.modules():
        if isinstance(module, SparseMultiheadAttention):
            module.freeze_bias_kv()
    return report


def explain(module_or_op: nn.Module | str, *args: Any, **kwargs: Any) -> ops.Choice:
    """Which kernel would run and why: ``explain(module, x)`` or ``explain("masked_linear", ...)``.

    An op is given by name with the arguments of ``torch.ops.sparseticket.<name>``.
    """
    if isinstance(module_or_op, str):
        return ops.explain_op(module_or_op, *args, **kwargs)
    if not isinstance(module_or_op, SparseModule):
        raise TypeError(
            f"explain: got {type(module_or_op).__name__}, need a sparse module and its input, or "
            "an op's name and its arguments"
        )
    return module_or_op.explain(*args, **kwargs)


def _filter(filter_fn: Any) -> Callable[[nn.Module, str], bool]:
    if filter_fn is None:
        return lambda module, name: True
    if callable(filter_fn):
        return filter_fn
    if isinstance(filter_fn, str) or not isinstance(filter_fn, Iterable):
        raise TypeError(
            f"filter_fn: got {filter_fn!r}, need a function (module, name) -> bool or a list of "
            "name globs"
        )
    globs = list(filter_fn)
    return lambda module, name: any(fnmatchcase(name, glob) for glob in globs)


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its qualified names, the first one first."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _reasons(names: dict[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Modules that must stay as they are because of others: their owners, or tied weights."""
    reasons = {}
    for owner in names:
        if isinstance(getattr(owner, "self_attn", None), SparseMultiheadAttention):
            continue  # without torch's attention there is no fast path
        for kind in {base.__name__ for base in type(owner).__mro__} & set(_READERS):
            for child in _READERS[kind]:
                if isinstance(getattr(owner, child, None), nn.Module):
                    reasons[getattr(owner, child)] = f"{kind} reads its .weight directly"
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in names:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    for sharing in owners.values():
        for module in sharing if len(sharing) > 1 else ():
            others = ", ".join(names[m][0] for m in sharing if m is not module)
            reasons[module] = f"shares a parameter with {others}"
    return reasons


def _check_module(model: Any, verb: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model: got {type(model).__name__}, need an nn.Module")


def _convert_all(model, make, verb, alternative, kinds=SparseModule) -> Report:
    _check_module(model, verb)
    if isinstance(model, kinds):
        raise ValueError(
            f"{verb}: model: a single module cannot be replaced in place; use {alternative}"
        )
    names = _names(model)
    replaced = {module: make(module) for module in names if isinstance(module, kinds)}
    if not replaced:
        raise ValueError(f"{verb}: model: no sparse modules in it")
    return _commit(Report(), model, names, replaced)


def _commit(report, model, names, replaced, finish=None) -> Report:
    """Put the new modules in, ``finish`` and report; the old ones are back if that raises."""
    _replace(model, names, replaced)
    try:
        if finish:
            report.reset = list(finish() or ())
        return _fill(report, model, names, replaced)
    except BaseException:
        _replace(model, names, {old: old for old in replaced})
        raise


def _replace(model, names, replaced) -> None:
    for old, new in replaced.items():
        for name in names[old]:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)


def _fill(report, model, names, replaced) -> Report:
    for old, new in replaced.items():
        sparse = new if isinstance(new, SparseModule | ScoreLayer) else old
        mask = sparse.mask
        kind = f"{type(new).__name__} {new.form}" if new is sparse else type(new).__name__
        report.converted.append(Converted(names[old][0], kind, mask.shape, mask.kept, mask.density))
        size = mask.numel + (0 if new.bias is None else new.bias.numel())
        report.dense_bytes += size * sparse.dtype.itemsize
        report.now_bytes += sum(t.nbytes for t in (*new.parameters(), *new.buffers()))
        report.ticket_bytes += mask.words.nbytes + _RECIPE_BYTES
    sparse = [m for m in replaced.values() if isinstance(m, SparseModule)]
    for batch in _BATCHES if sparse else ():
        report.kernels[batch] = Counter(m.explain(m.example(batch)).kernel for m in sparse)
    if any(getattr(m, "form", None) in ("scored", "ticket") for m in replaced.values()):
        report.not_weight_free = [
            name
            for owner, (prefix, *_) in _names(model).items()
            for name, p in owner.named_parameters(prefix, recurse=False)
            if _must_be_stored(owner, name.rpartition(".")[2], p)
        ]
    return report


def _must_be_stored(owner, name, parameter) -> bool:
    """Whether a ticket cannot remake the parameter from seed, mask, or the constants 0 and 1."""
    if isinstance(owner, ScoreLayer):
        return False
    if isinstance(owner, SparseModule) and owner.form in ("scored", "ticket"):
        return name == "bias" and owner.options.keep_bias
    if parameter.requires_grad or is_lazy(parameter) or parameter.is_meta:
        return True
    return not any(bool((parameter == value).all()) for value in (0, 1))
