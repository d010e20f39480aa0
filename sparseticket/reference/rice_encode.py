from __future__ import annotations

import torch

__all__ = ["rice_encode"]


def rice_encode(words: torch.Tensor, k: int, parameter: int) -> torch.Tensor:
    """uint8 Rice code of a packed mask ``[O, 2*ceil(k/64)]``, LSB-first bits.

    Each kept weight, in canonical order over all O*k, codes the zeros before it: the quotient by
    2**parameter in unary (ones, ended by a zero), then ``parameter`` low bits, lowest first.
    """
    place = torch.arange(32, dtype=torch.int32, device=words.device)
    flat = (
        ((words.unsqueeze(-1) >> place) & 1)
        .reshape(words.shape[0], words.shape[1] * 32)[:, :k]
        .flatten()
    )
    bits: list[int] = []
    previous = -1
    for position in torch.nonzero(flat).flatten().tolist():
        gap = position - previous - 1
        previous = position
        bits += [1] * (gap >> parameter) + [0]
        bits += [(gap >> i) & 1 for i in range(parameter)]
    bits += [0] * (-len(bits) % 8)
    values = [sum(b << i for i, b in enumerate(bits[j : j + 8])) for j in range(0, len(bits), 8)]
    return torch.tensor(values, dtype=torch.uint8, device=words.device)
