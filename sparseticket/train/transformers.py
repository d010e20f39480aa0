"""Small transformers without a learned vector: pre-norm blocks, non-affine norms, no biases.

Every weight lies in an nn.Linear, nn.Conv2d, nn.Embedding or nn.MultiheadAttention, so a ticket of
one holds seeds and masks only. Blocks as in GPT-2 (Radford et al., 2019), but for norms and biases;
the image model is that of Dosovitskiy et al., ICLR 2021, on the mean of the patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Decoder", "VisionTransformer"]

_GRID = 4  # patches on a side of an image


class _Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): tokens ``[N, T, width]``."""

    def __init__(self, width: int, heads: int, affine: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=affine)
        self.attn = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=affine)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        causal = mask is not None
        y, _ = self.attn(y, y, y, attn_mask=mask, need_weights=False, is_causal=causal)
        x = x + y
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


def _blocks(width: int, layers: int, heads: int, affine: bool) -> nn.ModuleList:
    for name, value in {"width": width, "layers": layers, "heads": heads}.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, need at least 1")
    if width % heads:
        raise ValueError(f"heads: got {heads}, need a divisor of the width {width}")
    return nn.ModuleList(_Block(width, heads, affine) for _ in range(layers))


class Decoder(nn.Module):
    """A language model: tokens ``[N, T]``, T <= ``context``, to logits ``[N*T, vocabulary]``.

    Row n*T + t holds the logits of the token after t, from tokens 0..t of sequence n: what
    cross-entropy takes beside ``targets.flatten()``. ``affine`` gives the norms learned vectors.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        width: int,
        layers: int,
        heads: int,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = _blocks(width, layers, heads, affine)
        self.norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.head = nn.Linear(width, vocabulary, bias=False)
        hidden = torch.ones(context, context, dtype=torch.bool).triu(1)
        self.register_buffer("hidden", hidden, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > len(self.hidden):
            raise ValueError(
                f"Decoder: tokens: got {length} a sequence, need at most {len(self.hidden)}"
            )
        place = torch.arange(length, device=tokens.device)
        x = self.tokens(tokens) + self.positions(place)
        for block in self.blocks:
            x = block(x, self.hidden[:length, :length])
        return self.head(self.norm(x)).flatten(0, 1)


class VisionTransformer(nn.Module):
    """Images ``[N, C, H, W]`` in 4 x 4 patches to logits ``[N, classes]``."""

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        num_classes: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        affine: bool = False,
    ) -> None:
        super().__init__()
        channels, *sides = in_shape
        if any(side % _GRID or not side for side in sides):
            raise ValueError(
                f"vit: got {sides[0]}x{sides[1]} images, need sides divisible by {_GRID}"
            )
        patch = [side // _GRID for side in sides]
        self.patches = nn.Conv2d(channels, width, patch, stride=patch, bias=False)
        self.positions = nn.Embedding(_GRID * _GRID, width)
        self.blocks = _blocks(width, layers, heads, affine)
        self.norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.head = nn.Linear(width, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(_GRID * _GRID, device=x.device)
        x = self.patches(x).flatten(2).mT + self.positions(place)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))
