from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import _C, ops
from sparseticket.reference.masked_linear import masked_linear as reference

MODULE = oracle.module_of("masked_linear")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# (batch rows, K, O); fused and materialised sizes, odd ones, more than one unit, no elements
SIZES = [
    *[(1, 1, 1), (1, 63, 3), (3, 17, 100), (4, 100, 17), (2, 130, 1), (1, 3000, 3)],
    *[(5, 63, 17), (100, 17, 63), (17, 3, 1), (63, 100, 3)],
    *[(0, 5, 4), (2, 0, 4), (100, 0, 4), (3, 5, 0), (100, 5, 0)],
]


def _inputs(batch, k, rows, dtype, bias=True):
    x, weight = torch.randn(batch, k, dtype=dtype), torch.randn(rows, k, dtype=dtype)
    return [x, weight, torch.randn(rows, dtype=dtype) if bias else None]


def _pair(words, transposed=False):
    return (
        lambda x, w, b: ops.masked_linear(x, w, words, b, False, transposed),
        lambda x, w, b: reference(x, w, words, b, False, transposed),
    )


@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32, torch.bfloat16), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype):
    torch.manual_seed(0)
    for i, size in enumerate(SIZES):
        for _, _, words in oracle.patterns((size[2], size[1])):
            inputs = _inputs(*size, dtype, bias=i % 2 == 0)
            choice = ops.explain_op("masked_linear", inputs[0], inputs[1], words)
            assert choice.kernel.removesuffix(f" {isa}") == path
            oracle.compare(*_pair(words), inputs, [0, 1, 2])


LIVE = [("live", isa, dtype) for isa in _C.isas() for dtype in DTYPES[:2]]


@pytest.mark.parametrize(("path", "isa", "dtype"), LIVE, indirect=["path", "isa"])
def test_live_walk_and_transposed(path, isa, dtype):
    """The walk over live weights, both ways; sizes beyond one panel, block and span of lists."""
    torch.manual_seed(0)
    for i, (batch, k, rows) in enumerate([*SIZES, (33, 2100, 5), (70, 300, 40)]):
        for _, _, words in oracle.patterns((rows, k)):
            x, weight, bias = _inputs(batch, k, rows, dtype, bias=i % 2 == 0)
            assert ops.explain_op("masked_linear", x, weight, words).kernel == f"live {isa}"
            oracle.compare(*_pair(words), [x, weight, bias], [0, 1, 2])
            turned = [torch.randn(batch, rows, dtype=dtype), weight, torch.randn(k, dtype=dtype)]
            oracle.compare(*_pair(words, transposed=True), turned, [0, 1, 2])


@pytest.mark.parametrize("path", ["fused", "live", "materialised"], indirect=True)
def test_transposed(path):
    torch.manual_seed(0)
    for dtype in DTYPES:
        _, _, words = next(oracle.patterns((17, 63), "rows"))
        x, weight, bias = torch.randn(2, 3, 17), torch.randn(17, 63), torch.randn(63)
        inputs = [t.to(dtype) for t in (x, weight, bias)]
        oracle.compare(*_pair(words, transposed=True), inputs, [0, 1, 2])
        oracle.check_compiled(_pair(words, transposed=True)[0], inputs, [0, 1, 2])
    with pytest.raises(ValueError, match=r"x: got shape \(2, 3, 16\), need last dimension 17"):
        ops.masked_linear(x[..., 1:], weight, words, None, False, True)


@pytest.mark.parametrize("path", ["live"], indirect=True)
@pytest.mark.parametrize("transposed", [False, True])
def test_live_walk_is_the_same_for_any_threads(isa, path, transposed):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(63, 300) < 0.5)
    x, weight = torch.randn(40, 63 if transposed else 300), torch.randn(63, 300)
    made = oracle.by_threads(lambda: ops.masked_linear(x, weight, words, None, False, transposed))
    assert torch.equal(*made)


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain_tells_what_runs(calls, dtype):
    torch.manual_seed(0)
    called = {"fused": ["masked_linear"], "live": ["masked_linear_live"], "materialised": []}
    seen = set()
    for density in (0.0, 0.05, 0.4, 0.9):
        words = ops.pack_mask(torch.rand(5, 70) < density)
        for batch in (1, 4, 5, 8, 9, 64, 65, 128, 129):
            x, weight, bias = _inputs(batch, 70, 5, dtype)
            choice = ops.explain_op("masked_linear", x, weight, words, bias)
            kernel = choice.kernel.partition(" ")[0]
            assert choice.reason
            calls.clear()
            ops.masked_linear(x, weight, words, bias)
            assert calls == called[kernel]
            seen.add(kernel)
    assert seen == ({"materialised"} if dtype == torch.float64 else set(called))


@pytest.mark.parametrize("path", ["fused"], indirect=True)  # a dense GEMM promises nothing
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_threads_give_equal_bits(isa, path, dtype):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(63, 300) < 0.5)
    inputs = _inputs(4, 300, 63, dtype)
    made = oracle.by_threads(lambda: ops.masked_linear(inputs[0], inputs[1], words, inputs[2]))
    assert torch.equal(*made)


@pytest.mark.parametrize("layout", oracle.FORMATS)
def test_layouts(path, layout):
    torch.manual_seed(0)
    change = oracle.FORMATS[layout]
    for dtype in DTYPES:
        _, _, words = next(oracle.patterns((17, 63), "rows"))
        inputs = [change(t) for t in _inputs(5, 63, 17, dtype)]
        oracle.compare(*_pair(change(words)), inputs, [0, 1, 2])


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 2), (2, 3, 5)])
def test_leading_dimensions(path, lead):
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 70), torch.randn(5)
    _, _, words = next(oracle.patterns((5, 70), "rows"))
    x = torch.randn(*lead, 70)
    assert ops.masked_linear(x, weight, words, bias).shape == (*lead, 5)
    oracle.compare(*_pair(words), [x, weight, bias], [0, 1, 2])


def test_empty_rows_give_the_bias_exactly(isa, path):
    torch.manual_seed(0)
    words = torch.zeros(5, 4, dtype=torch.int32)
    x, weight, bias = _inputs(3, 70, 5, torch.float32)
    assert torch.equal(ops.masked_linear(x, weight, words, bias), bias.expand(3, 5))
    assert not ops.masked_linear(x, weight, words).any()


def test_dropped_weights_are_not_read(isa, path):
    words = ops.pack_mask(torch.arange(70).expand(5, 70) % 2 == 0)
    weight = torch.where(torch.arange(70) % 2 == 0, 1.0, torch.nan).expand(5, 70)
    y = ops.masked_linear(torch.ones(3, 70), weight, words)
    assert torch.equal(y, torch.full((3, 5), 35.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_grad_ignores_the_mask(path, dtype):
    torch.manual_seed(0)
    inputs = _inputs(6, 70, 5, dtype)
    mask = torch.rand(5, 70) < 0.3
    words, full = ops.pack_mask(mask), ops.pack_mask(torch.ones(5, 70, dtype=torch.bool))

    def op(dense_grad):
        return lambda x, w, b: ops.masked_linear(x, w, words, b, dense_grad)

    _, grad, (gx, gw) = oracle.gradients(op(True), inputs, [0, 1])
    _, _, (gx2, gw2) = oracle.gradients(op(False), inputs, [0, 1], grad)
    assert torch.equal(gx, gx2)
    assert torch.equal(gw2, torch.where(mask, gw, 0))
    assert bool((gw[~mask] != 0).all())

    sums = []
    for change in (lambda t: t, torch.abs, torch.ones_like):
        *changed, changed_grad = (change(t.double()) for t in (*inputs, grad))
        plain = oracle.gradients(
            lambda x, w, b: reference(x, w, full, b), changed, [1], changed_grad
        )
        sums.append(plain[2][0])
    oracle.assert_bounded(gw, *sums)


def test_gradcheck():
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((3, 5), "rows"))
    inputs = [oracle.leaf(t) for t in _inputs(4, 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(_pair(words)[0], inputs)
    assert torch.autograd.gradgradcheck(_pair(words)[0], inputs)


def test_second_order(path):
    """A gradient of a gradient's norm, as GraSP needs it, in float32."""
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    x, weight, bias = _inputs(2, 70, 5, torch.float32)

    def product(op, dtype):
        w = weight.to(dtype).requires_grad_()
        loss = op(x.to(dtype), w, words, bias.to(dtype)).pow(3).sum()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), w)[0]

    got, expected = product(ops.masked_linear, torch.float32), product(reference, torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(path, dtype):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    x, weight, bias = (oracle.leaf(t) for t in _inputs(3, 70, 5, dtype))
    torch.library.opcheck(ops.masked_linear, (x, weight, words, bias))
    torch.library.opcheck(ops.masked_linear, (x, weight, words), {"dense_grad": True})


def test_compiled(path):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    inputs = _inputs(3, 70, 5, torch.float32)
    oracle.check_compiled(_pair(words)[0], inputs, [0, 1, 2])
    oracle.check_compiled(lambda x, w, b: ops.masked_linear(x, w, words), inputs, [0, 1])


def test_compiled_by_inductor():
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    oracle.check_compiled(
        _pair(words)[0], _inputs(3, 70, 5, torch.float32), [0, 1, 2], backend="inductor"
    )


def test_compiled_once_for_any_batch():
    torch.manual_seed(0)
    words, weight = ops.pack_mask(torch.rand(5, 70) < 0.5), torch.randn(5, 70)
    op = oracle.compiled(lambda x: ops.masked_linear(x, weight, words))
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch in (20, 33, 47):
            x = torch.randn(batch, 70)
            torch._dynamo.mark_dynamic(x, 0)
            assert torch.equal(op(x), ops.masked_linear(x, weight, words))


def test_autocast_does_not_reach_the_op(path):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    inputs = _inputs(3, 70, 5, torch.float32)
    plain = _pair(words)[0](*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_pair(words)[0](*inputs), plain)


def test_errors():
    x, weight, bias = _inputs(3, 70, 5, torch.float32)
    words = torch.zeros(5, 4, dtype=torch.int32)
    for error, text, args in [
        (ValueError, r"x: got shape \(3, 69\), need last dimension 70", (x[:, 1:], weight, words)),
        (ValueError, r"x: got shape \(\), need last dimension 70", (x[0, 0], weight, words)),
        (ValueError, r"weight: got torch\.bfloat16", (x, weight.bfloat16(), words)),
        (ValueError, r"weight: .*\(5, 70, 1\), need .* \[O, K\]", (x, weight[..., None], words)),
        (TypeError, r"x: got torch\.int64, need a floating", (x.long(), weight.long(), words)),
        (ValueError, r"words: .*\(4, 4\), need int32 \(5, 4\)", (x, weight, words[1:])),
        (ValueError, r"words: got torch\.int64", (x, weight, words.long())),
        (ValueError, r"bias: got torch\.float32 \(4,\), need", (x, weight, words, bias[1:])),
        (ValueError, r"bias: got torch\.float64 \(5,\), need", (x, weight, words, bias.double())),
    ]:
        with pytest.raises(error, match="masked_linear: " + text):
            ops.masked_linear(*args)
        if args[0].dtype != torch.int64:
            meta = [a.to("meta") for a in args]
            with pytest.raises(error, match="masked_linear: " + text):
                ops.masked_linear(*meta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_of_one_call_does_not_show_in_the_next(dtype):
    """W*mask is written where the thread's last one was, larger or smaller."""
    x = torch.randn(200, 63).to(dtype)
    for rows in (100, 17, 100):
        weight, mask = torch.randn(rows, 63).to(dtype), torch.rand(rows, 63) < 0.9
        words = ops.pack_mask(mask)
        assert ops.explain_op("masked_linear", x, weight, words).kernel == "materialised"
        y = ops.masked_linear(x, weight, words)
        assert torch.equal(y, torch.nn.functional.linear(x, weight * mask))
