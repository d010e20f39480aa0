from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F

from sparseticket import ops
from sparseticket.reference.masked_conv2d import masked_conv2d as reference

MODULE = oracle.module_of("masked_conv2d")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SMALL = ((2, 4, 5, 6), (6, 2, 3, 2), ((2, 1), (1, 0), (1, 2), 2))


def _inputs(x_shape, weight_shape, dtype, bias=True):
    return [
        torch.randn(x_shape, dtype=dtype),
        torch.randn(weight_shape, dtype=dtype),
        torch.randn(weight_shape[0], dtype=dtype) if bias else None,
    ]


def _pair(words, geometry):
    return (
        lambda x, w, b: ops.masked_conv2d(x, w, words, b, *geometry),
        lambda x, w, b: reference(x, w, words, b, *geometry),
    )


@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype):
    torch.manual_seed(0)
    for i, (x_shape, weight_shape, *geometry) in enumerate(oracle.CONVS):
        for _, _, words in oracle.patterns(weight_shape):
            inputs = _inputs(x_shape, weight_shape, dtype, bias=i % 2 == 0)
            choice = ops.explain_op("masked_conv2d", *inputs[:2], words, None, *geometry)
            assert choice.kernel.removesuffix(f" {isa}") == path
            oracle.compare(*_pair(words, geometry), inputs, [0, 1, 2])


def test_full_mask_is_the_plain_layer_and_empty_the_bias(path):
    torch.manual_seed(0)
    for x_shape, weight_shape, *geometry in oracle.CONVS:
        x, weight, bias = _inputs(x_shape, weight_shape, torch.float32)
        words = {name: w for name, _, w in oracle.patterns(weight_shape, "all none")}
        dense = F.conv2d(x, weight, bias, *geometry)
        full = ops.masked_conv2d(x, weight, words["all"], bias, *geometry)
        torch.testing.assert_close(full, dense, rtol=1e-4, atol=1e-4)
        empty = ops.masked_conv2d(x, weight, words["none"], bias, *geometry)
        assert torch.equal(empty, bias[:, None, None].expand_as(dense))
        assert not ops.masked_conv2d(x, weight, words["none"], None, *geometry).any()


def test_explain_tells_what_runs(calls):
    torch.manual_seed(0)
    words = {}
    for density in (MODULE.FUSED_DENSITY, MODULE.FUSED_DENSITY + 0.1):
        scores = torch.rand(10, 10, 3, 3)
        (words[density],), _ = ops.select_mask([scores], [round(density * 900)])
    for density, packed in words.items():
        for shape in [(10, 12, 12), (1, 10, 12, 12), (2, 10, 8, 8), (20, 10, 8, 8)]:
            for dtype in DTYPES:
                _explained(calls, packed, shape, dtype, density <= MODULE.FUSED_DENSITY)
    _explained(calls, words[MODULE.FUSED_DENSITY], (1, 10, 8, 8), torch.float32, False)
    few = ops.pack_mask(torch.rand(10, 10, 3, 3) < MODULE.FEW_DENSITY / 4)
    _explained(calls, few, (1, 10, 8, 8), torch.float32, True)


def _explained(calls, words, x_shape, dtype, sparse):
    x, weight, bias = _inputs(x_shape, (10, 10, 3, 3), dtype)
    args = (x, weight, words, bias, (1, 1), (1, 1), (1, 1), 1)
    choice = ops.explain_op("masked_conv2d", *args)
    fused = choice.kernel.startswith("fused")
    assert fused == (sparse and dtype == torch.float32)
    assert choice.reason
    calls.clear()
    ops.masked_conv2d(*args)
    assert calls == (["masked_conv2d"] if fused else [])


@pytest.mark.parametrize("path", ["fused"], indirect=True)
def test_threads_give_equal_bits(isa, path):
    torch.manual_seed(0)
    for x_shape, weight_shape, *geometry in oracle.CONVS:
        _, _, words = next(oracle.patterns(weight_shape, "rows"))
        inputs = _inputs(x_shape, weight_shape, torch.float32)
        run = _pair(words, geometry)[0]
        assert torch.equal(*oracle.by_threads(lambda run=run, inputs=inputs: run(*inputs)))


@pytest.mark.parametrize("weight_layout", oracle.FORMATS)
@pytest.mark.parametrize("x_layout", oracle.FORMATS)
def test_layouts(path, x_layout, weight_layout):
    torch.manual_seed(0)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    _, _, words = next(oracle.patterns((6, 4, 3, 3), "rows"))
    for x_shape in [(2, 4, 7, 5), (1, 4, 7, 5), (4, 7, 5)]:
        x, weight, bias = _inputs(x_shape, (6, 4, 3, 3), torch.float32)
        x, weight = oracle.FORMATS[x_layout](x), oracle.FORMATS[weight_layout](weight)
        oracle.compare(*_pair(words, geometry), [x, weight, bias], [0, 1, 2])
        args = (oracle.leaf(x), oracle.leaf(weight), words, bias, *geometry)
        torch.library.opcheck(
            ops.masked_conv2d, args, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_grad_ignores_the_mask(path, dtype):
    torch.manual_seed(0)
    x_shape, weight_shape, geometry = SMALL
    inputs = _inputs(x_shape, weight_shape, dtype)
    mask = torch.rand(weight_shape) < 0.3
    words, full = ops.pack_mask(mask), ops.pack_mask(torch.ones(weight_shape, dtype=torch.bool))

    def op(dense_grad):
        return lambda x, w, b: ops.masked_conv2d(x, w, words, b, *geometry, dense_grad)

    _, grad, (gx, gw) = oracle.gradients(op(True), inputs, [0, 1])
    _, _, (gx2, gw2) = oracle.gradients(op(False), inputs, [0, 1], grad)
    assert torch.equal(gx, gx2)
    assert torch.equal(gw2, torch.where(mask, gw, 0))
    assert bool((gw[~mask] != 0).all())
    sums = []
    for change in (lambda t: t, torch.abs, torch.ones_like):
        *changed, changed_grad = (change(t.double()) for t in (*inputs, grad))
        plain = oracle.gradients(_pair(full, geometry)[1], changed, [1], changed_grad)
        sums.append(plain[2][0])
    oracle.assert_bounded(gw, *sums)


@pytest.mark.parametrize("x_shape", [(2, 4, 5, 6), (4, 5, 6)])
def test_gradcheck(x_shape):
    torch.manual_seed(0)
    _, weight_shape, geometry = SMALL
    _, _, words = next(oracle.patterns(weight_shape, "rows"))
    inputs = [oracle.leaf(t) for t in _inputs(x_shape, weight_shape, torch.float64)]
    op = _pair(words, geometry)[0]
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


def test_second_order(path):
    """A gradient of a gradient's norm, as GraSP needs it, in float32."""
    torch.manual_seed(0)
    x_shape, weight_shape, geometry = SMALL
    words = ops.pack_mask(torch.rand(weight_shape) < 0.5)
    x, weight, bias = _inputs(x_shape, weight_shape, torch.float32)

    def product(op, dtype):
        w = weight.to(dtype).requires_grad_()
        loss = op(x.to(dtype), w, bias.to(dtype)).pow(3).sum()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), w)[0]

    got, expected = (
        product(op, dtype)
        for op, dtype in zip(_pair(words, geometry), (torch.float32, torch.float64), strict=True)
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(path, dtype):
    torch.manual_seed(0)
    x_shape, weight_shape, geometry = SMALL
    words = ops.pack_mask(torch.rand(weight_shape) < 0.5)
    x, weight, bias = (oracle.leaf(t) for t in _inputs(x_shape, weight_shape, dtype))
    torch.library.opcheck(ops.masked_conv2d, (x, weight, words, bias, *geometry))
    unbatched = (oracle.leaf(x[0]), weight, words, None, *geometry, True)
    torch.library.opcheck(ops.masked_conv2d, unbatched)


def test_compiled(path):
    torch.manual_seed(0)
    for x_shape, weight_shape, *geometry in oracle.CONVS[2:4]:
        words = ops.pack_mask(torch.rand(weight_shape) < 0.5)
        inputs = _inputs(x_shape, weight_shape, torch.float32)
        oracle.check_compiled(_pair(words, geometry)[0], inputs, [0, 1, 2])


def test_errors():
    x, weight, bias = _inputs((2, 4, 7, 5), (6, 2, 3, 3), torch.float32)
    words, ok = ops.pack_mask(torch.ones(6, 2, 3, 3).bool()), ((1, 1), (1, 1), (1, 1))
    for error, text, args, groups in [
        (ValueError, r"masked_conv2d: x: got shape \(2, 3, 7, 5\)", (x[:, 1:], weight, words), 2),
        (ValueError, r"masked_conv2d: x: got shape \(7, 5\)", (x[0, 0], weight, words), 2),
        (ValueError, r"masked_conv2d: weight: got \(6, 2, 3\)", (x, weight[..., 0], words), 2),
        (TypeError, r"masked_conv2d: weight: got torch\.float64", (x, weight.double(), words), 2),
        (ValueError, r"masked_conv2d: groups: got 4, need a divisor of 6", (x, weight, words), 4),
        (ValueError, r"masked_conv2d: groups: got 0, need", (x, weight, words), 0),
        (ValueError, r"masked_conv2d: x: .*C = 2", (x, weight, words), 1),
        (ValueError, r"masked_conv2d: words: .*need int32 \(6, 2\)", (x, weight, words[1:]), 2),
        (TypeError, r"masked_conv2d: x: got torch\.int64", (x.long(), weight.long(), words), 2),
    ]:
        with pytest.raises(error, match=text):
            ops.masked_conv2d(*args, None, *ok, groups)
    with pytest.raises(ValueError, match=r"masked_conv2d: bias: .*\(5,\), need torch\.float32 \(6"):
        ops.masked_conv2d(x, weight, words, bias[1:], *ok, 2)


@pytest.mark.parametrize(
    ("text", "geometry"),
    [
        (r"x: got shape \(1, 4, 2, 2\), smaller than the kernel", ((1, 1), (0, 0), (1, 1), 1)),
        (r"stride: got \(0, 1\), need two integers >= 1", ((0, 1), (1, 1), (1, 1), 1)),
        (r"padding: got \(-1, 1\), need two integers >= 0", ((1, 1), (-1, 1), (1, 1), 1)),
        (r"dilation: got \(1, 0\), need two integers >= 1", ((1, 1), (1, 1), (1, 0), 1)),
        (r"stride: got \(1,\), need two integers", ((1,), (1, 1), (1, 1), 1)),
    ],
)
def test_bad_geometry(path, text, geometry):
    x, weight, _ = _inputs((1, 4, 2, 2), (6, 4, 3, 3), torch.float32)
    words = ops.pack_mask(torch.ones(weight.shape).bool())
    for op, args in {
        "masked_conv2d": (x, weight, words, None),
        "ticket_conv2d": (x, words, None, 1, 2, "signed_constant", 0.5, weight.shape),
        "popup_conv2d": (x, weight, weight, words, None, "abs", 1, 2, 0.5),
    }.items():
        with pytest.raises(ValueError, match=f"{op}: {text}"):
            getattr(ops, op)(*args, *geometry)
