from __future__ import annotations

import oracle
import pytest
import torch

import sparseticket as st
from sparseticket import ops
from sparseticket.reference.regenerate_many import regenerate_many as reference

SHAPES = [(17, 63), (), (8, 3, 3, 3), (0, 4), (5, 0), (30, 192), (4, 70, 3, 2), (2, 3, 4), (5,)]


def layers_of(shapes, density=0.5, device="cpu"):
    """(words, seeds, layers, ndims, sizes, sigmas)."""
    torch.manual_seed(0)
    words = [ops.pack_mask(torch.rand(s) < density).to(device) for s in shapes]
    numbers = range(len(shapes))
    sizes = [size for shape in shapes for size in shape]
    sigmas = [0.37 / (i + 1) for i in numbers]
    return words, [5 + i % 2 for i in numbers], [7 * i for i in numbers], [
        len(s) for s in shapes
    ], sizes, sigmas  # fmt: skip


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert torch.equal(a.cpu(), b.cpu())
        assert torch.equal(a.double().signbit().cpu(), b.double().signbit().cpu())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bit_identical_to_the_reference(isa, threads, dtype, last):
    for density in (0, 0.5, 1):
        given = layers_of(SHAPES, density)
        same(ops.regenerate_many(*given, dtype, last), reference(*given, dtype, last))


def test_opcheck_and_compiled():
    given = layers_of(SHAPES)
    torch.library.opcheck(ops.regenerate_many, (*given, torch.bfloat16, True))
    made = oracle.compiled(lambda words: ops.regenerate_many(words, *given[1:]))
    same(made(given[0]), reference(*given))


def test_layers_of_a_model():
    """As docs/gpu.md calls it."""
    options = {"density": 0.3, "seed": 2**63 - 1, "form": "ticket"}
    layers = [
        st.SparseConv2d(3, 5, 3, layer="a", **options),
        st.SparseLinear(70, 9, layer="b", **options),
    ]
    shapes = [m.weight_shape for m in layers]
    weights = ops.regenerate_many(
        [m.mask_words for m in layers],
        [m.recipe.seed for m in layers],
        [ops.signed64(m.recipe.layer) for m in layers],
        [len(s) for s in shapes],
        [size for s in shapes for size in s],
        [m.recipe.sigma for m in layers],
        torch.bfloat16,
        True,
    )
    for weight, m in zip(weights, layers, strict=True):
        assert torch.equal(weight, m.weight.bfloat16())


def test_errors():
    words, *rest = layers_of([(5, 70), (3, 3)])
    with pytest.raises(ValueError, match=r"regenerate_many: seeds: got 1 for 2 masks"):
        ops.regenerate_many(words, rest[0][:1], *rest[1:])
    with pytest.raises(ValueError, match=r"regenerate_many: sizes: got 3, need \[2, 2\], as many"):
        ops.regenerate_many(words, *rest[:3], rest[3][:3], rest[4])
    with pytest.raises(
        ValueError, match=r"regenerate_many: words: .*\(3, 2\), need int32 \(5, 4\)"
    ):
        ops.regenerate_many([words[1], words[0]], *rest)
    with pytest.raises(ValueError, match=r"seed: got -1, need an integer in \[0, 2\*\*63\)"):
        ops.regenerate_many(words, [0, -1], *rest[1:])
    with pytest.raises(TypeError, match=r"regenerate_many: dtype: got torch\.int32, accepted"):
        ops.regenerate_many(words, *rest, torch.int32)
