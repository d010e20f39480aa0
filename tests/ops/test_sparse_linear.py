from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.sparse_linear import sparse_linear as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# (batch, K, O): one sample, part of a vector, each number of vectors in a panel, panels and a rest,
# more than one strip of rows and block of columns, no elements
SIZES = [
    *[(1, 1, 1), (1, 63, 3), (1, 300, 17), (3, 17, 100), (15, 100, 17), (16, 130, 1)],
    *[(17, 63, 17), (33, 100, 3), (63, 3, 63), (64, 300, 100), (100, 250, 300), (200, 17, 5)],
    *[(0, 5, 4), (2, 0, 4), (100, 0, 4), (3, 5, 0), (1, 0, 3), (1, 3, 0)],
]


def _inputs(batch, k, mask, dtype, bias=True):
    x, values = torch.randn(batch, k, dtype=dtype), torch.randn(int(mask.sum()), dtype=dtype)
    return [x, values, torch.randn(mask.shape[0], dtype=dtype) if bias else None]


def _derived(words, k, values):
    kept = values.numel()
    return [ops.sparse_pattern(words, k, kept, transposed) for transposed in (False, True)]


def _pair(words, *derived):
    return (
        lambda x, v, b: ops.sparse_linear(x, v, words, b, *derived),
        lambda x, v, b: reference(x, v, words, b),
    )


def _resident(x, width):
    """The batch in groups of ``width`` samples that lie innermost."""
    return x.unflatten(0, (-1, width)).mT.contiguous().mT


@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32, torch.bfloat16), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype):
    torch.manual_seed(0)
    for i, (batch, k, rows) in enumerate(SIZES):
        for _, mask, words in oracle.patterns((rows, k)):
            inputs = _inputs(batch, k, mask, dtype, bias=i % 2 == 0)
            choice = ops.explain_op("sparse_linear", inputs[0], inputs[1], words)
            sparse = path == "fused" and 0 not in (batch, k, rows)
            assert choice.kernel.endswith(isa if sparse else "materialised")
            derived = _derived(words, k, inputs[1]) if i % 3 else []
            oracle.compare(*_pair(words, *derived), inputs, [0, 1, 2])


@pytest.mark.parametrize("path", ["fused"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_sparsity_has_its_blocks(isa, path, dtype):
    torch.manual_seed(0)
    for density in (0.3, 0.05, 0.01):
        mask = torch.rand(300, 1100) < density
        words = ops.pack_mask(mask)
        inputs = _inputs(65, 1100, mask, dtype)
        oracle.compare(*_pair(words, *_derived(words, 1100, inputs[1])), inputs, [0, 1, 2])


@pytest.mark.parametrize("path", ["fused"], indirect=True)
@pytest.mark.parametrize("batch", [1, 20])
def test_more_columns_than_16_bits_count(isa, path, batch):
    torch.manual_seed(0)
    for shape in ((3, 70001), (70001, 3)):  # the second in its transposed pattern
        mask = torch.rand(shape) < 0.05
        words = ops.pack_mask(mask)
        inputs = _inputs(batch, shape[1], mask, torch.float32)
        oracle.compare(*_pair(words), inputs, [0, 1, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain_tells_what_runs(calls, dtype):
    torch.manual_seed(0)
    for density in (0.1, 1.0):
        mask = torch.rand(50, 70) < density
        words = ops.pack_mask(mask)
        for batch in (1, 200):
            x, values, bias = _inputs(batch, 70, mask, dtype)
            choice = ops.explain_op("sparse_linear", x, values, words, bias)
            assert choice.reason
            calls.clear()
            ops.sparse_linear(x, values, words, bias)
            assert calls == (["sparse_linear"] if choice.kernel.startswith("sparse") else [])
            assert choice.kernel.startswith("sparse") == (
                dtype != torch.float64
                and (density < 0.25 or (batch == 1 and dtype == torch.float32))
            )


@pytest.mark.parametrize("path", ["fused"], indirect=True)  # a dense GEMM promises nothing
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("batch", [1, 16, 150])
def test_threads_give_equal_bits(isa, path, dtype, batch):
    torch.manual_seed(0)
    mask = torch.rand(600, 700) < 0.1
    words = ops.pack_mask(mask)
    inputs = _inputs(batch, 700, mask, dtype)
    grad = torch.randn(batch, 600).to(dtype)

    def flat():
        y, _, grads = oracle.gradients(_pair(words)[0], inputs, [0, 1, 2], grad)
        return torch.cat([t.flatten() for t in (y, *grads)])

    assert torch.equal(*oracle.by_threads(flat))


@pytest.mark.parametrize("layout", oracle.FORMATS)
def test_layouts(path, layout):
    torch.manual_seed(0)
    change = oracle.FORMATS[layout]
    for dtype in DTYPES:
        _, mask, words = next(oracle.patterns((17, 63), "rows"))
        inputs = [change(t) for t in _inputs(5, 63, mask, dtype)]
        oracle.compare(*_pair(change(words)), inputs, [0, 1, 2])


def test_unaligned_storage(isa):
    torch.manual_seed(0)
    mask = torch.rand(40, 63) < 0.2
    words = ops.pack_mask(mask)
    inputs = [
        torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
        for t in _inputs(20, 63, mask, torch.float32)
    ]
    oracle.compare(*_pair(words), inputs, [0, 1, 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 20, 64, 80])
def test_a_batch_inner_input_gives_a_batch_inner_output(isa, path, dtype, width):
    torch.manual_seed(0)
    mask = torch.rand(270, 120) < 0.2
    words = ops.pack_mask(mask)
    x, values, bias = _inputs(2 * width, 120, mask, dtype)
    x = _resident(x, width)
    oracle.compare(*_pair(words), [x, values, bias], [0, 1, 2])
    y = ops.sparse_linear(x, values, words, bias)
    assert y.mT.is_contiguous() and not y.is_contiguous()
    one = x[0]  # [width, K] with strides (1, width)
    assert ops.sparse_linear(one, values, words).stride() == (1, width)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 2), (2, 3, 5)])
def test_leading_dimensions(path, lead):
    torch.manual_seed(0)
    _, mask, words = next(oracle.patterns((5, 70), "rows"))
    _, values, bias = _inputs(1, 70, mask, torch.float32)
    x = torch.randn(*lead, 70)
    assert ops.sparse_linear(x, values, words, bias).shape == (*lead, 5)
    oracle.compare(*_pair(words), [x, values, bias], [0, 1, 2])


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_empty_rows_give_the_bias_exactly(isa, path, batch):
    torch.manual_seed(0)
    words = torch.zeros(5, 4, dtype=torch.int32)
    x, bias = torch.randn(batch, 70), torch.randn(5)
    none = torch.zeros(0)
    assert torch.equal(ops.sparse_linear(x, none, words, bias), bias.expand(batch, 5))
    assert not ops.sparse_linear(x, none, words).any()


def test_gradcheck_twice(path):
    torch.manual_seed(0)
    mask = torch.rand(5, 7) < 0.5
    words = ops.pack_mask(mask)
    inputs = [oracle.leaf(t) for t in _inputs(4, 7, mask, torch.float64)]
    assert torch.autograd.gradcheck(_pair(words)[0], inputs)
    assert torch.autograd.gradgradcheck(_pair(words)[0], inputs)


@pytest.mark.parametrize("path", ["fused"], indirect=True)
def test_second_derivatives_are_those_of_the_reference(isa, path):
    torch.manual_seed(0)
    mask = torch.rand(5, 70) < 0.3
    words = ops.pack_mask(mask)
    x, values, _ = _inputs(20, 70, mask, torch.float32)

    def second(op, x, v):
        x, v = oracle.leaf(x), oracle.leaf(v)
        y = op(x, v, None)
        gx, gv = torch.autograd.grad(y.square().sum(), [x, v], create_graph=True)
        return torch.autograd.grad(gx.square().sum() + gv.square().sum(), [x, v])

    op, plain = _pair(words)
    for a, b in zip(second(op, x, values), second(plain, x.double(), values.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("batch", [1, 20])
def test_opcheck_and_compiled(batch):
    torch.manual_seed(0)
    mask = torch.rand(5, 70) < 0.3
    words = ops.pack_mask(mask)
    inputs = _inputs(batch, 70, mask, torch.float32)
    derived = _derived(words, 70, inputs[1])
    x, v, b = (oracle.leaf(t) for t in inputs)
    torch.library.opcheck(ops.sparse_linear, (x, v, words, b, *derived))
    oracle.check_compiled(_pair(words, *derived)[0], inputs, [0, 1, 2])
    oracle.check_compiled(_pair(words)[0], [_resident(torch.randn(32, 70), 16), v, b], [0, 1, 2])


def test_several_python_threads_at_once():
    torch.manual_seed(0)
    mask = torch.rand(300, 400) < 0.1
    words = ops.pack_mask(mask)
    x, values, bias = _inputs(70, 400, mask, torch.float32)
    expected = ops.sparse_linear(x, values, words, bias)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: ops.sparse_linear(x, values, words, bias), range(40)))
    assert all(torch.equal(y, expected) for y in made)


def test_errors():
    mask = torch.ones(3, 70, dtype=torch.bool)
    words = ops.pack_mask(mask)
    x, values = torch.ones(2, 70), torch.ones(210)
    with pytest.raises(ValueError, match=r"sparse_linear: words: got .*need int32 \(3, 2\)"):
        ops.sparse_linear(torch.ones(2, 60), values, words)
    with pytest.raises(ValueError, match=r"sparse_linear: values: got torch\.float64, need"):
        ops.sparse_linear(x, values.double(), words)
    with pytest.raises(ValueError, match=r"sparse_linear: values: got shape \(3, 70\), need one"):
        ops.sparse_linear(x, values.view(3, 70), words)
    with pytest.raises(ValueError, match=r"words: 210 live weights, but there are 209 values"):
        ops.sparse_linear(x, values[:209], words)
    with pytest.raises(ValueError, match=r"sparse_linear: bias: got .*need torch.float32 \(3,\)"):
        ops.sparse_linear(x, values, words, torch.ones(4))
    other = ops.pack_mask(torch.rand(3, 70) < 0.2)
    with pytest.raises(ValueError, match=r"values: has 210 elements|pattern"):
        kept = int(ops.mask_ops(other, None, "popcount"))
        ops.sparse_linear(x[:1], values, words, None, ops.sparse_pattern(other, 70, kept))
    with pytest.raises(ValueError, match=r"pattern: is not made by sparse_pattern"):
        ops.sparse_linear(x[:1], values, words, None, torch.zeros(5, dtype=torch.int32))
