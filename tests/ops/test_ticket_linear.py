from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops, prng
from sparseticket.reference.masked_linear import masked_linear
from sparseticket.reference.regenerate import regenerate
from sparseticket.reference.ticket_linear import ticket_linear as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIGMA = prng.round_bf16(0.37)  # as modules round it: every dtype holds the same weights
LAST = 2**63 - 1
# (batch rows, K, O); more than one generator chunk (4,096 weights) in a row, no elements
SIZES = [
    *[(1, 1, 1), (1, 63, 3), (3, 17, 100), (4, 100, 17), (2, 130, 1), (2, 4096, 2), (5, 8300, 3)],
    *[(17, 3, 1), (63, 100, 3), (0, 5, 4), (2, 0, 4), (100, 0, 4), (3, 5, 0)],
]


def _inputs(batch, k, rows, dtype, dist="signed_constant", seed=5, layer=7, bias=True):
    """x, the weight that the op must use, bias."""
    weight = regenerate(seed, layer, (rows, k), dist, SIGMA, dtype=dtype)
    return [
        torch.randn(batch, k, dtype=dtype),
        weight,
        torch.randn(rows, dtype=dtype) if bias else None,
    ]


def _pair(words, dist="signed_constant", seed=5, layer=7, signs=None):
    return (
        lambda x, w, b: ops.ticket_linear(x, words, b, seed, layer, dist, SIGMA, signs),
        lambda x, w, b: masked_linear(x, w, words, b),
    )


@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32, torch.bfloat16), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype):
    torch.manual_seed(0)
    for i, size in enumerate(SIZES):
        for _, _, words in oracle.patterns((size[2], size[1])):
            inputs = _inputs(*size, dtype, bias=i % 2 == 0)
            choice = ops.explain_op(
                "ticket_linear", inputs[0], words, None, 5, 7, "signed_constant", SIGMA
            )
            assert choice.kernel.removesuffix(f" {isa}") == path
            oracle.compare(*_pair(words), inputs, [0, 2])


@pytest.mark.parametrize("dist", ["uniform", "normal"])
def test_other_distributions_are_materialised(path, dist):
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((5, 70), "rows"))
    for dtype in DTYPES:
        inputs = _inputs(3, 70, 5, dtype, dist)
        choice = ops.explain_op("ticket_linear", inputs[0], words, None, 5, 7, dist, SIGMA)
        assert choice.kernel == "materialised"
        oracle.compare(*_pair(words, dist), inputs, [0, 2])


def test_the_reference_is_masked_linear_of_the_regenerated_weight():
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((5, 70), "rows"))
    for dist in prng.DISTRIBUTIONS:
        x, weight, bias = _inputs(3, 70, 5, torch.float64, dist)
        got = reference(x, words, bias, 5, 7, dist, SIGMA)
        assert torch.equal(got, masked_linear(x, weight, words, bias))


@pytest.mark.parametrize(("seed", "layer"), [(0, 0), (LAST, -1), (1, -LAST - 1), (0, LAST)])
def test_seeds_and_layers(path, seed, layer):
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((5, 70), "all"))
    inputs = _inputs(3, 70, 5, torch.float32, seed=seed, layer=layer)
    oracle.compare(*_pair(words, seed=seed, layer=layer), inputs, [0, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_signs_change_nothing(isa, path, dtype):
    torch.manual_seed(0)
    for k in (70, 4200):
        signs = ops.sign_words(5, 7, (5, k))
        spread = oracle.FORMATS["sliced"](signs)
        _, _, words = next(oracle.patterns((5, k), "rows"))
        inputs = _inputs(3, k, 5, dtype)
        expected = _pair(words)[0](*inputs)
        for given in (signs, spread):
            assert torch.equal(_pair(words, signs=given)[0](*inputs), expected)


@pytest.mark.parametrize("path", ["fused"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_threads_give_equal_bits(isa, path, dtype):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(63, 300) < 0.5)
    inputs = _inputs(4, 300, 63, dtype)
    assert torch.equal(*oracle.by_threads(lambda: _pair(words)[0](*inputs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain_tells_what_runs(calls, dtype):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    most = oracle.module_of("masked_linear").FUSED_ROWS.get(("seed", dtype), 1)
    for dist in ("signed_constant", "normal"):
        for batch in (1, most, most + 1):
            args = (torch.randn(batch, 70, dtype=dtype), words, None, 5, 7, dist, SIGMA)
            fused = ops.explain_op("ticket_linear", *args).kernel.startswith("fused")
            assert fused == (batch <= most and dtype != torch.float64 and dist == "signed_constant")
            calls.clear()
            ops.ticket_linear(*args)
            assert calls == (["ticket_linear"] if fused else [])


@pytest.mark.parametrize("layout", oracle.FORMATS)
def test_layouts(path, layout):
    torch.manual_seed(0)
    change = oracle.FORMATS[layout]
    _, _, words = next(oracle.patterns((17, 63), "rows"))
    for dtype in DTYPES:
        x, weight, bias = _inputs(5, 63, 17, dtype)
        oracle.compare(*_pair(change(words)), [change(x), weight, change(bias)], [0, 2])


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 2)])
def test_leading_dimensions(path, lead):
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((5, 70), "rows"))
    _, weight, bias = _inputs(1, 70, 5, torch.float32)
    oracle.compare(*_pair(words), [torch.randn(*lead, 70), weight, bias], [0, 2])


def test_gradcheck():
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((3, 5), "rows"))
    x, weight, bias = (oracle.leaf(t) for t in _inputs(4, 5, 3, torch.float64))

    def op(x, b):
        return _pair(words)[0](x, weight, b)

    assert torch.autograd.gradcheck(op, (x, bias))
    assert torch.autograd.gradgradcheck(op, (x, bias))


def test_opcheck(path):
    torch.manual_seed(0)
    words, signs = ops.pack_mask(torch.rand(5, 70) < 0.5), ops.sign_words(5, 7, (5, 70))
    for dtype in DTYPES:
        x, _, bias = (oracle.leaf(t) for t in _inputs(3, 70, 5, dtype))
        recipe = (5, 7, "signed_constant", SIGMA)
        torch.library.opcheck(ops.ticket_linear, (x, words, bias, *recipe))
        torch.library.opcheck(ops.ticket_linear, (x, words, None, *recipe, signs))


def test_compiled(path):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    for dist in ("signed_constant", "normal"):
        oracle.check_compiled(_pair(words, dist)[0], _inputs(3, 70, 5, torch.float32, dist), [0, 2])


def test_errors():
    x, words = torch.randn(3, 70), torch.zeros(5, 4, dtype=torch.int32)
    bias, recipe = torch.randn(5), (5, 7, "signed_constant", SIGMA)
    for error, text, args in [
        (ValueError, r"x: got shape \(\), need last dimension", (x[0, 0], words, None, *recipe)),
        (ValueError, r"words: .*\(5, 4\), need int32 \(5, 2\)", (x[:, :9], words, None, *recipe)),
        (ValueError, r"words: got torch\.int64", (x, words.long(), None, *recipe)),
        (TypeError, r"x: got torch\.int64, need a floating", (x.long(), words, None, *recipe)),
        (ValueError, r"bias: got torch\.float32 \(4,\), need", (x, words, bias[1:], *recipe)),
        (ValueError, r"bias: got torch\.float64 \(5,\)", (x, words, bias.double(), *recipe)),
        (ValueError, r"dist: got 'x', accepted: signed", (x, words, None, 5, 7, "x", SIGMA)),
        (
            ValueError,
            r"signs: .*\(4, 4\), need int32 \(5, 4\)",
            (x, words, None, *recipe, words[1:]),
        ),
    ]:
        with pytest.raises(error, match="ticket_linear: " + text):
            ops.ticket_linear(*args)
    with pytest.raises(ValueError, match=r"seed: got -1, need an integer in \[0, 2\*\*63\)"):
        ops.ticket_linear(x, words, None, -1, 7, "signed_constant", SIGMA)
