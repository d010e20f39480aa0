from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.formats import to_canonical
from sparseticket.reference.conv2d_flip import conv2d_flip as reference
from sparseticket.reference.conv2d_flip import flipped_shape

SHAPES = [((6, 2, 3, 2), 2), ((5, 3, 3, 3), 1), ((8, 1, 1, 5), 4), ((1, 1, 1, 1), 1)]


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_values_in_order_are_the_flipped_weight(shape, groups):
    torch.manual_seed(0)
    for _, mask, words in oracle.patterns(shape):
        weight = torch.randn(shape) * mask
        live = int(mask.sum())
        flip = ops.conv2d_flip(words, shape, groups, live)
        assert torch.equal(flip, reference(words, shape, groups, live))
        flip_words, order = oracle.module_of("conv2d_flip").split_flip(flip, shape, groups)
        values = to_canonical(weight)[to_canonical(mask)][order]
        turned = flipped_shape(shape, groups)
        flipped = to_canonical(torch.zeros(turned)).clone()
        flipped[to_canonical(ops.unpack_mask(flip_words, turned))] = values
        for o in range(shape[0]):
            for c in range(shape[1]):
                group = o // (shape[0] // groups)
                got = flipped.view(turned[0], *turned[2:], turned[1])[
                    group * shape[1] + c, :, :, o % (shape[0] // groups)
                ]
                assert torch.equal(got, weight[o, c].flip(-1, -2))


def test_opcheck_and_errors():
    words = ops.pack_mask(torch.ones(6, 2, 3, 2, dtype=torch.bool))
    torch.library.opcheck(ops.conv2d_flip, (words, (6, 2, 3, 2), 2, 72))
    with pytest.raises(ValueError, match=r"conv2d_flip: groups: got 4"):
        ops.conv2d_flip(words, (6, 2, 3, 2), 4, 72)
    with pytest.raises(ValueError, match=r"conv2d_flip: words"):
        ops.conv2d_flip(words[1:], (6, 2, 3, 2), 2, 72)
    with pytest.raises(ValueError, match=r"conv2d_flip: live"):
        ops.conv2d_flip(words, (6, 2, 3, 2), 2, 71)


def test_compiled():
    words = ops.pack_mask(torch.rand(6, 2, 3, 2) < 0.5)
    live = int(ops.mask_ops(words, None, "popcount"))
    run = oracle.compiled(lambda w: ops.conv2d_flip(w, (6, 2, 3, 2), 2, live))
    assert torch.equal(run(words), ops.conv2d_flip(words, (6, 2, 3, 2), 2, live))
