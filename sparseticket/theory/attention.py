"""Attention in a random network: Otsuka, Chijiwa, Okoshi, Fujiki, Takeuchi, Motomura, "The strong
lottery ticket hypothesis for multi-head attention mechanisms", AAAI 2026 (arXiv 2511.04217),
lemmas 4, 5, 7, 8, theorems 3, 11, 14.

A head is two matrices, the merged Q K^T / sqrt(n_K) and V O. Each is approximated by two random
factors, without a layer more: the first factor is pruned to a block for every input coordinate,
and an entry of the merged matrix is then a subset sum over products of its block. What the entries
are off by bounds what the attention is off by, for any sequence length and any attention mask
(:func:`attention_bound`), so that a bound can be computed from measured errors.

Deviations from the paper:

- both sources that it names: the theory's U[+-n_K^(1/4)] for Q and K, U[+-1] for V and O
  (``init="theory"``), and Xavier uniform (appendix B.1, ``"xavier"``);
- the bound on the softmax average is alpha * min(exp(2e) - 1, 2), proved in
  :func:`attention_bound`; lemmas 5 and 8 have another factor sqrt(d1);
- subset sums are solved by this library's solver in place of a mixed integer program;
- a head's width need not be a multiple of the input's: columns left over are pruned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseticket.masks import PackedMask, regenerate

from .solver import subset_sum

__all__ = [
    "Attention",
    "AttentionTicket",
    "Block",
    "attention_bound",
    "attention_ticket",
    "block_budgets",
    "block_ticket",
    "entry_budgets",
    "source_attention",
    "source_block",
]


class Attention(nn.Module):
    """Multi-head attention without biases: sum over heads of softmax(x Q K^T x^T / sqrt(n)) x V O.

    ``query``, ``key`` [H, d1, n_K], ``value`` [H, d1, n_V], ``output`` [H, n_V, d2].
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        super().__init__()
        heads, inputs, width = value.shape
        if query.shape != key.shape or query.shape[:2] != (heads, inputs):
            raise ValueError(
                f"query, key, value: got {tuple(query.shape)}, {tuple(key.shape)}, "
                f"{tuple(value.shape)}, need [H, d1, n_K] twice and [H, d1, n_V]"
            )
        if output.shape[:2] != (heads, width):
            raise ValueError(f"output: got {tuple(output.shape)}, need [{heads}, {width}, d2]")
        for name, tensor in zip(_FACTORS, (query, key, value, output), strict=True):
            self.register_parameter(name, nn.Parameter(tensor))

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> Attention:
        """The same attention; ValueError where a bias is not 0 or key and value have own sizes."""
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise ValueError("module: keys and values of their own sizes or biases are not covered")
        for bias in (module.in_proj_bias, module.out_proj.bias):
            if bias is not None and bool((bias != 0).any()):
                raise ValueError("module: its biases are not 0; the theorem knows none")
        heads, size = module.num_heads, module.embed_dim
        q, k, v = (
            w.unflatten(0, (heads, -1)).mT for w in module.in_proj_weight.detach().chunk(3)
        )  # [H, d1, n] each
        output = module.out_proj.weight.detach().T.unflatten(0, (heads, size // heads))
        return cls(q.clone(), k.clone(), v.clone(), output.clone())

    def merged(self) -> tuple[Tensor, Tensor]:
        """Q K^T / sqrt(n_K) [H, d1, d1] and V O [H, d1, d2]."""
        scale = 1 / math.sqrt(self.query.shape[2])
        return scale * (self.query @ self.key.mT), self.value @ self.output

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[N, T, d1] -> [N, T, d2]; ``causal``: position t sees positions up to t."""
        logits, values = self.merged()
        x = x[:, None]
        scores = x @ logits @ x.mT  # [N, H, T, T]
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ (x @ values)).sum(1)


_FACTORS = ("query", "key", "value", "output")


def source_attention(
    inputs: int,
    outputs: int,
    width: int,
    *,
    heads: int = 1,
    init: str = "theory",
    seed: int = 0,
    name: str = "attention",
) -> Attention:
    """A random attention of n_K = n_V = ``width`` per head, float64, from the magnitude stream.

    ``init``: ``theory``, U[+-width^(1/4)] for query and key, U[+-1] for value and output; or
    ``xavier``, U[+-sqrt(6 / (rows + columns))] each.
    """
    if init not in ("theory", "xavier"):
        raise ValueError(f"init: got {init!r}, accepted: theory, xavier")
    if min(inputs, outputs, width, heads) < 1:
        raise ValueError(
            f"inputs, outputs, width, heads: got {inputs}, {outputs}, {width}, {heads}, need >= 1"
        )
    shapes = [(inputs, width)] * 3 + [(width, outputs)]
    limits = [width**0.25] * 2 + [1.0] * 2
    if init == "xavier":
        limits = [math.sqrt(6 / (a + b)) for a, b in shapes]
    factors = [
        regenerate(
            seed,
            f"{name}.{factor}",
            (heads, *shape),
            "uniform",
            sigma=limit / math.sqrt(3),
            dtype=torch.float64,
        )
        for factor, shape, limit in zip(_FACTORS, shapes, limits, strict=True)
    ]
    return Attention(*factors)


@dataclass(frozen=True)
class AttentionTicket:
    """``network``: the source under ``masks`` (by factor, [H, rows, columns]); ``error_qk`` and
    ``error_vo`` [H]: the largest error of an entry of the merged matrices, measured."""

    network: Attention
    masks: dict[str, PackedMask]
    error_qk: Tensor
    error_vo: Tensor
    report: dict[str, Any]


@torch.no_grad()
def attention_ticket(
    target: Attention, source: Attention, eps: float, **solver: Any
) -> AttentionTicket:
    """Masks by which ``source`` computes ``target``, entries of merged matrices off by ``eps``.

    ``solver``: arguments of :func:`subset_sum`, such as ``objective``. What it cannot solve is left
    at its best effort and counted as ``failed``. ValueError if a head of the source is narrower
    than its input, or has more than 64 columns per input.
    """
    if target.query.shape[:2] != source.query.shape[:2] or (
        target.output.shape[2] != source.output.shape[2]
    ):
        raise ValueError(
            f"source: got heads and inputs {tuple(source.query.shape[:2])}, outputs "
            f"{source.output.shape[2]}, need those of the target, "
            f"{tuple(target.query.shape[:2])} and {target.output.shape[2]}"
        )
    wanted = [m.double() for m in target.merged()]
    scale = 1 / math.sqrt(source.query.shape[2])
    query, key, failed_qk = _factor_masks(
        scale * source.query.double(), source.key.mT.double(), wanted[0], eps, solver
    )
    value, output, failed_vo = _factor_masks(
        source.value.double(), source.output.double(), wanted[1], eps, solver
    )
    dense = dict(zip(_FACTORS, (query, key.mT, value, output), strict=True))
    network = Attention(*(getattr(source, name) * mask for name, mask in dense.items()))
    errors = [
        (a.double() - b).abs().amax((1, 2)) for a, b in zip(network.merged(), wanted, strict=True)
    ]
    masks = {name: PackedMask.from_dense(mask.contiguous()) for name, mask in dense.items()}
    report = {
        "widths": {"n_K": source.query.shape[2], "n_V": source.value.shape[2]},
        "kept": sum(m.kept for m in masks.values()),
        "weights": sum(m.numel for m in masks.values()),
        "subset_sums": wanted[0].numel() + wanted[1].numel(),
        "failed": failed_qk + failed_vo,
        "error_qk": float(errors[0].max()),
        "error_vo": float(errors[1].max()),
        "eps": eps,
    }
    return AttentionTicket(network, masks, *errors, report)


def _factor_masks(first, second, wanted, eps, solver) -> tuple[Tensor, Tensor, int]:
    """Masks of first [H, d1, n] and second [H, n, d2] by which their product is ``wanted``
    [H, d1, d2], and how many of its entries are off by more than ``eps``."""
    heads, inputs, width = first.shape
    block = width // inputs
    if not 1 <= block <= 64:
        raise ValueError(
            f"source: got {width} columns per head for {inputs} inputs, need one to 64 per input"
        )
    used = torch.eye(inputs, dtype=torch.bool).repeat_interleave(block, 1)  # [d1, d1*block]
    columns = torch.arange(inputs * block)
    own = first[:, columns // block, columns].view(heads, inputs, block, 1)
    products = own * second[:, : inputs * block].reshape(heads, inputs, block, -1)
    base = products.transpose(2, 3).reshape(-1, block)  # an entry [h, i, j] per row
    found = subset_sum(base, wanted.reshape(-1), eps, **solver)
    chosen = (found.mask[:, None] >> torch.arange(block)) & 1 == 1
    chosen = chosen.view(heads, inputs, -1, block).transpose(2, 3)
    second_mask = torch.zeros(second.shape, dtype=torch.bool)
    second_mask[:, : inputs * block] = chosen.reshape(heads, inputs * block, -1)
    first_mask = torch.zeros(first.shape, dtype=torch.bool)
    first_mask[:, :, : inputs * block] = used
    return first_mask, second_mask, int((found.error > eps).sum())


class Block(nn.Module):
    """A transformer block without normalisation: y = x + attention(x), then y + feedforward(y).

    ``feedforward``: Linear layers without biases, ReLU between them.
    """

    def __init__(self, attention: Attention, feedforward: nn.Sequential) -> None:
        super().__init__()
        self.attention, self.feedforward = attention, feedforward

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[N, T, d] -> [N, T, d]."""
        y = x + self.attention(x, causal)
        return y + self.feedforward(y)


def source_block(
    inputs: int, width: int, fc_width: int, *, layers: int = 1, seed: int = 0, **options: Any
) -> Block:
    """A random block, float64: :func:`source_attention` (``options``), and two layers of ``inputs``
    and ``fc_width`` neurons, U[+-1], for each of the target's feed-forward ``layers``."""
    attention = source_attention(inputs, inputs, width, seed=seed, **options)
    name = options.get("name", "attention")
    modules = []
    for i in range(layers):
        for part, shape in (("inner", (fc_width, inputs)), ("outer", (inputs, fc_width))):
            weight = regenerate(
                seed,
                f"{name}.{part}{i}",
                shape,
                "uniform",
                sigma=1 / math.sqrt(3),
                dtype=torch.float64,
            )
            modules += [_linear(weight), nn.ReLU()]
    return Block(attention, nn.Sequential(*modules[:-1]))


@torch.no_grad()
def block_ticket(
    target: Block, source: Block, eps: float, **solver: Any
) -> tuple[Block, dict[str, Any]]:
    """The source block pruned to compute ``target``, and a report.

    Attention by :func:`attention_ticket`; every feed-forward weight by a sum over neurons that see
    its positive and one over those that see its negative inputs (Pensia et al. 2020).
    """
    found = attention_ticket(target.attention, source.attention, eps, **solver)
    wanted = [m for m in target.feedforward if isinstance(m, nn.Linear)]
    random = [m for m in source.feedforward if isinstance(m, nn.Linear)]
    if len(random) != 2 * len(wanted):
        raise ValueError(
            f"source: got {len(random)} feed-forward layers for {len(wanted)} of the target, need "
            "two for each"
        )
    modules, failed, kept = [], found.report["failed"], found.report["kept"]
    for layer, inner, outer in zip(wanted, random[::2], random[1::2], strict=True):
        first, second = inner.weight.T[None].double(), outer.weight.T[None].double()
        goal = layer.weight.T[None].double()
        halves = [
            _factor_masks(part, second, goal, eps, solver)
            for part in (first.clamp(min=0), first.clamp(max=0))
        ]
        outer_mask = halves[0][1] | halves[1][1]
        for weight, mask in ((inner.weight, halves[0][0]), (outer.weight, outer_mask)):
            modules += [_linear(weight * mask[0].T), nn.ReLU()]
            kept += int(mask.sum())
        failed += halves[0][2] + halves[1][2]
    report = found.report | {"failed": failed, "kept": kept}
    return Block(found.network, nn.Sequential(*modules[:-1])), report


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


@torch.no_grad()
def attention_bound(target: Attention, error_qk: Tensor, error_vo: Tensor, alpha: float) -> float:
    """How far attention with such errors [H] of its merged entries can be from ``target``, as the
    Euclidean norm at any position, for inputs of norm up to ``alpha``, at any length and mask.

    A logit is off by at most e = alpha^2 * d1 * error_qk; softmax weights p then change by a factor
    within exp(+-2e), so sum |p' - p| <= min(exp(2e) - 1, 2), and the average of the inputs moves by
    alpha times that. Through V O, itself off by at most sqrt(d1 d2) * error_vo in norm:
    |y' - y| <= alpha * (sum |p' - p| * |V O|_2 + sqrt(d1 d2) * error_vo), summed over heads.
    """
    _, values = target.merged()
    _, inputs, outputs = values.shape
    logits = alpha**2 * inputs * error_qk.double()
    moved = torch.expm1(2 * logits).clamp(max=2)
    norms = torch.linalg.matrix_norm(values.double(), 2)
    return float((alpha * (moved * norms + math.sqrt(inputs * outputs) * error_vo.double())).sum())


def entry_budgets(
    eps: float, *, heads: int, alpha: float, inputs: int, outputs: int
) -> tuple[float, float]:
    """Theorem 3: errors of the entries of Q K^T and V O by which the attention is off by at most
    ``eps``, if the target's matrices have norm 1 at most and the inputs ``alpha``."""
    qk = eps / (8 * heads * alpha**3 * inputs**1.5)
    return qk, eps / (2 * heads * alpha * inputs * math.sqrt(outputs))


def block_budgets(eps: float, blocks: int, *, heads: int, alpha: float, inputs: int) -> list[float]:
    """Theorem 14: what each of ``blocks`` transformer blocks without normalisation may be off by so
    that all together are off by ``eps`` at most. The norms grow by 4 H sqrt(d1) a block."""
    growth = 4 * heads * math.sqrt(inputs)
    norms = [alpha * growth**b for b in range(blocks)]
    budgets = []
    for b in range(1, blocks + 1):
        later = math.prod(16 * heads * math.sqrt(inputs) * norms[j] ** 2 for j in range(b, blocks))
        budgets.append(eps / (2 ** (blocks - max(b, 2) + 1) * later))
    return budgets
