"""``nn.Embedding`` under a mask."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from sparseticket import ops

from ._sparse import SparseModule

__all__ = ["SparseEmbedding"]

_FORMS = ("masked", "scored", "ticket")
_KERNELS = {
    "masked": ("apply_mask", "gathered rows", "the rows looked up are masked, not the table"),
    "scored": ("popup_weight", "gathered rows", "the rows looked up are masked, not the table"),
    "ticket": ("regenerate", "whole table", "its masked weight is made in one write"),
}


class SparseEmbedding(SparseModule, nn.Embedding):
    """``nn.Embedding`` under a mask: trainable weights, frozen random weights, or no weights.

    torch's constructor, then the keyword-only arguments of :class:`~sparseticket.nn.SparseLinear`.
    ``max_norm`` raises: it rewrites the table in the forward pass, which frozen weights and
    exact masks do not allow. ``scale_grad_by_freq`` and ``sparse`` hold for the scores in form
    ``scored``. Weights from a seed have zeros in the row ``padding_idx``, as torch's have; its mask
    bits count as any others.

    Input: integer indices ``[*]``; output ``[*, embedding_dim]``, in the dtype of the weights.
    ValueError for form ``compressed`` and for ``codes=True``, which it does not have.
    """

    _BASE = nn.Embedding
    _OPS: ClassVar = {}  # a call is a gather and an op on its rows

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: Any = None,
        **ours: Any,
    ) -> None:
        if max_norm is not None:
            raise ValueError(
                f"SparseEmbedding: max_norm: got {max_norm}, need None: it rewrites the weights in "
                "the forward pass; keep nn.Embedding for this layer"
            )
        make = partial(
            nn.Embedding,
            num_embeddings,
            embedding_dim,
            padding_idx,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            dtype=dtype,
        )
        self._construct(make, device, **ours)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: torch.Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        **ours: Any,
    ) -> Self:
        """torch's ``nn.Embedding.from_pretrained``, then :meth:`from_dense` with ``ours``."""
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return cls.from_dense(nn.Embedding.from_pretrained(embeddings, freeze, *options), **ours)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.form == "ticket":
            return F.embedding(input, self._masked_weight())
        if self.form == "scored":
            self._check_fresh()
        indices = input.reshape(-1)
        return self._rows(indices).view(*input.shape, self.embedding_dim)

    def _rows(self, indices: torch.Tensor) -> torch.Tensor:
        """The masked rows ``[n, embedding_dim]`` of 1-D ``indices``."""
        words, weight = self.mask_words[indices], self._held("weight")
        if self.form == "masked":
            rows = self._gather(indices, weight)
            if self._raw_grad_for is None:
                return ops.apply_mask(rows, words)
            return ops.popup_weight(rows.detach(), rows, words, "identity", True)
        scores = self._gather(indices, self._held("scores"))
        rows = F.embedding(indices, weight)
        raw = self._gives_raw_grad()
        return ops.popup_weight(rows, scores, words, self.options.transform, raw)

    def _gather(self, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of what is trained: their gradient obeys torch's options."""
        return F.embedding(
            indices,
            table,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )

    def _assemble(self, like, options, *rest) -> None:
        if options.form not in _FORMS or options.codes:
            what = f"form: got {options.form!r}" if not options.codes else "codes: got True"
            raise ValueError(f"SparseEmbedding: {what}, accepted forms: {', '.join(_FORMS)}")
        super()._assemble(like, options, *rest)

    @staticmethod
    def _remake(like, recipe, shape, dtype, device) -> torch.Tensor:
        weight = recipe.weight(shape, dtype, device)
        if like.padding_idx is not None:
            weight[like.padding_idx] = 0
        return weight

    def explain(self, x: torch.Tensor) -> ops.Choice:
        """Which kernel would run ``forward(x)``, and why."""
        return ops.Choice(*_KERNELS[self.form])

    def example(self, batch: int) -> torch.Tensor:
        """``batch`` indices."""
        return torch.zeros(batch, dtype=torch.int64, device=self._anchor.device)
