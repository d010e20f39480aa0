"""The CUDA body of popup_linear_ds and its kernel against the reference."""

from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops, prng
from sparseticket.kernels.popup_linear_ds import popup_linear_ds as launch
from sparseticket.kernels.tuning import Config
from sparseticket.reference.popup_linear_ds import popup_linear_ds as reference

SIGMA = prng.round_bf16(0.37)
TILES = Config("test", 1, "gemm", 16, 16, 64, 4, 2)
SHAPES = [(3, 17, 63), (1, 1, 1), (33, 5, 130), (16, 16, 64), (0, 3, 5), (3, 0, 5), (3, 5, 0)]


def _check(out, grad, x, scores, transform):
    args = (transform, 5, 7, SIGMA)
    grad, x = grad.double().cpu(), x.double().cpu()
    exact = reference(grad, x, scores.double().cpu(), *args)
    bound = grad.abs().t() @ x.abs() * SIGMA
    oracle.assert_bounded(out.cpu(), exact, bound, torch.ones_like(grad).t() @ torch.ones_like(x))


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernel(device, dtype, transform):
    torch.manual_seed(0)
    for m, outputs, inputs in SHAPES:
        grad, x = (torch.randn(m, n).to(dtype).to(device) for n in (outputs, inputs))
        scores = torch.randn(outputs, inputs).to(device)
        scores.view(-1)[: 2 * inputs].relu_()  # exact zeros
        out = torch.empty_like(scores)
        args = (transform == "abs", SIGMA, *prng.stream_key(5, 7, "sign"))
        launch(grad, x, scores, out, *args, TILES)
        _check(out, grad, x, scores, transform)


def test_nan_scores_spread(device):
    grad, x, scores = torch.ones(2, 3), torch.ones(2, 4), torch.full((3, 4), float("nan"))
    out = torch.zeros(3, 4).to(device)
    made = (t.to(device) for t in (grad, x, scores))
    launch(*made, out, True, SIGMA, *prng.stream_key(5, 7, "sign"), TILES)
    assert out.isnan().all()


@pytest.mark.parametrize("elements", [0, 2**40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_op(device, on_cuda, monkeypatch, launches, dtype, elements):
    """Fused, and composed of dense products where the layer is small or not in half precision."""
    monkeypatch.setattr(oracle.module_of("popup_linear_ds"), "FUSED_WEIGHTS", elements)
    torch.manual_seed(0)
    grad = torch.randn(2, 3, 17).to(dtype).to(device)
    x = torch.randn(2, 3, 70).to(dtype).to(device)
    for scores in (torch.randn(17, 70), torch.randn(70, 17).t()):
        out = on_cuda(ops.popup_linear_ds, grad, x, scores.to(device), "abs", 5, 7, SIGMA)
        assert out.dtype == torch.float32 and out.is_contiguous()
        half = dtype == torch.float16
        if half and elements == 0:
            _check(out, grad.flatten(0, 1), x.flatten(0, 1), scores, "abs")
        else:
            expected = ops.popup_linear_ds(grad.cpu(), x.cpu(), scores, "abs", 5, 7, SIGMA)
            torch.testing.assert_close(out.cpu(), expected, rtol=2e-3 if half else 1e-5, atol=1e-5)
    assert launches.count("_popup_linear_ds") == (2 if half and elements == 0 else 0)
