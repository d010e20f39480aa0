from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
import torch.nn.functional as F

from sparseticket import _C, ops
from sparseticket.reference.sparse_conv2d import sparse_conv2d as reference

MODULE = oracle.module_of("sparse_conv2d")
DW = oracle.module_of("sparse_conv2d_dw")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SMALL = ((2, 4, 5, 6), (6, 2, 3, 2), ((2, 1), (1, 0), (1, 2), 2))
SQUARE = ((2, 4, 7, 9), (6, 2, 3, 3), ((1, 1), (1, 1), (1, 1), 2))  # its dX is a sparse conv


@pytest.fixture(params=["sparse", "materialised"])
def path(request, monkeypatch) -> str:
    density = 1.0 if request.param == "sparse" else -1.0
    monkeypatch.setattr(MODULE, "SPARSE_DENSITY", density)
    monkeypatch.setattr(DW, "DW_DENSITY", density)
    monkeypatch.setattr(DW, "GROUP_OUTPUTS", 0)
    return request.param


ROUTES = [(p.replace("fused", "sparse"), *rest) for p, *rest in oracle.routes(torch.float32)]


def _inputs(x_shape, weight_shape, words, dtype, bias=True):
    live = int(ops.mask_ops(words, None, "popcount"))
    return [
        torch.randn(x_shape, dtype=dtype),
        torch.randn(live, dtype=dtype),
        torch.randn(weight_shape[0], dtype=dtype) if bias else None,
    ]


def _pair(words, weight_shape, geometry, *derived):
    return (
        lambda x, v, b: ops.sparse_conv2d(x, v, words, b, weight_shape, *geometry, *derived),
        lambda x, v, b: reference(x, v, words, b, weight_shape, *geometry),
    )


def _derived(words, weight_shape, geometry, x_shape, live):
    taps = ops.conv2d_taps(words, weight_shape, x_shape[-2:], *geometry)
    return taps, ops.conv2d_flip(words, weight_shape, geometry[-1], live)


@pytest.mark.parametrize(("path", "isa", "dtype"), ROUTES, indirect=["path", "isa"])
def test_forward_and_backward(path, isa, dtype):
    torch.manual_seed(0)
    for i, (x_shape, weight_shape, *geometry) in enumerate(oracle.CONVS):
        for _, _, words in oracle.patterns(weight_shape):
            inputs = _inputs(x_shape, weight_shape, words, dtype, bias=i % 2 == 0)
            args = (*inputs[:2], words, None, weight_shape, *geometry)
            assert ops.explain_op("sparse_conv2d", *args).kernel.startswith(path)
            derived = ()
            if i % 3 == 0:
                derived = _derived(words, weight_shape, geometry, x_shape, inputs[1].numel())
            oracle.compare(*_pair(words, weight_shape, geometry, *derived), inputs, [0, 1, 2])


@pytest.mark.parametrize("path", ["sparse"], indirect=True)
def test_blocks_of_channels(isa, path):
    """More channels than one cache block holds, grouped too; images of many tiles."""
    torch.manual_seed(0)
    for x_shape, weight_shape, groups in [
        ((1, 100, 30, 31), (17, 100, 3, 3), 1),
        ((3, 126, 17, 19), (10, 63, 3, 3), 2),
        ((2, 200, 20, 16), (3, 200, 1, 1), 1),
        ((1, 24, 14, 14), (6, 24, 1, 1), 1),
    ]:
        geometry = ((1, 1), (weight_shape[2] // 2,) * 2, (1, 1), groups)
        for _, _, words in oracle.patterns(weight_shape, "half rows"):
            inputs = _inputs(x_shape, weight_shape, words, torch.float32)
            oracle.compare(*_pair(words, weight_shape, geometry), inputs, [0, 1, 2])


@pytest.mark.parametrize("path", ["sparse"], indirect=True)
def test_random_geometries(path):
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    for _ in range(100):
        groups, kernel = integer(1, 3), (integer(1, 4), integer(1, 4))
        stride, dilation = ((integer(1, 3), integer(1, 3)) for _ in range(2))
        padding = (integer(0, 3), integer(0, 3))
        size = [d * (k - 1) + integer(1, 20) for d, k in zip(dilation, kernel, strict=True)]
        weight_shape = (groups * integer(1, 5), integer(1, 5), *kernel)
        x_shape = (integer(1, 3), groups * weight_shape[1], *size)
        words = ops.pack_mask(torch.rand(weight_shape) < integer(0, 4) / 4)
        inputs = _inputs(x_shape, weight_shape, words, torch.float32)
        geometry = (stride, padding, dilation, groups)
        oracle.compare(*_pair(words, weight_shape, geometry), inputs, [0, 1, 2])


def test_full_mask_is_the_plain_layer_and_empty_the_bias(path):
    torch.manual_seed(0)
    for x_shape, weight_shape, *geometry in oracle.CONVS:
        x, weight, bias = (torch.randn(s) for s in (x_shape, weight_shape, weight_shape[0]))
        words = {name: w for name, _, w in oracle.patterns(weight_shape, "all none")}
        dense = F.conv2d(x, weight, bias, *geometry)
        values = weight.movedim(1, -1).flatten()
        full = ops.sparse_conv2d(x, values, words["all"], bias, weight_shape, *geometry)
        torch.testing.assert_close(full, dense, rtol=1e-4, atol=1e-4)
        empty = ops.sparse_conv2d(x, values[:0], words["none"], bias, weight_shape, *geometry)
        assert torch.equal(empty, bias[:, None, None].expand_as(dense))


def test_explain_sends_depthwise_to_the_dense_conv():
    words = ops.pack_mask(torch.rand(64, 1, 3, 3) < 0.1)
    x, values, _ = _inputs((1, 64, 9, 9), (64, 1, 3, 3), words, torch.float32)
    args = (x, values, words, None, (64, 1, 3, 3), (1, 1), (1, 1), (1, 1), 64)
    choice = ops.explain_op("sparse_conv2d", *args)
    assert choice.kernel == "materialised" and "1 outputs a group" in choice.reason


def test_explain_tells_what_runs(monkeypatch):
    torch.manual_seed(0)
    called = []
    for name in ("sparse_conv2d", "sparse_conv2d_dw"):
        kernel = getattr(_C, name)
        spy = lambda *args, name=name, kernel=kernel: (called.append(name), kernel(*args))  # noqa: E731
        monkeypatch.setattr(_C, name, spy)
    for density in (0.05, 0.9):
        words = ops.pack_mask(torch.rand(10, 10, 3, 3) < density)
        for dtype in DTYPES:
            x, values, _ = _inputs((2, 10, 8, 8), (10, 10, 3, 3), words, dtype)
            args = (words, None, (10, 10, 3, 3), (1, 1), (1, 1), (1, 1), 1)
            choice = ops.explain_op("sparse_conv2d", x, values, *args)
            sparse = density == 0.05 and dtype == torch.float32
            assert choice.kernel.startswith("sparse") == sparse and choice.reason
            called.clear()
            y = ops.sparse_conv2d(x, oracle.leaf(values), *args)
            y.sum().backward()
            assert called == (["sparse_conv2d", "sparse_conv2d_dw"] if sparse else [])


@pytest.mark.parametrize("path", ["sparse"], indirect=True)
def test_threads_give_equal_bits(isa, path):
    torch.manual_seed(0)
    for x_shape, weight_shape, *geometry in [*oracle.CONVS, SQUARE[:2] + SQUARE[2]]:
        _, _, words = next(oracle.patterns(weight_shape, "rows"))
        inputs = _inputs(x_shape, weight_shape, words, torch.float32)
        op = _pair(words, weight_shape, geometry)[0]
        y = op(*inputs)
        grad = torch.randn_like(y)
        wrt = [0, 1]

        def run(op=op, inputs=inputs, grad=grad, wrt=wrt):
            y, _, grads = oracle.gradients(op, inputs, wrt, grad)
            return torch.cat([t.flatten() for t in (y, *grads)])

        assert torch.equal(*oracle.by_threads(run))


@pytest.mark.parametrize("x_layout", oracle.FORMATS)
def test_layouts(path, x_layout):
    torch.manual_seed(0)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    _, _, words = next(oracle.patterns((6, 4, 3, 3), "rows"))
    for x_shape in [(2, 4, 7, 5), (1, 4, 7, 5), (4, 7, 5)]:
        x, values, bias = _inputs(x_shape, (6, 4, 3, 3), words, torch.float32)
        x = oracle.FORMATS[x_layout](x)
        oracle.compare(*_pair(words, (6, 4, 3, 3), geometry), [x, values, bias], [0, 1, 2])
        args = (oracle.leaf(x), oracle.leaf(values), words, bias, (6, 4, 3, 3), *geometry)
        torch.library.opcheck(
            ops.sparse_conv2d, args, test_utils=("test_schema", "test_faketensor")
        )


def test_unaligned_storage(path):
    torch.manual_seed(0)
    x_shape, weight_shape, geometry = SQUARE
    words = ops.pack_mask(torch.rand(weight_shape) < 0.5)
    inputs = _inputs(x_shape, weight_shape, words, torch.float32)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in inputs]
    op = _pair(words, weight_shape, geometry)[0]
    assert torch.equal(op(*inputs), op(*shifted))


@pytest.mark.parametrize(("x_shape", "weight_shape", "geometry"), [SMALL, SQUARE])
def test_gradcheck(x_shape, weight_shape, geometry):
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns(weight_shape, "rows"))
    inputs = [oracle.leaf(t) for t in _inputs(x_shape, weight_shape, words, torch.float64)]
    op = _pair(words, weight_shape, geometry)[0]
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize(("x_shape", "weight_shape", "geometry"), [SMALL, SQUARE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(path, dtype, x_shape, weight_shape, geometry):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(weight_shape) < 0.5)
    x, values, bias = (oracle.leaf(t) for t in _inputs(x_shape, weight_shape, words, dtype))
    derived = _derived(words, weight_shape, geometry, x_shape, values.numel())
    args = (words, bias, weight_shape, *geometry)
    torch.library.opcheck(ops.sparse_conv2d, (x, values, *args, *derived))
    torch.library.opcheck(ops.sparse_conv2d, (oracle.leaf(x[0]), values, *args))


def test_compiled(path):
    torch.manual_seed(0)
    for x_shape, weight_shape, *geometry in [*oracle.CONVS[1:4], SQUARE[:2] + SQUARE[2]]:
        words = ops.pack_mask(torch.rand(weight_shape) < 0.5)
        inputs = _inputs(x_shape, weight_shape, words, torch.float32)
        derived = _derived(words, weight_shape, geometry, x_shape, inputs[1].numel())
        op = _pair(words, weight_shape, geometry, *derived)[0]
        oracle.check_compiled(op, inputs, [0, 1, 2])


def test_errors():
    x_shape, shape, (stride, padding, dilation, groups) = SQUARE
    words = ops.pack_mask(torch.rand(shape) < 0.5)
    x, values, bias = _inputs(x_shape, shape, words, torch.float32)
    geometry = (stride, padding, dilation, groups)
    taps, flip = _derived(words, shape, geometry, (6, 7), values.numel())
    for text, args in [
        (r"x: got shape \(2, 3, 7, 9\)", (x[:, 1:], values, words, bias, shape, *geometry)),
        (r"words: .*need int32 \(6, 2\)", (x, values, words[1:], bias, shape, *geometry)),
        (r"values: got torch\.float64", (x, values.double(), words, bias, shape, *geometry)),
        (r"values: .*\(1, ", (x, values[None], words, bias, shape, *geometry)),
        (r"groups: got 4", (x, values, words, bias, shape, stride, padding, dilation, 4)),
        (r"bias: ", (x, values, words, bias[1:], shape, *geometry)),
        (r"taps: got torch.int64", (x, values, words, bias, shape, *geometry, taps.long())),
        (r"flip: got torch.int64", (x, values, words, bias, shape, *geometry, taps, flip.long())),
    ]:
        with pytest.raises(ValueError, match=f"sparse_conv2d: {text}"):
            ops.sparse_conv2d(*args)


@pytest.mark.parametrize("path", ["sparse"], indirect=True)
def test_taps_of_another_image_or_mask_are_refused(path):
    x_shape, shape, geometry = SQUARE
    words = ops.pack_mask(torch.rand(shape) < 0.5)
    x, values, _ = _inputs(x_shape, shape, words, torch.float32)
    args = (words, None, shape, *geometry)
    for taps in (
        ops.conv2d_taps(words, shape, (9, 7), *geometry),
        ops.conv2d_taps(words ^ 1, shape, (7, 9), *geometry),
    ):
        with pytest.raises(ValueError, match="taps"):
            ops.sparse_conv2d(x, values, *args, taps)


def test_values_are_counted(path):
    x_shape, shape, geometry = SQUARE
    words = ops.pack_mask(torch.rand(shape) < 0.5)
    x, values, _ = _inputs(x_shape, shape, words, torch.float32)
    with pytest.raises(ValueError, match=r"live weights"):
        ops.sparse_conv2d(x, values[1:], words, None, shape, *geometry)


# ---------------------------------------------------------------- machine code
@pytest.fixture
def compiled_code(require):
    """``compiled_code(words, weight_shape, image, *geometry)``: a handle, freed afterwards."""
    if _C.isa() != "avx512":
        require("avx512", "machine code is for AVX-512")
    made = []

    def make(*args):
        made.append(ops.compile_conv2d(*args))
        assert made[-1], "no machine code on this machine"
        return made[-1]

    before = _C.code_bytes()
    yield make
    for code in made:
        ops.release_code(code)
    assert _C.code_bytes() == before


@pytest.fixture
def any_outputs(monkeypatch):
    monkeypatch.setattr(MODULE, "_CODE_OUTPUTS", 1)
    monkeypatch.setattr(MODULE, "SPARSE_DENSITY", 1.0)
    monkeypatch.setattr(DW, "DW_DENSITY", 1.0)
    monkeypatch.setattr(DW, "GROUP_OUTPUTS", 0)


WIDE = [
    ((2, 5, 9, 11), (64, 5, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 6, 30, 31), (58, 3, 3, 3), (2, 1), (1, 1), (1, 1), 2),
    ((3, 70, 16, 16), (29, 70, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((1, 4, 14, 14), (28, 4, 1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def test_machine_code(any_outputs, compiled_code):
    torch.manual_seed(0)
    for i, (x_shape, shape, *geometry) in enumerate([*oracle.CONVS, *WIDE]):
        for name, _, words in oracle.patterns(shape):
            if name == "none":
                assert ops.compile_conv2d(words, shape, x_shape[-2:], *geometry) == 0
                continue
            inputs = _inputs(x_shape, shape, words, torch.float32, bias=i % 2 == 0)
            if not inputs[1].numel():
                continue
            code = compiled_code(words, shape, x_shape[-2:], *geometry)
            args = (*inputs[:2], words, inputs[2], shape, *geometry, None, None, code)
            assert ops.explain_op("sparse_conv2d", *args).kernel == "sparse machine code"
            oracle.compare(*_pair(words, shape, geometry, None, None, code), inputs, [0, 1])
            assert torch.equal(*oracle.by_threads(lambda args=args: ops.sparse_conv2d(*args)))


def test_machine_code_is_an_option(any_outputs, compiled_code, monkeypatch):
    x_shape, shape, geometry = SQUARE
    words = ops.pack_mask(torch.rand(shape) < 0.5)
    monkeypatch.setenv("SPARSETICKET_JIT", "0")
    assert ops.compile_conv2d(words, shape, x_shape[-2:], *geometry) == 0
    monkeypatch.delenv("SPARSETICKET_JIT")
    x, values, bias = _inputs(x_shape, shape, words, torch.float32)
    args = (words, bias, shape, *geometry, None, None)
    code = compiled_code(words, shape, x_shape[-2:], *geometry)
    y = ops.sparse_conv2d(x, values, *args, code)
    _C.set_isa("avx2")
    try:
        assert ops.compile_conv2d(words, shape, x_shape[-2:], *geometry) == 0
        torch.testing.assert_close(ops.sparse_conv2d(x, values, *args, code), y)
    finally:
        _C.set_isa("avx512")
    for wrong in ((x[..., 1:], values), (x, values[1:])):
        with pytest.raises(ValueError, match=r"made for|elements"):
            ops.sparse_conv2d(*wrong, *args, code)
    ops.release_code(code)
    with pytest.raises(ValueError, match=f"no machine code has handle {code}"):
        ops.sparse_conv2d(x, values, *args, code)
    ops.release_code(code)


def test_code_is_freed_while_threads_use_it(any_outputs, compiled_code):
    x_shape, shape, geometry = SQUARE
    words = ops.pack_mask(torch.rand(shape) < 0.5)
    x, values, _ = _inputs(x_shape, shape, words, torch.float32)
    args = (words, None, shape, *geometry, None, None)
    expected = ops.sparse_conv2d(x, values, *args)

    def work(_):
        for _ in range(50):
            code = ops.compile_conv2d(words, shape, x_shape[-2:], *geometry)
            torch.testing.assert_close(ops.sparse_conv2d(x, values, *args, code), expected)
            ops.release_code(code)

    before = _C.code_bytes()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert _C.code_bytes() == before
