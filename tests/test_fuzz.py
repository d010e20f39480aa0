"""Ops against their references on random shapes, strides, storage offsets and densities, on wide
rows, from several Python threads at once, and a thousand times over."""

from __future__ import annotations

import random
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracle
import pytest
import torch
import torch.utils._pytree as pytree
from test_dispatch import CALLS

from sparseticket import ops
from sparseticket.formats import canonical_shape
from sparseticket.reference.apply_mask import apply_mask
from sparseticket.reference.masked_conv2d import masked_conv2d
from sparseticket.reference.masked_linear import masked_linear
from sparseticket.reference.pack_mask import pack_mask
from sparseticket.reference.popup_linear import popup_linear
from sparseticket.reference.regenerate import regenerate
from sparseticket.reference.rice_encode import rice_encode
from sparseticket.reference.select_mask import select_mask
from sparseticket.reference.unpack_mask import unpack_mask

RECIPE = (5, 7, "signed_constant", 0.5)
ROUNDS = 8  # of every kind, a level and thread count


def _size() -> int:
    return random.choice([1, 2, 3, 17, 31, 32, 33, 63, 64, 65, 100, random.randrange(1, 200)])


def _restrided(t: torch.Tensor) -> torch.Tensor:
    """The same values under other strides, most often not at the start of their storage."""
    kind = random.randrange(5)
    if kind == 0:
        padded = torch.cat([t.new_zeros(random.randrange(1, 4)), t.flatten()])
        return padded[-t.numel() :].view(t.shape) if t.numel() else t
    if kind == 1 and t.ndim > 1:
        order = random.sample(range(t.ndim), t.ndim)
        inverse = [order.index(i) for i in range(t.ndim)]
        return t.permute(order).contiguous().permute(inverse)
    if kind == 2:
        return torch.stack([t, t], -1)[..., 1]
    if kind == 3 and t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t


def _mask(shape) -> torch.Tensor:
    return torch.rand(shape) < random.choice([0, 1, 0.5, 0.1, 0.02, random.random()])


def _linear():
    rows, k, batch = _size(), _size(), random.choice([0, 1, 2, 3, 5, 8, 16, 33])
    words = _restrided(pack_mask(_mask((rows, k))))
    dtype = random.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    tensors = [
        _restrided(torch.randn(batch, k, dtype=dtype)),
        _restrided(regenerate(*RECIPE[:2], (rows, k), *RECIPE[2:], dtype=dtype)),
        _restrided(torch.randn(rows, dtype=dtype)) if random.random() < 0.5 else None,
        _restrided(torch.randn(rows, k)),
    ]

    def reference(x, w, b, s):
        return masked_linear(x, w, words, b)

    def popup(x, w, b, s):
        return ops.popup_linear(x, None, s, words, b, "abs", 5, 7, 0.5)

    assert torch.equal(
        popup_linear(*tensors[:2], tensors[3], words, tensors[2], "abs", 5, 7, 0.5),
        reference(*tensors),
    )
    oracle.compare(lambda x, w, b, s: ops.masked_linear(x, w, words, b), reference, tensors, [0, 1])
    oracle.compare(
        lambda x, w, b, s: ops.ticket_linear(x, words, b, *RECIPE), reference, tensors, [0]
    )
    oracle.compare(popup, reference, tensors, [0])


def _conv():
    groups = random.choice([1, 1, 2, 3])
    shape = (
        groups * random.randrange(1, 7),
        random.choice([1, 3, random.randrange(1, 40)]),
        random.randrange(1, 5),
        random.randrange(1, 5),
    )
    stride, dilation, padding = ([random.randrange(low, 4) for _ in "hw"] for low in (1, 1, 0))
    size = [dilation[i] * (shape[2 + i] - 1) + random.randrange(1, 40) for i in (0, 1)]
    batch = random.choice([[], [0], [1], [2], [9]])
    geometry = (stride, padding, dilation, groups)
    words = _restrided(pack_mask(_mask(shape)))
    dtype = random.choice([torch.float32, torch.float32, torch.bfloat16])
    tensors = [
        _restrided(torch.randn(*batch, shape[1] * groups, *size, dtype=dtype)),
        _restrided(regenerate(*RECIPE[:2], shape, *RECIPE[2:], dtype=dtype)),
        _restrided(torch.randn(shape[0], dtype=dtype)) if random.random() < 0.5 else None,
    ]

    def reference(x, w, b):
        return masked_conv2d(x, w, words, b, *geometry)

    # torch 2.13's own bfloat16 weight gradient reads memory that nobody wrote (channels-last input)
    wrt = [0] if dtype == torch.bfloat16 else [0, 1]
    oracle.compare(
        lambda x, w, b: ops.masked_conv2d(x, w, words, b, *geometry), reference, tensors, wrt
    )
    oracle.compare(
        lambda x, w, b: ops.ticket_conv2d(x, words, b, *RECIPE, shape, *geometry),
        reference,
        tensors,
        [0],
    )


def _shape() -> tuple[int, ...]:
    few = [random.randrange(5) for _ in range(5)]
    return random.choice(
        [
            (),
            (_size(),),
            (_size(), _size()),
            (few[0], _size(), few[1]),
            (_size(), _size(), few[0], few[1]),
            (few[0], few[1], 9, 8),  # more taps than a word pair has bits
            tuple(few),
        ]
    )


def _bits():
    mask = _mask(_shape())
    words = pack_mask(mask)
    assert torch.equal(ops.pack_mask(_restrided(mask)), words)
    assert torch.equal(
        ops.unpack_mask(_restrided(words), mask.shape), unpack_mask(words, mask.shape)
    )
    dense = torch.randn(mask.shape)
    assert torch.equal(
        ops.apply_mask(_restrided(dense), _restrided(words)), apply_mask(dense, words)
    )
    (rows, k), parameter = canonical_shape(mask.shape), random.randrange(6)
    code = ops.rice_encode(_restrided(words), k, parameter)
    assert torch.equal(code, rice_encode(words, k, parameter))
    assert torch.equal(ops.rice_decode(code, rows, k, int(mask.sum()), parameter), words)


def _select():
    scores = [torch.randn(_shape()) for _ in range(random.randrange(1, 4))]
    if random.random() < 0.5:
        scores = [(2 * s).round() for s in scores]
    within = [pack_mask(_mask(s.shape)) for s in scores] if random.random() < 0.5 else None
    scope, transform = random.choice(["layer", "global"]), random.choice(["abs", "identity"])
    most = (
        [s.numel() for s in scores]
        if within is None
        else [int(ops.mask_ops(w, None, "popcount")) for w in within]
    )
    kept = [random.randint(0, n) for n in (most if scope == "layer" else [sum(most)])]
    given = [_restrided(s) for s in scores]
    words, state = ops.select_mask(given, kept, within, None, scope, transform)
    expected, expected_state = select_mask(scores, kept, within, None, scope, transform)
    assert all(torch.equal(a, b) for a, b in zip(words, expected, strict=True))
    assert torch.equal(state, expected_state)
    again, _ = ops.select_mask(given, kept, within, state, scope, transform)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("draw", [_linear, _conv, _bits, _select])
def test_random_cases(isa, threads, draw):
    for i in range(ROUNDS):
        random.seed(f"{draw.__name__} {i} {threads}")
        torch.manual_seed(i)
        draw()


def test_rows_of_more_than_65536_columns(isa):
    torch.manual_seed(0)
    k = 2**16 + 77
    mask = torch.rand(2, k) < 0.1
    words = pack_mask(mask)
    assert torch.equal(ops.pack_mask(mask), words)
    assert torch.equal(ops.unpack_mask(words, mask.shape), mask)
    dense = regenerate(*RECIPE[:2], mask.shape, *RECIPE[2:])
    assert torch.equal(ops.regenerate(*RECIPE[:2], mask.shape, *RECIPE[2:]), dense)
    code = ops.rice_encode(words, k, 3)
    assert torch.equal(code, rice_encode(words, k, 3))
    assert torch.equal(ops.rice_decode(code, 2, k, int(mask.sum()), 3), words)
    scores = torch.randn(2, k).round()
    (got,), _ = ops.select_mask([scores], [12345])
    assert torch.equal(got, select_mask([scores], [12345])[0][0])
    for batch in (1, 3, 20):
        x = torch.randn(batch, k)
        for op in (
            lambda x, w: ops.masked_linear(x, w, words),
            lambda x, w: ops.ticket_linear(x, words, None, *RECIPE),
        ):
            oracle.compare(op, lambda x, w: masked_linear(x, w, words), [x, dense], [0])
    shape, geometry = (2, 8200, 3, 3), ([1, 1], [1, 1], [1, 1], 1)
    conv_words = pack_mask(torch.rand(shape) < 0.02)
    oracle.compare(
        lambda x, w: ops.masked_conv2d(x, w, conv_words, None, *geometry),
        lambda x, w: masked_conv2d(x, w, conv_words, None, *geometry),
        [torch.randn(1, 8200, 3, 4), torch.randn(shape)],
        [0, 1],
    )


def _run(name: str) -> list[torch.Tensor]:
    return pytree.tree_leaves(getattr(ops, name)(*CALLS[name]))


def test_several_python_threads():
    names = sorted(CALLS) * 40
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(_run, names))
    expected = {name: _run(name) for name in CALLS}
    for name, got in zip(names, results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected[name], strict=True)), name


def _resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="needs linux: reads /proc")
@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_a_thousand_calls_leave_nothing(name, threads):
    for _ in range(100):
        _run(name)
    before = _resident()
    for _ in range(1000):
        _run(name)
    assert _resident() - before < 128 * 1000  # less than one capsule a call
