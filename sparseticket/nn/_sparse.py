"""What every sparse module shares: options, forms, freshness of masks, state, conversion.

A concrete module adds its torch base class, its ops and the shape of its call
(:mod:`~sparseticket.nn.linear`, :mod:`~sparseticket.nn.conv2d`, :mod:`~sparseticket.nn.conv1d`).
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from sparseticket import ops
from sparseticket.formats import canonical_shape, check_density, kept_count
from sparseticket.masks import (
    PackedMask,
    as_mask,
    check_packed,
    layer_number,
    random_mask,
    select_mask,
)
from sparseticket.prng import DISTRIBUTIONS

from .frozen import FrozenPattern
from .plain import plain_layer
from .recipe import INITS, WeightRecipe

__all__ = [
    "Options",
    "SparseModule",
    "attach",
    "gain_of",
    "has_hooks",
    "keep_dtype",
    "refusal",
    "Selection",
    "reselect",
    "selections",
    "update_masks",
]

FORMS = ("masked", "scored", "ticket", "compressed")
_TRAINED = ("masked", "compressed")  # forms whose weights are trained
_DENSE = ("masked", "scored")  # forms that hold a dense weight
_CHOICES = {
    "form": FORMS,
    "weights": (None, *DISTRIBUTIONS),
    "init": INITS,
    "scale": ("none", "density", "dynamic"),
    "transform": ("abs", "identity"),
    "scope": ("layer", "global"),
    "score_init": ("uniform", "normal"),
}
_FORMS_OF = {  # options that say something about some forms only
    "transform": ("scored",),
    "scope": ("scored",),
    "min_keep_per_layer": ("scored",),
    "score_init": ("scored",),
    "keep_bias": ("scored", "ticket"),
    "codes": ("ticket",),
}
_FLAGS = ("keep_bias", "codes")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def update_masks(model: nn.Module) -> None:
    """Select the masks of every scored module in ``model`` anew from its scores, in place.

    Layer-wise scopes each on their own, all ``scope="global"`` modules together. With
    ``scale="dynamic"`` weights follow their layer's density. ValueError for NaN scores (CPU) and
    for global modules that disagree on density, transform or ``min_keep_per_layer``; then nothing
    has changed.
    """
    reselect(m for m in model.modules() if isinstance(m, SparseModule) and m.form == "scored")


@dataclass(frozen=True)
class Selection:
    """Modules whose masks are selected together, and the arguments of the ops that do it."""

    modules: list[SparseModule]
    kept: list[int]
    scope: str
    transform: str
    min_keep: int


@torch.no_grad()
def reselect(modules: Iterable[SparseModule]) -> None:
    """:func:`update_masks` of these scored modules."""
    chosen: list[tuple[list[SparseModule], list[torch.Tensor]]] = []
    for s in selections(modules):
        scores = [m.scores for m in s.modules]
        words, _ = ops.select_mask(scores, s.kept, None, None, s.scope, s.transform, s.min_keep)
        chosen.append((s.modules, words))
    for group, words in chosen:
        for module, new in zip(group, words, strict=True):
            module.mask_words.copy_(new)
            module._selection_taken()


def selections(modules: Iterable[SparseModule]) -> list[Selection]:
    """How the masks of scored modules are selected: every layer by itself or the global ones
    together, one op call for all that agree on device and transform."""
    groups = defaultdict(list)
    for m in modules:
        o = m.options
        apart = m._held("scores").device if o.scope == "layer" else o.density
        groups[o.scope, o.transform, o.min_keep_per_layer, apart].append(m)
    rules = [key[1:] for key in groups if key[0] == "global"]
    if len(rules) > 1:
        raise ValueError(
            "update_masks: scope='global' modules are selected together and need one transform, "
            f"min_keep_per_layer and density, got {rules}"
        )
    return [Selection(group, _kept(group), *key[:3]) for key, group in groups.items()]


def _kept(group: list[SparseModule]) -> list[int]:
    options, sizes = group[0].options, [m._held("scores").numel() for m in group]
    if options.scope == "global":
        return [kept_count(options.density, sum(sizes))]
    return [kept_count(m.options.density, n) for m, n in zip(group, sizes, strict=True)]


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
    """Run :func:`update_masks` now and after every ``optimizer.step()``; returns the handle to
    undo the latter. Now, because what stands between conversion and training may write the scores:
    DistributedDataParallel broadcasts them.

    The surest way: a forward pass on stale masks raises, but it cannot see the steps of optimizers
    with ``fused=True``, which write the scores without counting a new version of the tensor.
    """
    if ruled := [m for m in model.modules() if hasattr(m, "rule")]:
        raise ValueError(
            f"attach: model: its masks are those of {type(ruled[0].rule).__name__}, which "
            "selects them itself; use config.attach(model, optimizer)"
        )
    scores = {id(m.scores) for m in model.modules() if getattr(m, "form", None) == "scored"}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not scores & held:
        raise ValueError(
            "attach: optimizer: it holds no scores of this model; convert the model first, then "
            "build the optimizer from its parameters that require gradients"
        )
    update_masks(model)
    return optimizer.register_step_post_hook(lambda *_: update_masks(model))


def has_hooks(module: nn.Module) -> bool:
    return any(value and name.endswith("_hooks") for name, value in vars(module).items())


def gain_of(module: nn.Module) -> float:
    """What the deviation of a module's random weights is multiplied by: its attribute ``gain``,
    which SparseMultiheadAttention sets on the query and key projections; else 1."""
    return getattr(module, "gain", 1.0)


def refusal(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Why ``module`` cannot become the sparse form of ``base``; None if it can."""
    if isinstance(module, SparseModule):
        return f"already sparse ({module.form})"
    if type(module) is not base:
        return f"{type(module).__name__} is not exactly nn.{base.__name__}"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by hooks (weight_norm, spectral_norm, prune)"
    if has_hooks(module) or module._buffers or module._modules:
        return "it carries hooks, buffers or children, which would be lost"
    if module.weight.is_meta:
        return "it is on the meta device; materialise it first"
    if module.weight.dtype not in _DTYPES:
        return f"its dtype {module.weight.dtype} is not supported"
    if getattr(module, "max_norm", None) is not None:
        return "its max_norm would rewrite the weight in every forward pass"
    return None


@dataclass(frozen=True)
class Options:
    """Keyword arguments of every sparse module besides ``mask``, ``seed`` and ``layer``.

    form: ``masked`` (trainable weights), ``scored`` (frozen random weights, trainable scores),
        ``ticket`` (seed and mask only, for inference) or ``compressed`` (trainable ``values`` of
        the live positions only, under a mask that does not change).
    density: kept fraction, in [0, 1].
    weights: ``signed_constant``, ``uniform``, ``normal`` or ``constant`` (no signs), drawn from
        the seed with the deviation of ``init``; None is torch's own initialisation (``masked`` and
        ``compressed`` only, their default).
    init: deviation of those weights: ``kaiming`` sqrt(2 / fan_in), ``xavier`` sqrt(2 / (fan_in +
        fan_out)), ``torch`` sqrt(1 / (3 fan_in)), that of torch's own layers.
    gain: a factor of that deviation, > 0.
    scale: divide that deviation by sqrt of ``density``, of the layer's own density (``dynamic``,
        followed by update_masks), or by nothing (``none``).
    scope, transform, min_keep_per_layer: how ``scored`` selects, see select_mask.
    score_init: ``uniform`` in +-1/sqrt(fan_in), or ``normal`` with deviation sqrt(2/fan_in).
    keep_bias: ``scored`` and ``ticket`` keep a bias (trainable in ``scored``) instead of zeros.
    codes: ``ticket`` keeps what its kernels would make of mask and seed at every call: lookup
        codes, two more bits per weight (linear), or sign words, one more (convolutions).
    """

    form: str = "masked"
    density: float = 1.0
    weights: str | None = None
    init: str = "kaiming"
    gain: float = 1.0
    scale: str = "none"
    transform: str = "abs"
    scope: str = "layer"
    min_keep_per_layer: int = 0
    score_init: str = "uniform"
    keep_bias: bool = False
    codes: bool = False

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            if (value := getattr(self, name)) not in accepted:
                listed = ", ".join(str(a) for a in accepted)
                raise ValueError(f"{name}: got {value!r}, accepted: {listed}")
        object.__setattr__(self, "density", check_density(self.density))
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: got {value!r}, need True or False")
        least = self.min_keep_per_layer
        if isinstance(least, bool) or not isinstance(least, int):
            raise TypeError(f"min_keep_per_layer: got {least!r}, need an integer")
        for field in fields(self):
            forms = _FORMS_OF.get(field.name, FORMS)
            if self.form not in forms and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)!r} means nothing in form "
                    f"{self.form!r}; it belongs to {' and '.join(forms)}"
                )
        if self.weights is None and self.form not in _TRAINED:
            object.__setattr__(self, "weights", "signed_constant")
        if not (isinstance(self.gain, int | float) and 0 < self.gain < math.inf):
            raise ValueError(f"gain: got {self.gain!r}, need a finite number > 0")
        for name in ("init", "gain", "scale"):
            if self.weights is None and getattr(self, name) != getattr(Options, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs weights drawn from the seed; also give "
                    "weights="
                )
        if self.min_keep_per_layer < 0 or (self.min_keep_per_layer and self.scope != "global"):
            raise ValueError(
                f"min_keep_per_layer: got {self.min_keep_per_layer} with scope={self.scope!r}, "
                "need 0, or with scope='global' a number >= 0"
            )
        if self.codes and self.weights != "signed_constant":
            raise ValueError(f"codes=True needs signed_constant weights, not {self.weights}")


def _options(where: str, given: dict[str, Any]) -> Options:
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            raise TypeError(
                f"{where}: got an unexpected keyword argument {name!r}; besides torch's own and "
                f"mask, seed, layer it takes {', '.join(known)}"
            )
    return Options(**given)


def _recipe(options: Options, seed: int, layer: int, mask: PackedMask) -> WeightRecipe:
    given = (options.weights, mask.shape, options.init, options.gain)
    recipe = WeightRecipe.initial(seed, layer, *given)
    if options.scale == "none":
        return recipe
    return recipe.scaled(options.density if options.scale == "density" else mask.density)


def _draw_scores(options, seed, layer, mask, like, device) -> torch.Tensor:
    """Initial scores laid out as the weight ``like``, float32; lifted so that ``mask`` is selected.

    ``mask=None`` leaves them as drawn.
    """
    fan_in = max(canonical_shape(like.shape)[1], 1)
    sigma = math.sqrt((1 / 3 if options.score_init == "uniform" else 2) / fan_in)
    recipe = WeightRecipe(seed, layer, options.score_init, sigma, sigma)
    scores = ops.regenerate(*recipe.arguments(like.shape), stream="score", device=device)
    if mask is not None and scores.numel():
        lift = 1.01 * scores.abs().max()  # beyond every magnitude, so that no tie can cross
        lift = lift * scores.sign() if options.transform == "abs" else 2 * lift
        scores = torch.where(mask.to_dense().to(device), scores + lift, scores)
    return _laid_out_like(like, scores)


def _laid_out_like(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _parameter(values: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad)


class SparseModule(nn.Module):
    """Mixin before a torch layer; see :class:`Options` for the keyword arguments.

    state_dict keys: ``weight`` (masked, scored), ``bias``, ``scores`` (scored), ``values``
    (compressed: 1-D, in row-major order of the live [O, K] positions), ``mask_words`` (int32, see
    PackedMask) and ``seed`` (see WeightRecipe.to_tensor; absent if the weights came from no seed).
    A dense checkpoint loads strictly into ``masked`` and keeps the mask.
    Saving raises RuntimeError while the mask is not yet that of the scores.

    ``weight`` of a ticket or compressed module is made anew, masked, at every access: a copy,
    writing to it changes nothing. ``compressed`` also has two buffers that are derived from the
    mask and not saved, ``pattern`` and, from its first eager training forward on, ``pattern_t``.
    """

    _BASE: ClassVar[type[nn.Module]]
    _OPS: ClassVar[dict[str, Callable]]
    _AFTER_RAW: ClassVar[tuple] = ()  # what the masked op takes between dense_grad and shadow
    options: Options
    recipe: WeightRecipe | None
    weight_shape: tuple[int, ...]
    # The optimizer that wants the gradient of W*mask in place of the scores' or of the masked
    # gradient of the weight (sparseticket.optim).
    _raw_grad_for: object | None = None
    # What a search never touched; only a ticket file asks.
    frozen_pattern: FrozenPattern | None = None
    _shadow_at: tuple | None = None  # versions of weight and mask when the shadow was written
    _shadow_owner: object | None = None  # the optimizer that keeps it up, if one does

    # Construction -----------------------------------------------------------------------------

    def _construct(
        self,
        make: Callable[..., nn.Module],
        device: Any,
        *,
        mask: PackedMask | torch.Tensor | None = None,
        density: float | None = None,
        seed: int | None = None,
        layer: str | int = "",
        **options: Any,
    ) -> None:
        """The public constructor. ``make(device=...)`` builds the torch module to be like."""
        options["density"] = 1.0 if density is None else density
        options = _options(type(self).__name__, options)
        device = torch.get_default_device() if device is None else torch.device(device)
        own_init = options.form in _TRAINED or options.keep_bias
        like = make(device=device if own_init else "meta")
        if mask is not None:
            mask, options = _given_mask(mask, density, options, like.weight.shape)
        self._from_seed(like, options, seed, layer, mask, device)

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        *,
        mask: PackedMask | torch.Tensor | None = None,
        density: float | None = None,
        form: str = "masked",
        seed: int | None = None,
        layer: str | int = "",
        **options: Any,
    ) -> Self:
        """A new sparse module like ``module``, on its device, in its dtype and training mode.

        ``masked`` and ``compressed`` copy the weights and keep ``mask``, or the largest magnitudes
        at ``density``, or everything. ``scored`` and ``ticket`` draw new weights from ``seed`` and
        ``layer``, and a zero bias unless ``keep_bias``. TypeError for anything but a plain
        torch layer of this kind.
        """
        if reason := refusal(module, cls._BASE):
            raise TypeError(f"{cls.__name__}.from_dense: module: {reason}")
        options |= {"form": form, "density": 1.0 if density is None else density}
        if form not in _TRAINED:
            options.setdefault("gain", gain_of(module))
        options = _options(f"{cls.__name__}.from_dense", options)
        if form in _TRAINED and options.weights is not None:
            raise ValueError(
                f"{cls.__name__}.from_dense: weights={options.weights!r}: form={form!r} keeps "
                "the module's weights"
            )
        weight = module.weight.detach()
        if mask is not None:
            mask, options = _given_mask(mask, density, options, weight.shape)
        elif form in _TRAINED:
            ranked = weight.float() if weight.dtype == torch.float64 else weight
            mask = select_mask(ranked, density=options.density)
        return cls._made_like(module, options, seed, layer, mask)

    @classmethod
    def _made_like(cls, module, options, seed, layer, mask) -> Self:
        """A new sparse module like ``module``, made as the public constructor makes it."""
        self = cls.__new__(cls)
        self._from_seed(module, options, seed, layer, mask, module.weight.device)
        return self

    def _from_seed(self, like, options, seed, layer, mask, device) -> None:
        """Draw from the seed what the form needs and ``like`` or ``mask`` do not give."""
        shape, dtype = tuple(like.weight.shape), like.weight.dtype
        if dtype not in _DTYPES:
            accepted = ", ".join(map(str, _DTYPES))
            raise TypeError(f"{type(self).__name__}: dtype: got {dtype}, accepted: {accepted}")
        if seed is None:
            unused = mask is not None and options.weights is None
            seed = 0 if unused else int(torch.randint(2**63 - 1, (), device="cpu"))
        layer, scores = layer_number(layer), None
        if options.form == "scored":
            scores = _draw_scores(options, seed, layer, mask, like.weight, device)
            if mask is None:
                mask = select_mask(scores, density=options.density, transform=options.transform)
        elif mask is None:
            mask = random_mask(seed, layer, shape, kept_count(options.density, math.prod(shape)))
        recipe, weight, bias = None, None, getattr(like, "bias", None)
        if options.weights is None:
            weight = _parameter(like.weight, like.weight.requires_grad)
        else:
            recipe = _recipe(options, seed, layer, mask)
            if options.form != "ticket":
                drawn = self._remake(like, recipe, shape, dtype, device)
                drawn = _laid_out_like(like.weight, drawn)
                weight = _parameter(drawn, options.form in _TRAINED)
        if bias is not None:
            kept = options.form in _TRAINED or options.keep_bias
            learned = kept and options.form != "ticket" and bias.requires_grad
            bias = _parameter(bias if kept else torch.zeros_like(bias, device=device), learned)
        self._assemble(like, options, recipe, mask.to(device), scores, weight, bias, dtype)

    def _assemble(self, like, options, recipe, mask, scores, weight, bias, dtype) -> None:
        """Set every attribute, parameter and buffer, on the device of ``mask``."""
        nn.Module.__init__(self)
        for name, value in vars(like).items():  # what the torch constructor sets, less tensors
            vars(self).setdefault(name, value)
        self.training = like.training
        self.options, self.recipe, self.weight_shape = options, recipe, mask.shape
        if options.form == "ticket":
            # Carries dtype and device through to(); a ticket may own no other float tensor.
            self.register_buffer("_like", mask.words.new_empty(0, dtype=dtype), persistent=False)
        elif options.form == "compressed":
            live = ops.gather_live(weight.detach(), mask.words, mask.kept)
            self.register_parameter("values", nn.Parameter(live, weight.requires_grad))
        else:
            self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        if options.form == "scored":
            self.scores = nn.Parameter(scores)
        self.register_buffer("mask_words", mask.words.clone())
        self.register_buffer("codes", self._derived() if options.codes else None, persistent=False)
        if options.form == "compressed":
            self._set_pattern()
        self._set_fresh(True)
        self._set_drawn(True)

    def _derived(self) -> torch.Tensor:
        """What ``codes=True`` keeps, from the mask and the seed."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise again: torch's own way, or weights, scores and selection from the seed."""
        if self.recipe is None:
            return self._reset_as_torch()
        if self.form == "compressed":
            self.values.copy_(self._live(self._full_weight()))
        elif self.form != "ticket":
            self._draw_weight()
        if self.form == "scored":
            self.scores.copy_(self._new_scores(self.options, None))
            reselect([self])

    def _reset_as_torch(self) -> None:
        if self.form != "compressed":
            return super().reset_parameters()
        dense = self.to_dense()
        dense.reset_parameters()
        self.values.copy_(self._live(dense.weight))
        if self.bias is not None:
            self.bias.copy_(dense.bias)

    def _live(self, dense: torch.Tensor) -> torch.Tensor:
        """What of ``dense`` is live, as ``values`` hold it."""
        return ops.gather_live(dense, self.mask_words, self.values.numel())

    def _new_scores(self, options: Options, mask: PackedMask | None) -> torch.Tensor:
        seed, layer = self.recipe.seed, self.recipe.layer
        return _draw_scores(options, seed, layer, mask, self.weight, self.mask_words.device)

    # Call -------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        form = self.options.form
        if form == "scored":
            self._check_fresh()
            if x.device.type == "cpu" and self._torch_is_faster:
                return self._on_masked_weight(x)
        elif form == "compressed" and not torch.compiler.is_compiling():
            self._derive(x)
        return ops.call(self._OPS[form], *self._arguments(x))

    @property
    def _torch_is_faster(self) -> bool:
        """Scored: whether no kernel of ours beats torch's on W*mask at any batch, on a CPU."""
        return False

    def _on_masked_weight(self, x: torch.Tensor) -> torch.Tensor:
        """One op writes W*mask, torch's use it, forward and backward."""
        weight, bias = self._seen("weight"), self._held("bias")
        x, geometry = self._geometry(x)  # before the cast: autocast pads in float32
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        elif x.dtype != weight.dtype:
            raise self._wrong_dtype(x)
        words, raw = self._buffers["mask_words"], self._gives_raw_grad()
        scores = self._seen("scores")
        masked = ops.call(ops.popup_weight, weight, scores, words, self.options.transform, raw)
        return self._torch_call(x, masked, bias, *geometry)

    def _torch_call(self, x: torch.Tensor, weight: torch.Tensor, bias, *geometry) -> torch.Tensor:
        raise NotImplementedError

    def _wrong_dtype(self, x: torch.Tensor) -> TypeError:
        return TypeError(
            f"{type(self).__name__}: x: got {x.dtype}, need {self.dtype}, that of the weights"
        )

    def _arguments(self, x: torch.Tensor) -> tuple:
        """What this form's op is called with: ``x`` padded, floats cast under autocast."""
        form, weight = self.options.form, None
        if form != "ticket":
            weight = self._seen("values" if form == "compressed" else "weight")
        buffers = self._buffers  # attribute access would cost a microsecond each
        bias, words, shadow = self._held("bias"), buffers["mask_words"], None
        x, geometry = self._geometry(x)  # before the cast: autocast pads in float32
        kind = x.device.type
        if form == "scored" and self._takes_seed and self._is_drawn():
            weight = None  # the op makes it from the recipe
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            x = x.to(dtype)
            if form == "masked":
                shadow = self._shadow_in(dtype)
            weight = weight.to(dtype) if weight is not None and shadow is None else weight
            bias = None if bias is None else bias.to(dtype)
        elif x.dtype != (self._anchor if weight is None else weight).dtype:
            raise self._wrong_dtype(x)
        elif "shadow" in buffers:
            shadow = self._shadow_in(x.dtype)
        if form == "masked":
            raw = self._raw_grad_for is not None
            if shadow is None and not raw:
                return x, weight, words, bias, *geometry
            return x, weight, words, bias, *geometry, raw, *self._AFTER_RAW, shadow
        if form == "scored":
            seed, layer, sigma = 0, 0, 0.0  # unread, and no reason to compile anew
            if weight is None:
                seed, layer, _, sigma = self.recipe.arguments()
            recipe = (self.options.transform, seed, layer, sigma)
            scores, raw = self._seen("scores"), self._gives_raw_grad()
            return x, weight, scores, words, bias, *recipe, *geometry, raw
        if form == "compressed":
            shape = (self._call_shape,) if geometry else ()
            derived = buffers["pattern"], buffers["pattern_t"]
            return x, weight, words, bias, *shape, *geometry, *derived
        return x, words, bias, *self.recipe.arguments(), *self._ticket_arguments(geometry)

    @property
    def _call_shape(self) -> tuple[int, ...]:
        """``weight_shape`` as the op takes it."""
        return self.weight_shape

    def _held(self, name: str) -> Any:
        """A parameter, or what hooks, parametrizations and replicas put in its place."""
        held = self._parameters
        return held[name] if name in held else getattr(self, name)

    def _seen(self, name: str) -> Any:
        """What is held, as the op takes it."""
        return self._held(name)

    def _ticket_arguments(self, geometry: tuple) -> tuple:
        """What the ticket op takes after the recipe."""
        raise NotImplementedError

    def _geometry(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """``x`` as the op wants it and the op's arguments after the tensors."""
        raise NotImplementedError

    def _make_pattern(self, transposed: bool) -> torch.Tensor | None:
        """The derived tensor that lists the mask's live positions for the kernels of the
        ``compressed`` form, or, ``transposed``, for those of the input gradient; None for none."""
        return None

    def _set_pattern(self) -> None:
        """Derive ``pattern`` from the mask; ``pattern_t`` waits for a training forward."""
        known = not self.mask_words.is_meta
        pattern = self._make_pattern(transposed=False) if known else None
        self.register_buffer("pattern", pattern, persistent=False)
        self.register_buffer("pattern_t", None, persistent=False)

    def _derive(self, x: torch.Tensor) -> None:
        """Eager: make what a move dropped, or what training needs for the first time."""
        buffers = self._buffers
        if buffers["pattern"] is None:
            self.pattern = self._make_pattern(transposed=False)
        if x.requires_grad and buffers["pattern_t"] is None and torch.is_grad_enabled():
            self.pattern_t = self._make_pattern(transposed=True)

    def explain(self, x: torch.Tensor) -> ops.Choice:
        """Which kernel would run ``forward(x)``, and why."""
        if self.form == "scored" and x.device.type == "cpu" and self._torch_is_faster:
            return ops.Choice("popup_weight", "materialised", "torch's product on W*mask")
        _, _, name = self._OPS[self.form].name().partition("::")
        return ops.explain_op(name.partition(".")[0], *self._arguments(x))

    def example(self, batch: int) -> torch.Tensor:
        """Uninitialised input of ``batch`` samples, the smallest this module takes."""
        return torch.empty(
            batch, *self._sample_shape(), dtype=self.dtype, device=self._anchor.device
        )

    def _sample_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    # Masks and weights ------------------------------------------------------------------------

    @property
    def form(self) -> str:
        return self.options.form

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, also where a ticket only remakes them."""
        return self._anchor.dtype

    @property
    def _anchor(self) -> torch.Tensor:
        if self.form == "compressed":
            return self.values
        return self._like if self.form == "ticket" else self.weight

    @property
    def mask(self) -> PackedMask:
        """A copy of the mask in use; RuntimeError if the scores changed since it was selected."""
        self._check_fresh()
        return PackedMask(self.mask_words.clone(), self.weight_shape)

    @mask.setter
    def mask(self, value: PackedMask | torch.Tensor) -> None:
        if self.form != "masked":
            raise ValueError(
                f"{type(self).__name__}: mask: form {self.form!r} does not take a new mask; "
                "use to_form('masked')"
            )
        mask = as_mask(value, self.weight_shape, f"{type(self).__name__}: mask")
        self.mask_words.copy_(mask.words)
        self.drop_shadow()

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "options" in vars(self) and self.form not in _DENSE:
            return self._masked_weight()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "options" in vars(self) and self.form not in _DENSE:
            holds = "seed and mask" if self.form == "ticket" else "values and mask"
            raise AttributeError(
                f"{type(self).__name__}: weight: form {self.form!r} has {holds} only; use "
                "to_form('masked') for a weight that can be set"
            )
        super().__setattr__(name, value)

    def _full_weight(self) -> torch.Tensor:
        device = self._anchor.device
        return self._remake(self, self.recipe, self.weight_shape, self.dtype, device)

    @staticmethod
    def _remake(like, recipe, shape, dtype, device) -> torch.Tensor:
        """The weights of ``recipe`` for a layer like ``like``."""
        return recipe.weight(shape, dtype, device)

    def _draw_weight(self) -> None:
        self.weight.copy_(self._full_weight())
        self._set_drawn(True)

    @torch.no_grad()
    def _masked_weight(self) -> torch.Tensor:
        if self.form == "compressed":
            return ops.scatter_live(self.values, self.mask_words, self.weight_shape)
        full = self._full_weight() if self.form == "ticket" else self.weight
        return ops.apply_mask(full, self.mask_words)

    # weight * mask, which a masked optimizer (in a low precision) or st.tune writes (form masked).

    def shadow_buffer(self, dtype: torch.dtype) -> torch.Tensor:
        """The buffer for others to write, laid out as the weight; made if there is none."""
        shadow = self._buffers.get("shadow")
        if shadow is None or (shadow.dtype, shadow.device) != (dtype, self.weight.device):
            self.register_buffer("shadow", torch.empty_like(self.weight, dtype=dtype), False)
        return self.shadow

    def shadow_written(self, owner: object | None = None) -> None:
        self._shadow_at = _version(self.weight), _version(self.mask_words)
        self._shadow_owner = owner

    def make_shadow(self, dtype: torch.dtype) -> None:
        masked = ops.apply_mask(self.weight.detach(), self.mask_words, dtype)
        self.shadow_buffer(dtype).copy_(masked)
        self.shadow_written()

    def drop_shadow(self) -> None:
        self._buffers.pop("shadow", None)
        self._non_persistent_buffers_set.discard("shadow")
        self._shadow_at = self._shadow_owner = None

    def _shadow_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The shadow, if it is in ``dtype`` and nobody wrote weight or mask since it was written.

        Off the CPU, whose kernels mask as they read, one is made where there is none.
        """
        shadow = self._buffers.get("shadow")
        if shadow is not None and shadow.dtype == dtype and self._shadow_at is not None:
            if torch.compiler.is_compiling():  # no versions there: only what an optimizer keeps up
                return shadow if self._shadow_owner is not None else None
            if self._shadow_at == (_version(self.weight), _version(self.mask_words)):
                return shadow
        if self.mask_words.device.type == "cpu":
            return None
        return ops.apply_mask(self.weight.detach(), self.mask_words, dtype)

    def _selection_taken(self) -> None:
        """``mask_words`` now hold the selection of the present scores."""
        self._set_fresh(True)
        if self.options.scale == "dynamic":
            recipe = self.recipe.scaled(self.mask.density)
            if recipe != self.recipe:
                self.recipe = recipe
                self._draw_weight()

    def _is_fresh(self) -> bool:
        if self.options.form != "scored":
            return True
        scores = self._held("scores")
        return scores.is_inference() or self._selected_at == scores._version

    def _set_fresh(self, fresh: bool) -> None:
        if self.options.form == "scored":  # setting an attribute of a module is slow
            vars(self)["_selected_at"] = _version(self._held("scores")) if fresh else None

    def _is_drawn(self) -> bool:
        """Is the frozen weight still, bit for bit, what the recipe gives?"""
        if torch.compiler.is_compiling():
            return self._drawn_at is not None
        return self._drawn_at is not None and self._drawn_at == _version(self._held("weight"))

    def _set_drawn(self, drawn: bool) -> None:
        if self.form == "scored":
            # float16 may have rounded sigma; every other dtype holds it
            exact = drawn and self.recipe is not None and self.weight.dtype != torch.float16
            self._drawn_at = _version(self.weight) if exact else None

    def _gives_raw_grad(self) -> bool:
        """Does the optimizer finish the score gradient, from the seed's signs?"""
        return self._raw_grad_for is not None and self._is_drawn()

    @property
    def _takes_seed(self) -> bool:
        """Does this layer's popup op gain from the recipe in place of the weight?"""
        return False

    def _check_fresh(self) -> None:
        if not torch.compiler.is_compiling() and not self._is_fresh():
            raise RuntimeError(
                f"{type(self).__name__}: the scores changed after the mask was selected; call "
                "st.update_masks(model) after optimizer.step(), or st.attach(model, optimizer) once"
            )

    # Copies, moves and state ------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Tensor versions do not survive a copy: a flag travels in place of the number.
        state = {**super().__getstate__(), "_selected_at": self._is_fresh()}
        state.pop("_raw_grad_for", None)  # a copy's optimizer has not been made yet
        state.pop("_shadow_owner", None)
        if state.pop("_shadow_at", None) is not None:
            buffers = {k: v for k, v in state["_buffers"].items() if k != "shadow"}
            state["_buffers"] = buffers
        if self.form == "scored":
            state["_drawn_at"] = self._is_drawn()
        if self.form == "compressed":  # derived, and in a layout of this version of the library
            derived = {"pattern": None, "pattern_t": None}
            state["_buffers"] = {**state["_buffers"], **derived}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_fresh(self._selected_at)
        if self.form == "scored":
            self._set_drawn(self._drawn_at)
        if self.form == "compressed":
            self._set_pattern()

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        scores, fresh = self._parameters.get("scores"), self._is_fresh()
        drawn = self.form == "scored" and self._is_drawn()
        ranked = () if scores is None else (scores, scores.grad)
        was_meta = self.mask_words.is_meta
        self.drop_shadow()
        super()._apply(keep_dtype(fn, ranked), recurse)
        self._set_fresh(fresh)
        self._set_drawn(drawn)
        if self.form == "compressed" and (was_meta or self.mask_words.is_meta):
            self.pattern = self.pattern_t = None  # until a mask is loaded
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._check_fresh()  # a mask that is not the scores' would count as theirs once loaded
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.recipe is not None:
            destination[prefix + "seed"] = self.recipe.to_tensor()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        problems = [f"{prefix}{text}" for text in self._load_problems(state_dict, prefix)]
        if problems:
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.drop_shadow()
        seed, words = prefix + "seed", prefix + "mask_words"
        if seed in state_dict:
            self.recipe = WeightRecipe.from_tensor(state_dict[seed])
            if self.form == "scored":
                known = not self.weight.is_meta
                self._set_drawn(known and torch.equal(self.weight, self._full_weight()))
        if self.codes is not None and (seed in state_dict or words in state_dict):
            self.codes.copy_(self._derived())
        if seed in unexpected_keys:
            unexpected_keys.remove(seed)
        if self.form == "compressed" and words in state_dict:
            self._set_pattern()
        if self.form in _TRAINED:
            if words in missing_keys and self.form == "masked":
                missing_keys.remove(words)
        elif strict and seed not in state_dict:
            missing_keys.append(seed)
        came = {key in state_dict for key in (prefix + "scores", words)}
        if True in came:
            self._set_fresh(False not in came)

    def _load_problems(self, state_dict, prefix) -> Iterator[str]:
        weight, seed, words, scores = (
            state_dict.get(prefix + name) for name in ("weight", "seed", "mask_words", "scores")
        )
        try:
            recipe = None if seed is None else WeightRecipe.from_tensor(seed)
        except ValueError as error:
            yield f"seed: {error}"
        else:
            if self.options.codes and recipe and recipe.dist != "signed_constant":
                yield f"seed: a ticket with codes=True takes no {recipe.dist} weights"
        if words is not None:
            try:
                check_packed(words, self.weight_shape, "mask_words")
            except ValueError as error:
                yield str(error)
        if self.form == "compressed":
            yield from self._compressed_problems(state_dict, prefix)
        if self.form != "scored":
            return
        if (weight is None) != (seed is None):
            yield "weight, seed: frozen weights load with their seed only, give both"
        if scores is not None and scores.dtype != torch.float32:
            yield f"scores: got {scores.dtype}, need torch.float32, in which they are ranked"

    def _compressed_problems(self, state_dict, prefix) -> Iterator[str]:
        if prefix + "weight" in state_dict:
            yield (
                "weight: form 'compressed' loads values and mask_words, not a dense weight; load "
                "it in form 'masked' and convert with to_form('compressed')"
            )
        values, words = (state_dict.get(prefix + name) for name in ("values", "mask_words"))
        if (values is None) != (words is None):
            yield "values, mask_words: they load together only, give both"
        elif words is not None and words.shape == self.mask_words.shape:
            kept = int(ops.mask_ops(words, None, "popcount"))
            if not values.numel() == kept == self.values.numel():
                yield (
                    f"values, mask_words: got {values.numel()} values and {kept} live positions, "
                    f"need {self.values.numel()}, the number that this module was made with"
                )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, form={self.form}"
        if self.mask_words.is_meta:
            return text
        mask = PackedMask(self.mask_words, self.weight_shape)
        return f"{text}, kept={mask.kept}/{mask.numel}"

    # Conversion -------------------------------------------------------------------------------

    def to_dense(self) -> nn.Module:
        """A plain torch layer with the masked weight and the bias, trainable."""
        self._check_fresh()
        dense = self._plain()
        dense.weight = nn.Parameter(self._masked_weight())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    def _plain(self) -> nn.Module:
        """The torch module of the same call, on the meta device, without bias."""
        return plain_layer(self, bias=False)

    def to_form(self, form: str, **options: Any) -> Self:
        """A new module in ``form`` with the same mask and bit-equal weights where it keeps them.

        ``options`` are those that only ``form`` has (``transform``, ``scope``, ``codes``, ...). To
        ``scored``, scores are drawn from the seed and lifted where the mask keeps. ValueError if
        ``ticket`` or ``scored`` cannot remake the weights from their seed.
        """
        self._check_fresh()
        if form == self.form and not options:
            return copy.deepcopy(self)
        if form not in _TRAINED:
            self._check_remakes(form)
        mask, recipe = self.mask, self.recipe
        if recipe is not None:
            options = {"weights": recipe.dist, "scale": self.options.scale} | options
        if form not in _TRAINED and self.bias is not None:
            options["keep_bias"] = self.options.keep_bias or bool(self.bias.any())
        options |= {"form": form, "density": mask.density}
        options = _options(f"{type(self).__name__}.to_form", options)
        scores = self._new_scores(options, mask) if form == "scored" else None
        weight, bias = None, self.bias
        if form != "ticket":
            frozen = form == "scored" and self.form not in _DENSE
            full = self._full_weight() if self.form == "ticket" or frozen else self.weight
            weight = _parameter(full, form in _TRAINED)
        if bias is not None:
            bias = _parameter(bias, form in _TRAINED or (form == "scored" and options.keep_bias))
        new = type(self).__new__(type(self))
        new._assemble(self, options, recipe, mask, scores, weight, bias, self.dtype)
        return new

    def _check_remakes(self, form: str) -> None:
        """ValueError unless the recipe gives this module's kept weights bit for bit."""
        if self.form == "ticket":
            return
        name = type(self).__name__
        if self.recipe is None:
            raise ValueError(
                f"{name}: form {form!r} needs weights drawn from a seed; these came from torch's "
                "initialisation or from a dense module"
            )
        remade = ops.apply_mask(self._full_weight(), self.mask_words)
        if not torch.equal(self._masked_weight(), remade):
            raise ValueError(
                f"{name}: form {form!r} needs the kept weights of seed {self.recipe.seed} "
                "unchanged; these were trained or rounded"
            )


def keep_dtype(fn: Callable, kept: Sequence[torch.Tensor | None]) -> Callable:
    """``fn`` of ``Module._apply``, by which integers and ``kept`` only move."""

    def moved(t: torch.Tensor) -> torch.Tensor:
        new = fn(t)
        if new.dtype == t.dtype or (t.is_floating_point() and not any(t is k for k in kept)):
            return new
        return torch.empty_like(new, dtype=t.dtype).copy_(t)

    return moved


def _given_mask(mask, density, options, shape) -> tuple[PackedMask, Options]:
    """The user's mask, checked against ``density`` if that was given too, and its options."""
    mask = as_mask(mask, shape, "mask")
    if density is not None and kept_count(density, mask.numel) != mask.kept:
        raise ValueError(
            f"density: got {density} with a mask of density {mask.density:.6g}; give one of them"
        )
    return mask, replace(options, density=mask.density)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
