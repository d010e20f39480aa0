from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops, prng
from sparseticket.reference.masked_conv2d import masked_conv2d
from sparseticket.reference.regenerate import regenerate
from sparseticket.reference.ticket_conv2d import ticket_conv2d as reference

MODULE = oracle.module_of("masked_conv2d")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIGMA = prng.round_bf16(0.37)  # as modules round it: every dtype holds the same weights
LAST = 2**63 - 1
SMALL = ((2, 4, 5, 6), (6, 2, 3, 2), ((2, 1), (1, 0), (1, 2), 2))


def _inputs(x_shape, shape, dtype, dist="signed_constant", seed=5, layer=7, bias=True):
    """x, the weight that the op must use, bias."""
    return [
        torch.randn(x_shape, dtype=dtype),
        regenerate(seed, layer, shape, dist, SIGMA, dtype=dtype),
        torch.randn(shape[0], dtype=dtype) if bias else None,
    ]


def _pair(words, geometry, dist="signed_constant", seed=5, layer=7, signs=None):
    return (
        lambda x, w, b: ops.ticket_conv2d(
            x, words, b, seed, layer, dist, SIGMA, w.shape, *geometry, signs
        ),
        lambda x, w, b: masked_conv2d(x, w, words, b, *geometry),
    )


@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype):
    torch.manual_seed(0)
    for i, (x_shape, shape, *geometry) in enumerate(oracle.CONVS):
        for _, _, words in oracle.patterns(shape):
            inputs = _inputs(x_shape, shape, dtype, bias=i % 2 == 0)
            choice = ops.explain_op(
                *("ticket_conv2d", inputs[0], words, None, 5, 7, "signed_constant", SIGMA),
                *(shape, *geometry),
            )
            assert choice.kernel.removesuffix(f" {isa}") == path
            oracle.compare(*_pair(words, geometry), inputs, [0, 2])


@pytest.mark.parametrize("dist", ["uniform", "normal"])
def test_other_distributions_are_materialised(path, dist):
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    _, _, words = next(oracle.patterns(shape, "rows"))
    for dtype in DTYPES:
        inputs = _inputs(x_shape, shape, dtype, dist)
        args = (inputs[0], words, None, 5, 7, dist, SIGMA, shape, *geometry)
        assert ops.explain_op("ticket_conv2d", *args).kernel == "materialised"
        oracle.compare(*_pair(words, geometry, dist), inputs, [0, 2])


def test_the_reference_is_masked_conv2d_of_the_regenerated_weight():
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    _, _, words = next(oracle.patterns(shape, "rows"))
    for dist in prng.DISTRIBUTIONS:
        x, weight, bias = _inputs(x_shape, shape, torch.float64, dist)
        got = reference(x, words, bias, 5, 7, dist, SIGMA, shape, *geometry)
        assert torch.equal(got, masked_conv2d(x, weight, words, bias, *geometry))


@pytest.mark.parametrize(("seed", "layer"), [(0, 0), (LAST, -1), (1, -LAST - 1), (0, LAST)])
def test_seeds_and_layers(path, seed, layer):
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    _, _, words = next(oracle.patterns(shape, "all"))
    inputs = _inputs(x_shape, shape, torch.float32, seed=seed, layer=layer)
    oracle.compare(*_pair(words, geometry, seed=seed, layer=layer), inputs, [0, 2])


def test_kept_signs_change_nothing(isa, path):
    torch.manual_seed(0)
    for x_shape, shape, *geometry in oracle.CONVS:
        signs = ops.sign_words(5, 7, shape)
        _, _, words = next(oracle.patterns(shape, "rows"))
        inputs = _inputs(x_shape, shape, torch.float32)
        expected = _pair(words, geometry)[0](*inputs)
        for given in (signs, oracle.FORMATS["sliced"](signs)):
            assert torch.equal(_pair(words, geometry, signs=given)[0](*inputs), expected)


@pytest.mark.parametrize("path", ["fused"], indirect=True)
def test_threads_give_equal_bits(isa, path):
    torch.manual_seed(0)
    for x_shape, shape, *geometry in oracle.CONVS:
        _, _, words = next(oracle.patterns(shape, "rows"))
        inputs = _inputs(x_shape, shape, torch.float32)
        run = _pair(words, geometry)[0]
        assert torch.equal(*oracle.by_threads(lambda run=run, inputs=inputs: run(*inputs)))


def test_explain_tells_what_runs(calls):
    torch.manual_seed(0)
    shape, geometry = (10, 10, 3, 3), ((1, 1), (1, 1), (1, 1), 1)
    kept = [round(900 * d) for d in (MODULE.FUSED_DENSITY, MODULE.FUSED_DENSITY + 0.1)]
    for count in kept:
        (words,), _ = ops.select_mask([torch.rand(shape)], [count])
        for dist in ("signed_constant", "uniform"):
            for batch in (1, 2, 20):
                x = torch.randn(batch, 10, 8, 8)
                args = (x, words, None, 5, 7, dist, SIGMA, shape, *geometry)
                fused = ops.explain_op("ticket_conv2d", *args).kernel.startswith("fused")
                few = count == kept[0] and batch * 64 >= MODULE.FEW_PIXELS
                assert fused == (few and dist == "signed_constant")
                calls.clear()
                ops.ticket_conv2d(*args)
                assert calls == (["ticket_conv2d"] if fused else [])


@pytest.mark.parametrize("layout", oracle.FORMATS)
def test_layouts(path, layout):
    torch.manual_seed(0)
    shape, geometry = (6, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 1)
    _, _, words = next(oracle.patterns(shape, "rows"))
    for x_shape in [(2, 4, 7, 5), (1, 4, 7, 5), (4, 7, 5)]:
        x, weight, bias = _inputs(x_shape, shape, torch.float32)
        x = oracle.FORMATS[layout](x)
        oracle.compare(*_pair(words, geometry), [x, weight, bias], [0, 2])
        args = (oracle.leaf(x), words, bias, 5, 7, "signed_constant", SIGMA, shape, *geometry)
        torch.library.opcheck(
            ops.ticket_conv2d, args, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("x_shape", [(2, 4, 5, 6), (4, 5, 6)])
def test_gradcheck(x_shape):
    torch.manual_seed(0)
    _, shape, geometry = SMALL
    _, _, words = next(oracle.patterns(shape, "rows"))
    x, weight, bias = (oracle.leaf(t) for t in _inputs(x_shape, shape, torch.float64))

    def op(x, b):
        return _pair(words, geometry)[0](x, weight, b)

    assert torch.autograd.gradcheck(op, (x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (x, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(path, dtype):
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    words, signs = ops.pack_mask(torch.rand(shape) < 0.5), ops.sign_words(5, 7, shape)
    x, _, bias = (oracle.leaf(t) for t in _inputs(x_shape, shape, dtype))
    recipe = (5, 7, "signed_constant", SIGMA, shape, *geometry)
    torch.library.opcheck(ops.ticket_conv2d, (x, words, bias, *recipe))
    torch.library.opcheck(ops.ticket_conv2d, (oracle.leaf(x[0]), words, None, *recipe, signs))


def test_compiled(path):
    torch.manual_seed(0)
    for x_shape, shape, *geometry in oracle.CONVS[2:4]:
        words = ops.pack_mask(torch.rand(shape) < 0.5)
        inputs = _inputs(x_shape, shape, torch.float32)
        oracle.check_compiled(_pair(words, geometry)[0], inputs, [0, 2])


def test_errors():
    x, words = torch.randn(2, 4, 7, 5), ops.pack_mask(torch.ones(6, 2, 3, 3).bool())
    shape, rest = (6, 2, 3, 3), ((1, 1), (1, 1), (1, 1))
    bias, dist = torch.randn(6), "signed_constant"
    for error, text, x_, words_, bias_, dist_, shape_, groups, signs in [
        (ValueError, r"x: got shape \(2, 3, 7, 5\)", x[:, 1:], words, bias, dist, shape, 2, None),
        (ValueError, r"weight: got \(6, 2, 3\)", x, words, bias, dist, shape[:3], 2, None),
        (ValueError, r"groups: got 4, need a div", x, words, bias, dist, shape, 4, None),
        (ValueError, r"words: .*need int32 \(6, 2\)", x, words[1:], bias, dist, shape, 2, None),
        (ValueError, r"signs: .*need int32 \(6, 2\)", x, words, bias, dist, shape, 2, words[1:]),
        (ValueError, r"bias: .*\(5,\), need", x, words, bias[1:], dist, shape, 2, None),
        (ValueError, r"dist: got 'x', accepted: signed", x, words, bias, "x", shape, 2, None),
        (TypeError, r"x: got torch\.int64", x.long(), words, None, dist, shape, 2, None),
    ]:
        with pytest.raises(error, match="ticket_conv2d: " + text):
            ops.ticket_conv2d(x_, words_, bias_, 5, 7, dist_, SIGMA, shape_, *rest, groups, signs)
    with pytest.raises(ValueError, match=r"seed: got -1, need an integer in \[0, 2\*\*63\)"):
        ops.ticket_conv2d(x, words, None, -1, 7, dist, SIGMA, shape, *rest, 2)
