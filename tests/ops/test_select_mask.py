from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import warnings

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.formats import kept_count
from sparseticket.reference.select_mask import select_mask as reference

TRANSFORMS = ["abs", "identity"]
SHAPES = [
    *[(), (1,), (5,), (300,), (1, 1), (3, 17), (17, 63), (2, 64), (3, 129), (100, 100), (2, 3, 4)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (3, 1, 5, 5), (4, 6, 2, 1, 3)],
    *[(0,), (0, 5), (5, 0), (0, 3, 3, 3), (4, 0, 3, 3)],
]
TINY = 2.0**-149  # the smallest denormal
NAN = float("nan")


def _few(*values):
    return lambda shape: torch.tensor(values)[torch.randint(len(values), shape)]


def _first(shape):
    return tuple(torch.tensor(0) for _ in shape)


SCORES = {
    "random": torch.randn,
    "uniform": torch.rand,  # crowded exponents
    "ties": lambda shape: torch.randn(shape).mul(4).round(),
    "constant": lambda shape: torch.full(shape, -0.5),
    "ascending": lambda shape: torch.randn(shape).flatten().sort().values.view(shape),
    "descending": lambda shape: torch.randn(shape).flatten().sort(descending=True)[0].view(shape),
    "signs": _few(-1.0, 1.0),
    "denormal": _few(*(i * TINY for i in range(-9, 10)), 2.0**-126, -(2.0**-126)),
    "inf": _few(torch.inf, -torch.inf, 1.0, -1.0, 3e38, -3e38),
    "zeros": _few(-0.0, 0.0, -TINY, TINY),
    "one large": lambda shape: torch.full(shape, 1e-3).index_put_(_first(shape), torch.tensor(9e9)),
    "bfloat16": lambda shape: torch.randn(shape, dtype=torch.bfloat16),
    "float16": lambda shape: torch.randn(shape, dtype=torch.float16),
}


def _counts(n):
    return sorted({0, min(1, n), n // 3, max(n - 1, 0), n})


def _same(got, expected):
    """Words and state; a threshold of -0 is written as +0."""
    (words, state), (words2, state2) = got, expected
    assert len(words) == len(words2)
    for i, (a, b) in enumerate(zip(words, words2, strict=True)):
        assert torch.equal(a, b), f"tensor {i}"
    state2[:, 0] = (state2[:, 0].view(torch.float32) + 0.0).view(torch.int32)
    assert torch.equal(state, state2)


def _mask(scores, kept, **options):
    """The bool mask of one tensor."""
    (words,), _ = ops.select_mask([scores], [kept], **options)
    return ops.unpack_mask(words, scores.shape)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", SCORES)
def test_words_and_state(isa, kind, transform):
    torch.manual_seed(0)
    for shape in [(17, 63), (4, 70, 3, 2), (3000,)]:
        scores = [SCORES[kind](shape)]
        for kept in _counts(scores[0].numel()):
            args = (scores, [kept], None, None, "layer", transform)
            _same(ops.select_mask(*args), reference(*args))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_shapes_and_memory_formats(isa, transform):
    torch.manual_seed(0)
    for shape in SHAPES:
        for kind in ("random", "ties"):
            scores = SCORES[kind](shape)
            for kept in _counts(scores.numel()):
                options = ([kept], None, None, "layer", transform)
                expected = reference([scores], *options)
                for change in oracle.FORMATS.values():
                    _same(ops.select_mask([change(scores)], *options), expected)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 4097])
def test_sizes(isa, n):
    torch.manual_seed(0)
    for kind in ("random", "ties"):
        for shape in ((n,), (3, n)):
            scores = [SCORES[kind](shape)]
            for kept in _counts(scores[0].numel()):
                _same(ops.select_mask(scores, [kept]), reference(scores, [kept]))


# around the sizes at which threads start and samples grow, and where a bracket overflows
@pytest.mark.parametrize("shape", [(31, 1057), (32768,), (32769,), (8, 128, 16, 8), (300001,)])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_threads(isa, shape, transform):
    torch.manual_seed(0)
    for kind in ("random", "ties", "constant"):
        for change in (oracle.FORMATS[f] for f in ("contiguous", "channels_last")):
            scores = [change(SCORES[kind](shape))]
            for kept in (scores[0].numel() // 3, 1):
                args = (scores, [kept], None, None, "layer", transform)
                one, two = oracle.by_threads(lambda args=args: ops.select_mask(*args))
                _same(one, reference(*args))
                assert torch.equal(one[0][0], two[0][0])
                assert torch.equal(one[1], two[1])


def test_threads_at_the_largest_sample():
    torch.manual_seed(0)
    args = ([torch.randn(2048, 2049)], [2048 * 300])
    one, two = oracle.by_threads(lambda: ops.select_mask(*args))
    expected = reference(*args)
    _same(one, expected)
    _same(two, expected)


@contextlib.contextmanager
def _repeated(row, rows):
    """``[rows, n]`` of one row: a file of 64 of them, mapped into memory again and again."""
    n = row.numel() * row.element_size()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    with tempfile.TemporaryFile() as file:
        file.write(row.numpy().tobytes() * 64)
        file.flush()
        memory = mmap.mmap(-1, rows * n, mmap.MAP_PRIVATE, mmap.PROT_READ)
        with warnings.catch_warnings(action="ignore"):  # that it cannot be written
            scores = torch.frombuffer(memory, dtype=row.dtype).view(rows, -1)
        for first in range(0, rows, 64):
            at, size = scores[first].data_ptr(), min(64, rows - first) * n
            fixed = mmap.MAP_SHARED | 0x10  # MAP_FIXED
            made = libc.mmap(at, size, mmap.PROT_READ, fixed, file.fileno(), 0)
            assert made == at, os.strerror(ctypes.get_errno())
        yield scores


def _repeated_rows(row, kept, rows):
    """Words of a row with and without its tied score, and how many of ``rows`` rows keep that."""
    above, tied = divmod(kept, rows)  # every score is there `rows` times
    smallest = row.numel() + 1 - above
    return *(ops.pack_mask((row >= s).view(1, -1)) for s in (smallest - 1, smallest)), tied


def test_one_tensor_of_more_than_2_31_scores():
    rows, columns = 2**15 + 1, 2**16
    row = torch.randperm(columns).float().add(1)
    with _repeated(row, rows) as scores:
        assert torch.equal(scores[-1], row)
        for kept in (1000 * rows + 32000, 2**31 + 17):
            with_tied, without, tied = _repeated_rows(row, kept, rows)
            (words,), _ = ops.select_mask([scores], [kept])
            assert (words[:tied] == with_tied).all()
            assert (words[tied:] == without).all()


def test_a_list_of_more_than_2_31_scores():
    tensors, rows, columns = 17, 2**11, 2**16
    kept = 1000 * rows * tensors + 10 * rows + 3  # the tie ends in the fourth row of tensor 10
    row = torch.randperm(columns).float().add(1)
    with_tied, without, tied = _repeated_rows(row, kept, rows * tensors)
    scores = row.expand(rows, -1).contiguous()
    words, _ = ops.select_mask([scores] * tensors, [kept], scope="global")
    assert all((w == with_tied).all() for w in words[: tied // rows])
    assert all((w == without).all() for w in words[tied // rows + 1 :])
    partly = words[tied // rows]
    assert (partly[: tied % rows] == with_tied).all()
    assert (partly[tied % rows :] == without).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_within(isa, transform):
    torch.manual_seed(0)
    for shape in SHAPES:
        scores = SCORES["ties"](shape)
        for _, _, within in oracle.patterns(shape):
            candidates = int(ops.mask_ops(within, None, "popcount"))
            for kept in _counts(candidates):
                options = ([kept], [within], None, "layer", transform)
                expected = reference([scores], *options)
                for change in oracle.FORMATS.values():
                    _same(ops.select_mask([change(scores)], *options), expected)
                spread = ([kept], [oracle.FORMATS["sliced"](within)], None, "layer", transform)
                _same(ops.select_mask([scores], *spread), expected)


@pytest.mark.parametrize("kind", ["random", "ties", "constant"])
def test_within_with_threads(isa, kind):
    torch.manual_seed(0)
    scores = [SCORES[kind]((300, 437))]
    for density in (0.5, 0.001):
        within = [ops.pack_mask(torch.rand(300, 437) < density)]
        kept = int(ops.mask_ops(within[0], None, "popcount")) // 3
        one, two = oracle.by_threads(lambda w=within, k=kept: ops.select_mask(scores, [k], w))
        expected = reference(scores, [kept], within)
        _same(one, expected)
        _same(two, expected)


def _list(kind="ties"):
    """Tensors of all kinds and their masks of candidates; some hold nothing."""
    shapes = [(17, 63), (), (8, 3, 3, 3), (0, 4), (5,), (4, 70, 3, 2), (3, 64), (2, 3, 4)]
    scores = [oracle.FORMATS["channels_last"](SCORES[kind](s)) for s in shapes]
    densities = [0.5, 1.0, 0.1, 0.5, 0.5, 0.9, 0.0, 0.3]
    masks = [torch.rand(s) < d for s, d in zip(shapes, densities, strict=True)]
    return scores, [ops.pack_mask(m) for m in masks], sum(int(m.sum()) for m in masks)


def test_layer_scope_of_a_list(isa):
    torch.manual_seed(0)
    scores, within, _ = _list("random")
    for part in (0, 2, 3):
        kept = [s.numel() * part // 3 for s in scores]
        _same(ops.select_mask(scores, kept), reference(scores, kept))
    kept = [int(ops.mask_ops(w, None, "popcount")) // 2 for w in within]
    _same(ops.select_mask(scores, kept, within), reference(scores, kept, within))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["random", "ties", "constant", "zeros"])
def test_global_scope(isa, kind, transform):
    torch.manual_seed(0)
    scores, within, candidates = _list(kind)
    total = sum(s.numel() for s in scores)
    for masks, available in ((None, total), (within, candidates)):
        for kept in _counts(available):
            args = (scores, [kept], masks, None, "global", transform)
            _same(ops.select_mask(*args), reference(*args))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_global_scope_equals_one_concatenated_tensor(isa, transform):
    torch.manual_seed(0)
    scores, _, _ = _list("ties")
    flat = torch.cat([s.flatten() for s in scores])
    for kept in _counts(flat.numel()):
        words, _ = ops.select_mask(scores, [kept], None, None, "global", transform)
        masks = [ops.unpack_mask(w, s.shape) for w, s in zip(words, scores, strict=True)]
        joined = torch.cat([m.flatten() for m in masks])
        assert torch.equal(joined, _mask(flat, kept, transform=transform))


def test_global_ties_go_to_the_earlier_tensor_then_to_the_lowest_index(isa):
    first, second = torch.ones(3), torch.ones(2, 2, 2, 2)
    second[0, 0, 0, 0] = 2
    second = second.contiguous(memory_format=torch.channels_last)
    words, _ = ops.select_mask([first, second], [6], None, None, "global")
    assert ops.unpack_mask(words[0], first.shape).all()
    expected = torch.arange(16).view(2, 2, 2, 2) < 3
    assert torch.equal(ops.unpack_mask(words[1], second.shape), expected)


def test_global_scope_with_threads(isa):
    torch.manual_seed(0)
    for kind in ("random", "ties"):
        scores = [SCORES[kind](s) for s in ((64, 64, 3, 3), (100,), (200, 513), (10, 200))]
        args = (scores, [20000], None, None, "global")
        one, two = oracle.by_threads(lambda args=args: ops.select_mask(*args))
        expected = reference(*args)
        _same(one, expected)
        _same(two, expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["random", "ties", "constant"])
def test_min_keep(isa, kind, transform):
    torch.manual_seed(0)
    scores, within, _ = _list(kind)
    scores = [s * 10.0 ** (-i % 3) for i, s in enumerate(scores)]  # some tensors would collapse
    for masks in (None, within):
        available = [
            s.numel() if masks is None else int(ops.mask_ops(w, None, "popcount"))
            for s, w in zip(scores, within, strict=True)
        ]
        for least in (1, 7, 100):
            forced = sum(min(least, a) for a in available)
            for kept in sorted(
                {forced, forced + 1, (forced + sum(available)) // 2, sum(available)}
            ):
                args = (scores, [kept], masks, None, "global", transform, least)
                got = ops.select_mask(*args)
                _same(got, reference(*args))
                counts = [int(ops.mask_ops(w, None, "popcount")) for w in got[0]]
                assert sum(counts) == kept
                assert all(c >= min(least, a) for c, a in zip(counts, available, strict=True))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["random", "ties", "denormal"])
def test_a_hint_changes_nothing(isa, kind, transform):
    torch.manual_seed(0)
    scores = [SCORES[kind](s) for s in ((17, 63), (131072,), (8, 3, 3, 3))]
    bits = torch.tensor([NAN, torch.inf, -torch.inf, -0.0, TINY, 3e38, -1.0]).view(torch.int32)
    patterns = [*bits.tolist(), -1, -(2**31), 2**31 - 1, 0x7F80_0001]
    for scope, kept in (("layer", [300, 40000, 7]), ("global", [40000])):
        expected = reference(scores, kept, None, None, scope, transform)
        _, right = ops.select_mask(scores, kept, None, None, scope, transform)
        wrong = reference(scores, [k // 7 for k in kept], None, None, scope, transform)[1]
        absurd = [torch.full_like(right, p) for p in patterns]
        unfit = [right[:0], right.flatten(), torch.zeros(9, 2, dtype=torch.int32)]
        near = right + torch.tensor([3, 0], dtype=torch.int32)
        spread = oracle.FORMATS["sliced"](right)
        for hint in (right, near, wrong, spread, *absurd, *unfit):
            before = hint.clone()
            _same(ops.select_mask(scores, kept, None, hint, scope, transform), expected)
            assert torch.equal(hint, before)


def test_a_hint_of_the_last_step(isa):
    """As a search uses it: the scores move a little, the last state is the next hint."""
    torch.manual_seed(0)
    scores, state = torch.randn(300, 437), None
    for step in range(4):
        (words,), state = ops.select_mask([scores], [40000], None, state)
        _same(([words], state), reference([scores], [40000]))
        scores = scores + 10.0 ** (step - 5) * torch.randn(scores.shape)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_state_is_the_smallest_kept_score(isa, transform):
    torch.manual_seed(0)
    for kind in ("random", "denormal", "inf"):
        scores = SCORES[kind]((40, 1000))
        for kept in (1, 20000):
            (words,), state = ops.select_mask([scores], [kept], None, None, "layer", transform)
            keys = scores.abs() if transform == "abs" else scores + 0.0
            lowest = keys[ops.unpack_mask(words, scores.shape)].min()
            assert state.tolist() == [[int(lowest.view(torch.int32)), 0]]
    _, state = ops.select_mask([scores], [0], None, None, "layer", transform)
    assert state.view(torch.float32)[0, 0] == torch.inf


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_raises(isa, transform, sign):
    torch.manual_seed(0)
    nan = torch.tensor(NAN).copysign(torch.tensor(sign))
    for shape, at in [((70,), 0), ((300, 437), -1), ((40000,), 20000), ((8, 3, 3, 3), 107)]:
        bad = torch.randn(shape)
        bad.view(-1)[at] = nan
        bad = oracle.FORMATS["channels_last"](bad)
        good, within = torch.randn(5, 9), torch.ones(shape, dtype=torch.bool)
        within.view(-1)[at] = False  # a NaN that could not be kept is a diverged update as well
        masks = [ops.pack_mask(torch.ones(5, 9, dtype=torch.bool)), ops.pack_mask(within)]
        _, hint = ops.select_mask([good, torch.randn(shape)], [5, 9])
        for options in [
            ([9, 0],),
            ([9, 11],),
            ([9, 11], masks),
            ([9, 11], None, hint),
            ([20], None, None, "global"),
            ([20], None, None, "global", "abs", 4),
        ]:
            args = [*options, *(None, None, "layer", transform)[len(options) - 1 :]][:5]
            args[4:5] = [transform, *options[5:]]
            with pytest.raises(ValueError, match=r"select_mask: scores: NaN in tensor 1 \(1 with"):
                ops.select_mask([good, bad], *args)
    with pytest.raises(ValueError, match=r"NaN in tensor 0 \(2 with NaN\)"):
        ops.select_mask([bad, good, bad], [0, 0, 0])


def test_ranked_in_float32_for_equal_scores_of_any_dtype():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        scores = torch.randn(17, 63, dtype=dtype)
        assert torch.equal(_mask(scores, 400), _mask(scores.float(), 400))


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_kept_count_is_exact(density):
    torch.manual_seed(0)
    for shape in [(1,), (2,), (3,), (10,), (10, 10), (64, 3, 3, 3), (64, 64, 3, 3)]:
        for kind in ("random", "ties", "constant"):
            scores = SCORES[kind](shape)
            kept = kept_count(density, scores.numel())
            assert int(_mask(scores, kept).sum()) == kept


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
def test_no_dropped_score_is_above_a_kept_one(kind, transform):
    torch.manual_seed(0)
    scores = SCORES[kind]((300, 100))
    keys = scores.abs() if transform == "abs" else scores
    mask = _mask(scores, 9000, transform=transform)
    assert keys[mask].min() >= keys[~mask].max()


def test_scaling_shifting_and_permuting():
    torch.manual_seed(0)
    order = torch.randperm(30000)
    scores = (torch.randperm(30000) + 1.0) * SCORES["signs"]((30000,))  # no ties
    mask = _mask(scores, 9000)
    for factor in (1e-30, 0.1, 3.0, 1e30):
        assert torch.equal(_mask(scores * factor, 9000), mask)
        assert torch.equal(
            _mask(scores * factor, 9000, transform="identity"),
            _mask(scores, 9000, transform="identity"),
        )
    assert torch.equal(_mask(scores + scores.sign() * 2.0**20, 9000), mask)
    assert torch.equal(_mask(scores[order], 9000), mask[order])
    for transform in TRANSFORMS:
        shaped = _mask(scores.view(100, 300), 9000, transform=transform)
        assert torch.equal(shaped.flatten(), _mask(scores, 9000, transform=transform))


def test_meta():
    scores, within, _ = _list()
    for scope, groups in (("layer", len(scores)), ("global", 1)):
        args = ([0] * groups, within, None, scope)
        words, state = ops.select_mask(scores, *args)
        args = ([0] * groups, [w.to("meta") for w in within], None, scope)
        words2, state2 = ops.select_mask([s.to("meta") for s in scores], *args)
        for a, b in zip((*words, state), (*words2, state2), strict=True):
            assert b.is_meta
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_scores_that_need_gradients_give_plain_words():
    scores = torch.randn(17, 63, requires_grad=True)
    (words,), state = ops.select_mask([scores], [100])
    assert not words.requires_grad
    assert not state.requires_grad
    assert torch.equal(words, ops.select_mask([scores.detach()], [100])[0][0])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_opcheck(scope):
    torch.manual_seed(0)
    scores = [torch.randn(17, 63), torch.randn(8, 3, 3, 3)]
    within = [ops.pack_mask(torch.rand(s.shape) < 0.9) for s in scores]
    kept = [100, 50] if scope == "layer" else [150]
    _, state = ops.select_mask(scores, kept, within, None, scope)
    torch.library.opcheck(ops.select_mask, (scores, kept, within, state, scope, "identity"))
    floor = 3 if scope == "global" else 0
    torch.library.opcheck(ops.select_mask, (scores, kept), {"scope": scope, "min_keep": floor})


def test_compiled():
    torch.manual_seed(0)

    def op(a, b):
        (first, second), state = ops.select_mask([a * 2, b], [150], None, None, "global")
        return ops.apply_mask(a, first), second, state

    args = torch.randn(17, 63), torch.randn(8, 3, 3, 3)
    for got, expected in zip(oracle.compiled(op)(*args), op(*args), strict=True):
        assert torch.equal(got, expected)


def test_errors():
    a, b = torch.randn(5, 70), torch.randn(3, 4)
    words = ops.pack_mask(torch.arange(350).view(5, 70) < 30)
    every = ops.pack_mask(torch.ones(3, 4, dtype=torch.bool))
    for error, text, args in [
        (ValueError, "scope: got 'net', accepted: layer, global", ([a], [1], None, None, "net")),
        (
            ValueError,
            "transform: got 'square', accepted: abs, identity",
            ([a], [1], None, None, "layer", "square"),
        ),
        (TypeError, r"scores: got torch\.float64, need float32", ([a, b.double()], [1, 1])),
        (TypeError, r"scores: got torch\.int64, need float32", ([b.long()], [1])),
        (ValueError, "kept: got 351, need 0 <= kept <= 350, the number of", ([a], [351])),
        (ValueError, "kept: got -1, need 0 <= kept <= 350", ([a], [-1])),
        (ValueError, "kept: got 13, need 0 <= kept <= 12", ([a, b], [13, 13])),
        (ValueError, "kept: got 31, need 0 <= kept <= 30", ([a], [31], [words])),
        (ValueError, "kept: got 363, need .* <= 362", ([a, b], [363], None, None, "global")),
        (ValueError, "kept: got 43, need .* <= 42", ([a, b], [43], [words, every], None, "global")),
        (ValueError, "kept: got 1 counts, need 2", ([a, b], [1])),
        (ValueError, "kept: got 2 counts, need 1", ([a, b], [1, 1], None, None, "global")),
        (
            ValueError,
            "kept: got 31, but min_keep=20 a tensor alone keeps 32",
            ([a, b], [31], None, None, "global", "abs", 20),
        ),
        (
            ValueError,
            "min_keep: got -1 with scope='global', need 0, or",
            ([a, b], [31], None, None, "global", "abs", -1),
        ),
        (
            ValueError,
            "min_keep: got 2 with scope='layer', need 0, or",
            ([a], [31], None, None, "layer", "abs", 2),
        ),
        (ValueError, "within: got 1 masks for 2 tensors", ([a, b], [1, 1], [words])),
        (
            ValueError,
            r"within: got torch\.int32 \(4, 4\), need int32 \(5, 4\)",
            ([a], [1], [words[1:]]),
        ),
        (ValueError, r"within: got torch\.int64 \(5, 4\)", ([a], [1], [words.long()])),
    ]:
        with pytest.raises(error, match="select_mask: " + text):
            ops.select_mask(*args)
