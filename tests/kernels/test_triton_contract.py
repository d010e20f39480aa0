"""What holds for every op with Triton kernels: launches, no wait for the device, what torch asks.

In the interpreter: the launches of a call, and that its CUDA body reads nothing back to the host.
Everywhere: outputs promised for CUDA tensors, without any. On a GPU: opcheck, fullgraph
compilation, CUDA graphs and the same bits as without them.
"""

from __future__ import annotations

import copy
import os

import oracle
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparseticket import ops

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ON_A_GPU = pytest.mark.skipif(INTERPRETING, reason="needs gpu: this is the interpreter")
RECIPE = (5, 7, "signed_constant", 0.25)
CONV = ((1, 1), (1, 1), (1, 1), 1)


def _words(*shape):
    return ops.pack_mask(torch.rand(shape) < 0.5)


def _blocks(list_of_blocks):
    mask = torch.zeros(64, 128, dtype=torch.bool)
    mask[:32, 32:96] = True
    if not list_of_blocks:
        mask = torch.rand(64, 128) < 0.05
    words, kept = ops.pack_mask(mask), int(mask.sum())
    return words, kept, ops.device_pattern(words, 128, kept)


def _half(*shape):
    return torch.randn(shape).half()


def _last(t):
    return t.contiguous(memory_format=torch.channels_last)


def _steps(name):
    shapes = [(17, 63), (8, 3, 3, 3)]
    tensors = [[torch.rand(s) for s in shapes] for _ in range(4)]
    words = [_words(*s) for s in shapes]
    if name == "masked_step":
        return (*tensors, [t.bfloat16() for t in tensors[0]], words, 0.1, 0.9)
    state = torch.zeros(2, 2, dtype=torch.int32)
    return (*tensors, words, state, [500, 100], [None, None], [1.0, 1.0], 0.1, 0.9)


def _sparse(name, list_of_blocks=True):
    words, kept, pattern = _blocks(list_of_blocks)
    x, grad, values = _half(2, 128), _half(2, 64), _half(kept)
    if name == "sparse_linear":
        return x, values, words, None, pattern
    if name == "sparse_linear_dx":
        return grad, values, words, 128, pattern
    return grad, x, words, kept, pattern


def _point():
    return _last(_half(1, 64, 4, 4)), _words(8, 64, 3, 3), None


# op (and which call of it): its arguments, and the kernels that a call launches
# ("_fill": a table of addresses and sizes)
CASES = {
    "apply_mask": (lambda: (_half(17, 63), _words(17, 63)), ["_apply_mask"]),
    "mask_ops and": (lambda: (_words(17, 63), _words(17, 63), "and"), ["_logical"]),
    "mask_ops hamming": (lambda: (_words(17, 63), _words(17, 63), "hamming"), ["_count"]),
    "pack_mask": (lambda: (torch.rand(17, 63) < 0.5,), ["_pack"]),
    "unpack_mask": (lambda: (_words(17, 63), (17, 63)), ["_unpack"]),
    "sign_words": (lambda: (5, 7, (17, 63)), ["_signs"]),
    "regenerate": (lambda: (5, 7, (17, 63), "signed_constant", 0.5), ["_regenerate"]),
    "regenerate_many": (
        lambda: ([_words(17, 63), _words(4, 5)], [1, 2], [3, 4], [2, 2], [17, 63, 4, 5], [0.5, 1]),
        ["_fill", "_regenerate_many"],
    ),
    "select_mask": (lambda: ([torch.randn(17, 63), torch.randn(40)], [300, 5]), None),
    "select_mask global": (
        lambda: ([torch.randn(17, 63), torch.randn(40)], [300], None, None, "global"),
        None,
    ),
    "popup_step": (lambda: _steps("popup_step"), None),
    "masked_step": (lambda: _steps("masked_step"), ["_fill", "_masked_step"]),
    "ticket_linear": (lambda: (_half(3, 70), _words(17, 70), None, *RECIPE), ["_skinny"]),
    "ticket_linear many rows": (
        lambda: (_half(130, 70), _words(17, 70), None, *RECIPE),
        ["_gemm"],
    ),
    "ticket_conv2d": (
        lambda: (
            _last(_half(1, 64, 4, 4)),
            _words(8, 64, 3, 3),
            None,
            *RECIPE,
            (8, 64, 3, 3),
            *CONV,
        ),
        ["_ticket_conv2d", "_sum_splits"],
    ),
    "sparse_linear": (lambda: _sparse("sparse_linear"), ["_block_forward"]),
    "sparse_linear list": (lambda: _sparse("sparse_linear", False), ["_list_forward"]),
    "sparse_linear_dx": (lambda: _sparse("sparse_linear_dx"), ["_block_dx"]),
    "sparse_linear_dw": (lambda: _sparse("sparse_linear_dw"), ["_block_dw"]),
}
POPUP = ("abs", 5, 7, 0.25)


def _popup_linear():
    return _half(3, 70), None, torch.randn(17, 70), _words(17, 70), None, *POPUP


def _conv(*operands):
    """x, these, words, no bias."""
    return _last(_half(2, 8, 5, 5)), *operands, _words(4, 8, 3, 3), None


COMPOSED = {  # of other ops: launches are theirs
    "popup_linear": _popup_linear,
    "masked_linear": lambda: (_half(3, 70), _half(17, 70), _words(17, 70)),
    "popup_conv2d": lambda: (*_conv(None, _last(torch.randn(4, 8, 3, 3))), *POPUP, *CONV),
    "masked_conv2d": lambda: (*_conv(_last(_half(4, 8, 3, 3))), *CONV),
    "popup_linear_ds": lambda: (_half(3, 17), _half(3, 70), torch.randn(17, 70), *POPUP),
}
EVERY = {**{name: make for name, (make, _) in CASES.items()}, **COMPOSED}


def _call(name, device="cpu"):
    """(op, its arguments, its keyword arguments) on ``device``."""
    torch.manual_seed(0)
    op = getattr(ops, name.split()[0])
    args = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), EVERY[name]())
    factory = not any(isinstance(a, torch.Tensor) for a in pytree.tree_leaves(args))
    return op, args, {"device": device} if factory else {}


class _Waits(AssertionError):
    pass


class _NoReads(TorchFunctionMode):
    """What a tensor holds must not reach Python: on a GPU that waits for the device."""

    NAMES = frozenset(
        ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__",
         "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose", "is_nonzero")
    )  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            raise _Waits(func.__name__)
        return func(*args, **(kwargs or {}))


class _NoReadingOps(TorchDispatchMode):
    NAMES = frozenset(
        ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        # places where a mask is True: so many that only the device knows
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if by_mask or name in self.NAMES:
            raise _Waits(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_reads(monkeypatch, launches):
    """Both modes, switched off inside the interpreter, which reads everything. ``launches`` first:
    its hook is the inner one."""
    from sparseticket.kernels.philox import philox_words

    kind = type(philox_words)
    run = kind.run

    def unwatched(self, *args, **kwargs):
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", unwatched)

    def call(function, *args, **kwargs):
        with _NoReads(), _NoReadingOps():
            return function(*args, **kwargs)

    return call


def _selection(name, countings):
    selected = ["_fill", "_bands", "_pass", *["_count"] * countings, "_settle", "_grant"]
    if name != "popup_step":
        assert countings in (3, 4)
        return selected
    # in the interpreter its selection, of CPU tensors, is the CPU's
    return ["_fill", "_popup_step", *([] if INTERPRETING else [*selected, "_regrant"])]


@pytest.mark.parametrize("name", CASES)
def test_launches_and_no_wait(name, device, on_cuda, launches, no_reads):
    op, args, kwargs = _call(name, device)
    on_cuda(op, *copy.deepcopy(args), **kwargs)  # constants are read once
    launches.clear()
    no_reads(on_cuda, op, *args, **kwargs)
    expected = CASES[name][1]
    if expected is None:  # with as many countings as the bins of the installed Triton need
        expected = _selection(name, launches.count("_count"))
    assert launches == expected


def test_reads_are_noticed(no_reads):
    t = torch.ones(3)
    for read in (torch.Tensor.item, bool, torch.Tensor.tolist, torch.nonzero, torch.Tensor.cpu):
        with pytest.raises(_Waits):
            no_reads(read, t[0] if read in (torch.Tensor.item, bool) else t)
    with pytest.raises(_Waits):
        no_reads(lambda: t[t > 0])


@pytest.mark.parametrize("name", EVERY)
def test_what_is_promised_for_cuda_tensors(name):
    """Shapes, dtypes, strides and device, for the compiler, on a machine without a GPU."""
    op, args, kwargs = _call(name)
    expected = op(*copy.deepcopy(args), **kwargs)
    with FakeTensorMode():

        def on_cuda(t):
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

        fakes = pytree.tree_map_only(torch.Tensor, on_cuda, args)
        got = op(*fakes, **({"device": "cuda"} if kwargs else {}))
    assert (got is None) == (expected is None)  # of the steps
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert b is None or (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert b is None or a.device.type == "cuda"


EXPLAINED = [
    *("select_mask", "popup_step", "masked_step", "ticket_linear", "ticket_linear many rows"),
    *("ticket_conv2d", "sparse_linear", "sparse_linear list", "sparse_linear_dx"),
    "sparse_linear_dw",
]


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_names_kernel_and_configuration(name, device):
    _, args, _ = _call(name, device)
    short = name.split()[0]
    choice = oracle.module_of(short)._choose_cuda(*args)
    assert choice.op == short and choice.kernel.startswith("Triton"), choice
    assert "configuration " in choice.reason and " warps" in choice.reason


@ON_A_GPU
@pytest.mark.parametrize("name", EVERY)
def test_opcheck(name, device):
    op, args, kwargs = _call(name, device)
    torch.library.opcheck(op, args, kwargs)


def _changed(args, result):
    """What a call gives: its result, and the tensors that it writes."""
    leaves = pytree.tree_leaves((result, args))
    return [t.clone() for t in leaves if isinstance(t, torch.Tensor)]


@ON_A_GPU
@pytest.mark.parametrize("name", EVERY)
def test_fullgraph(name, device):
    op, args, kwargs = _call(name, device)
    ours, others = copy.deepcopy(args), copy.deepcopy(args)
    expected = _changed(ours, op(*ours, **kwargs))
    made = oracle.compiled(lambda *a: op(*a, **kwargs), "inductor")(*others)
    for a, b in zip(_changed(others, made), expected, strict=True):
        assert torch.equal(a, b)


@ON_A_GPU
@pytest.mark.parametrize("name", EVERY)
def test_cuda_graph(name, device):
    """Captured and replayed: the bits of an eager call, whatever is in memory by then."""
    op, args, kwargs = _call(name, device)
    held = copy.deepcopy(args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles
            op(*copy.deepcopy(args), **kwargs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = op(*held, **kwargs)
    pairs = list(zip(pytree.tree_leaves(held), pytree.tree_leaves(args), strict=True))
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    for _ in range(2):
        for a, b in tensors:
            a.copy_(b)
        graph.replay()
    torch.cuda.synchronize()
    expected = copy.deepcopy(args)
    eager = _changed(expected, op(*expected, **kwargs))
    for a, b in zip(_changed(held, result), eager, strict=True):
        assert torch.equal(a, b)
