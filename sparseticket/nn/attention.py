"""``nn.MultiheadAttention`` whose four projections are layers of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from sparseticket.masks import PackedMask

from ._sparse import SparseModule, _given_mask, _options, has_hooks
from .linear import SparseLinear

__all__ = ["PROJECTIONS", "SparseMultiheadAttention", "close_attention_", "open_attention_"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_SCALED = ("q_proj", "k_proj")
_SETTINGS = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
_FROM_SEED = ("scored", "ticket")
_EVERYTHING = slice(None)


class SparseMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` under masks: torch's constructor, call and result.

    ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are :class:`~sparseticket.nn.SparseLinear`
    layers (torch packs the first three), each with the random streams of its own name: ``layer``
    and the projection's, joined by a dot. Keyword-only: the arguments of SparseLinear for all four;
    ``mask`` maps names of projections to theirs.

    ``qk_scale`` multiplies the random query and key weights by head_dim^(1/4), as in Otsuka et al.,
    "The strong lottery ticket hypothesis for multi-head attention mechanisms" (AAAI 2026), so
    that attention logits keep their size under torch's 1/sqrt(head_dim). None: where weights are
    drawn from the seed. The factor goes into sigma, before it is rounded.

    In forms ``scored`` and ``ticket`` biases, ``bias_k`` and ``bias_v`` are frozen zeros, unless
    ``keep_bias``. A state_dict of ``nn.MultiheadAttention`` loads strictly into form ``masked``.
    It is no subclass of ``nn.MultiheadAttention``: nobody must read packed weights of it, and
    ``nn.TransformerEncoderLayer`` never takes its fast path with it. ValueError for what torch
    refuses with an assertion, and for nested tensors.
    """

    # What nn.TransformerEncoderLayer and nn.TransformerEncoder ask before they take a fast path.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        qk_scale: bool | None = None,
        layer: str = "",
        seed: int | None = None,
        density: float | None = None,
        mask: Mapping[str, PackedMask | torch.Tensor] | None = None,
        **ours: Any,
    ) -> None:
        if min(embed_dim, num_heads) <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"SparseMultiheadAttention: embed_dim, num_heads: got {embed_dim}, {num_heads}, "
                "need positive numbers, the first divisible by the second"
            )
        like = nn.MultiheadAttention(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        name = type(self).__name__
        options = _options(name, ours | {"density": 1.0 if density is None else density})
        drawn = options.weights is not None
        if qk_scale and not drawn:
            raise ValueError(
                f"{name}: qk_scale=True needs weights drawn from the seed; also give weights="
            )
        seed = _seed(seed)

        def project(key: str, linear: nn.Linear) -> SparseLinear:
            given, own = (mask or {}).get(key), options
            if given is not None:
                given, own = _given_mask(given, density, options, linear.weight.shape)
            own = replace(own, gain=own.gain * linear.gain) if drawn else own
            return SparseLinear._made_like(linear, own, seed, _join(layer, key), given)

        self._open(like, drawn if qk_scale is None else qk_scale)
        self._convert(project)

    @classmethod
    def from_dense(
        cls,
        module: nn.MultiheadAttention,
        *,
        qk_scale: bool = True,
        layer: str = "",
        seed: int | None = None,
        mask: Mapping[str, PackedMask | torch.Tensor] | None = None,
        **ours: Any,
    ) -> Self:
        """A new sparse module like ``module``: SparseLinear.from_dense of its projections.

        TypeError for anything but a plain ``nn.MultiheadAttention``.
        """
        if reason := _refusal(module):
            raise TypeError(f"{cls.__name__}.from_dense: module: {reason}")
        seed, given = _seed(seed), mask or {}

        def project(key: str, linear: nn.Linear) -> SparseLinear:
            place = {"seed": seed, "layer": _join(layer, key), "mask": given.get(key)}
            return SparseLinear.from_dense(linear, **place, **ours)

        self = cls._opened(module, qk_scale)
        self._convert(project)
        return self

    @classmethod
    def _opened(cls, module: nn.MultiheadAttention, qk_scale: bool) -> Self:
        self = cls.__new__(cls)
        self._open(module, qk_scale)
        return self

    def _open(self, like: nn.MultiheadAttention, qk_scale: bool) -> None:
        """Take over ``like``, its projections as plain nn.Linear."""
        nn.Module.__init__(self)
        for name in _SETTINGS:
            setattr(self, name, getattr(like, name))
        self.head_dim = like.head_dim
        self.training = like.training
        for name, linear in _split(like).items():
            linear.gain = like.head_dim**0.25 if qk_scale and name in _SCALED else 1.0
            self.add_module(name, linear)
        for name in ("bias_k", "bias_v"):
            bias = getattr(like, name)
            self.register_parameter(name, None if bias is None else _copy(bias))

    def _convert(self, project: Callable[[str, nn.Linear], nn.Module]) -> None:
        for name in PROJECTIONS:
            self.add_module(name, project(name, getattr(self, name)))
        self.freeze_bias_kv()

    @torch.no_grad()
    def freeze_bias_kv(self) -> None:
        """``bias_k`` and ``bias_v`` are what the key projection's form makes of biases."""
        form, options = (getattr(self.k_proj, name, None) for name in ("form", "options"))
        if self.bias_k is None or form not in _FROM_SEED:
            return
        for bias in (self.bias_k, self.bias_v):
            if not getattr(options, "keep_bias", False):
                bias.zero_()
                bias.requires_grad_(False)
            elif form == "ticket":
                bias.requires_grad_(False)

    # Call -----------------------------------------------------------------------------------

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(output, attention weights or None)``, arguments and shapes as in torch.

        As there, ``is_causal`` is a hint that needs ``attn_mask``, which is not read where the hint
        is enough: without ``key_padding_mask`` and ``need_weights``.
        """
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        inputs = (query, key, value)
        batched = query.dim() == 3
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        hinted = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._heads(*inputs)
        extra = k.shape[2] - inputs[1].shape[1]
        mask = None if hinted else self._merged(attn_mask, key_padding_mask, query.dtype, extra)
        if need_weights:
            y, weights = self._attend(q, k, v, mask)
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
            weights = None
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), weights
        return y if self.batch_first else y.transpose(0, 1), weights

    def _heads(self, query, key, value) -> list[torch.Tensor]:
        """Projections of ``[N, L, *]`` as ``[N, heads, L, head_dim]``, with the extra keys."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None:
            k, v = (
                torch.cat([x, bias.to(x.dtype).expand(len(x), 1, -1)], dim=1)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]

    def _merged(self, attn_mask, key_padding_mask, dtype, extra) -> torch.Tensor | None:
        """One additive mask that broadcasts over ``[N, heads, L, S + extra]``, or None."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, dtype, extra)
            mask = mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask
        if key_padding_mask is None:
            return mask
        padding = _additive(key_padding_mask, dtype, extra)[:, None, None]
        return padding if mask is None else mask + padding

    def _attend(self, q, k, v, mask) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        weights = torch.softmax(logits if mask is None else logits + mask, dim=-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights @ v, weights

    def _check(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> None:
        def refuse(argument: str, got: Any, need: str) -> None:
            raise ValueError(f"{type(self).__name__}: {argument}: got {got}, need {need}")

        if query.dim() not in (2, 3) or query.is_nested:
            refuse("query", f"shape {tuple(query.shape)}", "[L, E] or a batch of them")
        ndim = query.dim()
        sequence = 1 if ndim == 3 and self.batch_first else 0
        for name, x in (("key", key), ("value", value)):
            if x.dim() != ndim or x.shape[:-1] != key.shape[:-1]:
                need = f"{ndim} dimensions, and those before the last as the key's"
                refuse(name, f"shape {tuple(x.shape)}", need)
        batch = query.shape[1 - sequence] if ndim == 3 else 1
        if ndim == 3 and key.shape[1 - sequence] != batch:
            refuse("key", f"shape {tuple(key.shape)}", f"a batch of {batch}, the query's")
        length, source = query.shape[sequence], key.shape[sequence]
        accepted = {
            "attn_mask": ((length, source), (batch * self.num_heads, length, source)),
            "key_padding_mask": ((batch, source) if ndim == 3 else (source,),),
        }
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(
                    f"{type(self).__name__}: {name}: got {mask.dtype}, need bool or floating-point"
                )
            if tuple(mask.shape) not in accepted[name]:
                need = " or ".join(map(str, accepted[name]))
                refuse(name, f"shape {tuple(mask.shape)}", need)
        if is_causal and attn_mask is None:
            refuse("attn_mask", "None with is_causal=True", "the causal mask that it hints at")

    # State and conversion -------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        """Packed weights of a dense checkpoint become those of the projections."""
        for name, old, part in _packed(self.embed_dim, f"{prefix}in_proj_weight" in state_dict):
            if (prefix + old) in state_dict:
                state_dict[prefix + name] = state_dict[prefix + old][part]
        for old in ("in_proj_weight", "in_proj_bias", *(f"{n}_weight" for n in PROJECTIONS[:3])):
            state_dict.pop(prefix + old, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def to_form(self, form: str, **options: Any) -> Self:
        """A new module whose projections are ``to_form(form, **options)`` of these."""
        new = type(self).__new__(type(self))
        nn.Module.__init__(new)
        for name in (*_SETTINGS, "head_dim", "training"):
            setattr(new, name, getattr(self, name))
        for name in PROJECTIONS:
            new.add_module(name, getattr(self, name).to_form(form, **options))
        for name in ("bias_k", "bias_v"):
            bias = getattr(self, name)
            new.register_parameter(name, None if bias is None else _copy(bias))
        new.freeze_bias_kv()
        return new

    def to_dense(self) -> nn.MultiheadAttention:
        """The plain ``nn.MultiheadAttention`` with the masked weights, trainable."""
        layers = {name: _dense(name, getattr(self, name)) for name in PROJECTIONS}
        bias = self.out_proj.bias is not None
        dense = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias,
            self.bias_k is not None,
            self.add_zero_attn,
            self.kdim,
            self.vdim,
            self.batch_first,
            device="meta",
        )
        values = {
            f"{name}.{key}": p for name, m in layers.items() for key, p in m.named_parameters()
        }
        values |= {n: b for n in ("bias_k", "bias_v") if (b := getattr(self, n)) is not None}
        parts: dict[str, list[torch.Tensor]] = {}
        for name, old, _ in _packed(self.embed_dim, dense._qkv_same_embed_dim):
            if name in values:
                parts.setdefault(old, []).append(values.pop(name))
        values |= {old: torch.cat(tensors) for old, tensors in parts.items()}
        for name, value in values.items():
            owner, _, key = name.rpartition(".")
            setattr(dense.get_submodule(owner), key, nn.Parameter(value.detach().clone()))
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def open_attention_(
    model: nn.Module, wanted: Callable[[nn.Module, str], bool], qk_scale: bool = True
) -> tuple[dict[nn.Module, nn.Module], list[tuple[str, str]]]:
    """Give every nn.MultiheadAttention in ``model`` a projection of which is ``wanted(module,
    name)`` four plain nn.Linear, which can then be converted like any other.

    Returns ({new module: old one}, [(name, why it stayed closed)]). The result computes the same.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    opened, closed = {}, []
    for module, (name, *_) in names.items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        reason = _refusal(module) or _shared(module, names)
        if reason is None:
            new = SparseMultiheadAttention._opened(module, qk_scale)
            if any(wanted(getattr(new, key), _join(name, key)) for key in PROJECTIONS):
                opened[new] = module
                continue
            reason = "left out by filter_fn"
        closed.append((name, reason))
    for new, old in opened.items():
        _put(model, names[old], new)
    return opened, closed


def close_attention_(model: nn.Module, opened: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others: the undoing of :func:`open_attention_`."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for new, old in opened.items():
        _put(model, names[new], old)


def _put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, module)


def _refusal(module: nn.Module) -> str | None:
    """Why ``module`` cannot be opened; None if it can."""
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} is not exactly nn.MultiheadAttention"
    packed = "in_proj_weight" if module._qkv_same_embed_dim else "q_proj_weight"
    if not isinstance(module._parameters.get(packed), nn.Parameter):
        return "its weights are computed by hooks (parametrizations, prune)"
    if has_hooks(module) or has_hooks(module.out_proj):
        return "it carries hooks, which would be lost"
    if module._parameters[packed].is_meta:
        return "it is on the meta device; materialise it first"
    return None


def _shared(module: nn.Module, names: Mapping[nn.Module, list[str]]) -> str | None:
    own = {id(p) for p in module.parameters()}
    inside = set(module.modules())
    for other, (name, *_) in names.items():
        if other not in inside and any(id(p) in own for p in other.parameters(recurse=False)):
            return f"shares a parameter with {name}"
    return None


def _packed(embed_dim: int, same: bool) -> list[tuple[str, str, slice]]:
    """(parameter of a projection, where nn.MultiheadAttention has it, which rows there)."""
    rows = [slice(i * embed_dim, (i + 1) * embed_dim) for i in range(3)]
    table = []
    for name, part in zip(PROJECTIONS, rows, strict=False):
        weight = ("in_proj_weight", part) if same else (f"{name}_weight", _EVERYTHING)
        table += [(f"{name}.weight", *weight), (f"{name}.bias", "in_proj_bias", part)]
    return table


def _split(like: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """The projections as plain layers with copies of the parameters."""
    linears = {}
    for name in PROJECTIONS[:3]:
        linears[name] = nn.Linear(1, 1, like.in_proj_bias is not None, device="meta")
    linears["out_proj"] = nn.Linear(1, 1, like.out_proj.bias is not None, device="meta")
    linears["out_proj"].weight = _copy(like.out_proj.weight)
    if like.out_proj.bias is not None:
        linears["out_proj"].bias = _copy(like.out_proj.bias)
    for name, old, part in _packed(like.embed_dim, like._qkv_same_embed_dim):
        if (packed := getattr(like, old)) is not None:
            layer, _, key = name.rpartition(".")
            setattr(linears[layer], key, _copy(packed, part))
    for linear in linears.values():
        linear.out_features, linear.in_features = linear.weight.shape
        linear.train(like.training)
    return linears


def _copy(parameter: nn.Parameter, part: slice = _EVERYTHING) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[part].clone(), parameter.requires_grad)


def _dense(name: str, layer: nn.Module) -> nn.Linear:
    if isinstance(layer, SparseModule):
        return layer.to_dense()
    if type(layer) is nn.Linear:
        return layer
    raise TypeError(
        f"SparseMultiheadAttention.to_dense: {name}: a {type(layer).__name__} has no dense form; "
        "turn it into a ticket first"
    )


def _additive(mask: torch.Tensor, dtype: torch.dtype, extra: int) -> torch.Tensor:
    """What is added to the logits, 0 for the ``extra`` keys at the end."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return F.pad(mask, (0, extra)) if extra else mask


def _seed(seed: int | None) -> int:
    """One seed for all projections; their names make their streams different."""
    return int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed


def _join(layer: str, name: str) -> str:
    if not isinstance(layer, str):
        raise TypeError(f"SparseMultiheadAttention: layer: got {layer!r}, need a module name")
    return f"{layer}.{name}" if layer else name
