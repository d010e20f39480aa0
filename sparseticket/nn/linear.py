"""``nn.Linear`` under a mask."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from sparseticket import ops
from sparseticket.ops.masked_linear import check_linear

from ._sparse import SparseModule

__all__ = ["SparseLinear"]

# Scored, signed-constant weights below which looking sums up gains less than its calls cost.
LOOKUP_WEIGHTS = 2**15


class SparseLinear(SparseModule, nn.Linear):
    """``nn.Linear`` under a mask: trainable weights, frozen random weights, or no weights at all.

    torch's constructor, then keyword-only ``mask`` (PackedMask or bool tensor ``[O, K]``; default:
    random from the seed at ``density``, in ``scored`` form the best initial scores), ``seed`` (in
    [0, 2**63); None draws one from torch's generator), ``layer`` (module name or id for the random
    streams) and the fields of :class:`~sparseticket.nn.Options`.

    Input ``[*, K]``, output ``[*, O]``, in the dtype of the weights (autocast's under autocast).

    In ``compressed`` form an input whose last two dimensions lie transposed in memory gives such an
    output, and no layer packs or unpacks it: ``x.unflatten(0, (-1, 64)).mT.contiguous().mT``, once
    before a chain of layers and element-wise functions, ``y.flatten(0, 1)`` after it. Groups of 16,
    32, 48 or 64 samples in float32 are computed in place, others are copied.
    """

    _BASE = nn.Linear
    _OPS: ClassVar = {
        "masked": ops.masked_linear,
        "scored": ops.popup_linear,
        "ticket": ops.ticket_linear,
        "compressed": ops.sparse_linear,
    }

    _AFTER_RAW: ClassVar = (False,)  # transposed

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **ours: Any,
    ) -> None:
        make = partial(nn.Linear, in_features, out_features, bias, dtype=dtype)
        self._construct(make, device, **ours)

    def _geometry(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        if x.shape[-1:] != (self.in_features,):  # a ticket's words are the same for other widths
            raise ValueError(
                f"SparseLinear: x: got shape {tuple(x.shape)}, need last dimension "
                f"{self.in_features}"
            )
        return x, ()

    def _make_pattern(self, transposed: bool) -> torch.Tensor | None:
        arguments = self.mask_words, self.in_features, self.values.numel()
        if self.mask_words.device.type == "cpu":
            return ops.sparse_pattern(*arguments, transposed)
        on_device = self.mask_words.device.type == "cuda" and not transposed
        return ops.device_pattern(*arguments) if on_device else None

    def _derived(self) -> torch.Tensor:
        seed, layer, *_ = self.recipe.arguments()
        return ops.ticket_codes(self.mask_words, self.in_features, seed, layer)

    def _ticket_arguments(self, geometry: tuple) -> tuple:
        return None, self.codes

    @property
    def _takes_seed(self) -> bool:
        # With "dynamic", every selection would give a compiled graph another constant.
        constant = self.recipe.dist == "signed_constant" and self.options.scale != "dynamic"
        return constant and self._held("weight").dtype == torch.float32

    def _torch_call(self, x: torch.Tensor, weight: torch.Tensor, bias) -> torch.Tensor:
        check_linear("popup_linear", x, *weight.shape, self._buffers["mask_words"], bias)
        return F.linear(x, weight, bias)

    @property
    def _torch_is_faster(self) -> bool:
        # Evaluated, the layer computes what its ticket does, bit for bit.
        small = self._held("weight").numel() < LOOKUP_WEIGHTS
        return self.training and small and self._takes_seed

    def _sample_shape(self) -> tuple[int]:
        return (self.in_features,)
