"""The CUDA body of ticket_linear and its kernels, element by element against the reference."""

from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops, prng
from sparseticket.kernels.ticket_linear import ticket_linear as launch
from sparseticket.kernels.tuning import Config, architectures, configs
from sparseticket.reference.ticket_linear import ticket_linear as reference

SIGMA = prng.round_bf16(0.37)
RECIPE = (5, 7, "signed_constant", SIGMA)
DTYPES = (torch.float16, torch.float32)  # Triton's interpreter multiplies bfloat16 wrongly
SKINNY = Config("skinny", 1, "skinny", 16, 64, 64, 4, 2, programs=4)
GEMM = Config("gemm", 1, "gemm", 16, 64, 64, 4, 2, group=2)
SHAPES = [  # batch, outputs, inputs: tails everywhere, several tiles, one weight, whole tiles
    *[(3, 17, 63), (1, 1, 1), (17, 70, 130), (33, 3, 64), (16, 64, 128), (2, 3, 200)],
    *[(0, 5, 70), (3, 0, 70), (3, 5, 0)],
]


def _check(y, x, words, bias, signs=None, columns=None):
    """Against the reference in float64, bounded by the sum of absolute values."""
    x, bias = x.double().cpu(), None if bias is None else bias.double().cpu()
    exact = reference(x, words, bias, *RECIPE, signs, columns=columns)
    ones = torch.ones((signs if words is None else words).shape[0], _columns_of(x, columns))
    kept = (ones if words is None else ops.unpack_mask(words, ones.shape)).double()
    kept = kept.t() if columns is None else kept
    bound, terms = x.abs() @ kept * SIGMA, torch.ones_like(x) @ kept
    if bias is not None:
        bound, terms = bound + bias.abs(), terms + 1
    oracle.assert_bounded(y.cpu(), exact, bound, terms)


def _columns_of(x, columns):
    return x.shape[-1] if columns is None else columns


def _case(m, outputs, inputs, dtype, transposed, device):
    x = torch.randn(m, outputs if transposed else inputs).to(dtype).to(device)
    bias = torch.randn(inputs if transposed else outputs).to(dtype).to(device)
    return x, bias, {"columns": inputs} if transposed else {}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("config", [SKINNY, GEMM], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels(device, launches, dtype, config, transposed):
    torch.manual_seed(0)
    key, high = prng.stream_key(5, 7, "sign")
    for m, outputs, inputs in SHAPES:
        signs = ops.sign_words(5, 7, (outputs, inputs))
        x, bias, columns = _case(m, outputs, inputs, dtype, transposed, device)
        names = "half none all" if (m, outputs) == (3, 17) else "rows"
        masks = [words for *_, words in oracle.patterns((outputs, inputs), names)]
        given = [*((w, None, None) for w in masks), (masks[0], signs, bias), (None, signs, bias)]
        for words, planes, b in given:
            y = x.new_empty(m, inputs if transposed else outputs)
            on_device = [None if t is None else t.to(device) for t in (words, planes)]
            launch(x, *on_device, b, y, SIGMA, key, high, transposed, config)
            _check(y, x, words, b, planes, **columns)
    assert set(launches) <= {f"_{config.kernel}", "_sum_splits"}


def test_splits_of_every_number(device, launches):
    """A sum over seven tiles, in one part to seven."""
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 400) < 0.5)
    x = torch.randn(3, 400).half().to(device)
    for programs in (1, 2, 3, 7):
        y = x.new_empty(3, 5)
        config = SKINNY._replace(programs=programs)
        launch(
            x, words.to(device), None, None, y, SIGMA, *prng.stream_key(5, 7, "sign"), False, config
        )
        _check(y, x, words, None)
    assert launches.count("_sum_splits") == 3


def test_padding_is_never_read(device):
    """Bits past the last column change nothing, and unaligned words are read."""
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(9, 70) < 0.5)
    dirty = words.clone()
    dirty[:, 2] |= -1 << 6
    dirty[:, 3] = -1
    shifted = torch.cat([torch.zeros(1, dtype=torch.int32), dirty.flatten()]).to(device)[1:]
    for transposed in (False, True):
        x = torch.randn(3, 9 if transposed else 70).half().to(device)
        y = x.new_empty(3, 70 if transposed else 9)
        args = (SIGMA, *prng.stream_key(5, 7, "sign"), transposed, GEMM)
        launch(x, shifted.view(9, 4), None, None, y, *args)
        _check(y, x, words, None, columns=70 if transposed else None)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_op(device, on_cuda, launches, dtype):
    """Through the op: leading dimensions, strides, transposed, other distributions, sigma that the
    dtype cannot hold."""
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(17, 70) < 0.5).to(device)
    x = torch.randn(2, 70, 3).to(dtype).to(device).transpose(1, 2)
    y = on_cuda(ops.ticket_linear, x, words, None, *RECIPE)
    assert y.shape == (2, 3, 17) and y.dtype == dtype
    _check(y.flatten(0, 1), x.flatten(0, 1), words.cpu(), None)
    back = on_cuda(ops.ticket_linear, y, words, None, *RECIPE, None, None, None, 70)
    _check(back.flatten(0, 1), y.flatten(0, 1), words.cpu(), None, columns=70)
    assert launches.count("_skinny") == (0 if dtype == torch.float64 else 2)
    for dist in ("uniform", "normal"):
        got = on_cuda(ops.ticket_linear, x, words, None, 5, 7, dist, 0.1)
        torch.testing.assert_close(
            got, ops.ticket_linear(x.cpu(), words.cpu(), None, 5, 7, dist, 0.1).to(device)
        )
    odd = on_cuda(ops.ticket_linear, x, words, None, 5, 7, "signed_constant", 1 / 3)
    expected = reference(x.cpu(), words.cpu(), None, 5, 7, "signed_constant", 1 / 3)
    torch.testing.assert_close(odd.cpu(), expected)


@pytest.mark.parametrize("architecture", architectures())
def test_shipped_configurations(architecture):
    """Every number of rows has one, a thread has a whole unit, splits where programs are few."""
    for op, listed in configs(architecture).items():
        most = [c.most for c in listed]
        assert most[-1] == 2**31 - 1 and most == sorted(most), op
        assert len({c.name for c in listed}) == len(listed)
        for c in (c for c in listed if isinstance(c, Config)):
            assert c.kernel in ("skinny", "gemm") and (c.kernel == "gemm" or c.programs > 1)


def test_choice_by_rows():
    module = oracle.module_of("ticket_linear")

    def chosen(rows, dtype=torch.bfloat16, dist="signed_constant"):
        x = torch.empty(rows, 8, dtype=dtype, device="meta")
        return module.cuda_choice("ticket_linear", x, dist).kernel

    assert chosen(1) == chosen(1, torch.float32) == "Triton skinny"
    assert chosen(2048) == "Triton gemm"
    assert chosen(2049) == chosen(1, torch.float64) == chosen(1, dist="normal") == "materialised"
