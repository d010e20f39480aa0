"""Moments of features, the loss that matches them, and the extractors that show them."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseticket.train.data import load_dataset
from sparseticket.train.extractors import EXTRACTORS, Extractor, build_extractor, flat, pooled
from sparseticket.train.moments import (
    MomentMatcher,
    Moments,
    frechet_distance,
    moment_distance,
    moments_of,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def matcher(features=7, lr=0.1) -> MomentMatcher:
    made = MomentMatcher(Moments(torch.randn(features), torch.rand(features)), lr)
    for _ in range(3):
        made.update(torch.randn(features), torch.rand(features))
    return made


# Moments and distances --------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_over_batches_are_those_of_all_rows(offset):
    x = torch.randn(101, 5) * torch.tensor([1.0, 0.1, 3.0, 0.0, 1.0]) + offset
    got = moments_of(x.split([1, 40, 60]))
    rows = x.double().numpy()
    np.testing.assert_allclose(got.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(got.variance, rows.var(0, ddof=1), rtol=1e-5, atol=1e-12)
    with pytest.raises(ValueError, match="got 1 rows, need at least 2"):
        moments_of([x[:1]])


def test_moment_distance_by_hand():
    a = Moments(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    b = Moments(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]))
    assert moment_distance(a, b) == pytest.approx((9 / 2 + 1 / 2) ** 0.5)
    assert moment_distance(a, a) == 0.0


def test_frechet_distance_of_known_gaussians():
    x = torch.randn(500, 4, dtype=torch.float64)
    c = x.mT.cov()
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    moved = x @ torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)) + 3
    gap = (moved.mean(0) - x.mean(0)).square().sum()
    assert frechet_distance(x, 2 * x) == pytest.approx(
        float((x.mean(0)).square().sum() + c.trace())
    )
    # one coordinate stretched: the eigenvalues of C_a C_b are those of a plain matrix product
    cross = torch.linalg.eigvals(c @ moved.mT.cov()).real.sqrt().sum()
    expected = float(gap + c.trace() + moved.mT.cov().trace() - 2 * cross)
    assert frechet_distance(x, moved) == pytest.approx(expected)
    assert frechet_distance(moved, x) == pytest.approx(expected)
    with pytest.raises(ValueError, match="got 1 and 500 samples"):
        frechet_distance(x[:1], x)


# The loss ---------------------------------------------------------------------------------------


def test_gradients_of_the_loss_are_minus_the_averages():
    m = matcher()
    mean, variance = (torch.rand(7, requires_grad=True) for _ in range(2))
    m.inner(mean, variance).backward()
    assert torch.equal(mean.grad, -m.v_mu) and torch.equal(variance.grad, -m.v_var)
    assert m.v_mu.abs().min() > 0 and m.v_var.abs().min() > 0
    gap = m.v_mu @ (m.real.mean - mean) + m.v_var @ (m.real.variance - variance)
    assert torch.equal(m.inner(mean, variance), gap)


def test_averages_are_updated_first_and_constant_in_the_loss():
    m, twin = matcher(), matcher()
    twin.load_state_dict(copy.deepcopy(m.state_dict()))
    twin.real = m.real
    features = torch.rand(16, 7, requires_grad=True)
    m.loss(features).backward()
    with torch.no_grad():
        twin.update(features.mean(0), features.var(0))
        n, centred = len(features), features - features.mean(0)
        expected = -twin.v_mu / n - twin.v_var * 2 * centred / (n - 1)
    torch.testing.assert_close(features.grad, expected)
    assert torch.equal(m.v_mu, twin.v_mu) and torch.equal(m.v_var, twin.v_var)
    assert m.v_mu.grad is not None and not m.v_mu.requires_grad


def test_an_update_is_an_adam_step_on_the_squared_error():
    real = Moments(torch.randn(5), torch.rand(5))
    m = MomentMatcher(real, lr=0.01, betas=(0.5, 0.999))
    v = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=0.01, betas=(0.5, 0.999))
    for _ in range(4):
        mean = torch.randn(5)
        optimizer.zero_grad()
        F.mse_loss(v, real.mean - mean).backward()
        optimizer.step()
        m.update(mean, torch.rand(5))
    torch.testing.assert_close(m.v_mu, v.detach())


def test_averages_go_to_zero_where_moments_are_equal():
    m = matcher(lr=0.01)
    before = m.v_mu.abs().max().item()
    for _ in range(1000):
        m.update(m.real.mean, m.real.variance)
    assert max(m.v_mu.abs().max(), m.v_var.abs().max()) < 0.02 * before


# Extractors -------------------------------------------------------------------------------------


def test_features_are_every_relu_at_every_location():
    extractor, x = build_extractor("random", (1, 8, 8), seed=3), torch.rand(5, 1, 8, 8)
    seen = []
    for layer in extractor.net:
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda _, __, y: seen.append(y))
    shown, answer = extractor(x)
    assert [tuple(part.shape[1:]) for part in shown] == [(16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(shown, seen, strict=True))
    features = extractor.features(x)
    assert features.shape == (5, 16 * 64 + 32 * 16 + 64 * 4)
    assert torch.equal(features[:, 64 + 8 * 2 + 5], seen[0][:, 1, 2, 5])  # channel 1, row 2
    assert torch.equal(flat(shown), features) and torch.equal(answer, shown[-1])
    assert torch.equal(pooled(shown), shown[-1].mean((2, 3)))


def test_extractors_are_frozen_and_the_seeds():
    extractor = build_extractor("random", (3, 8, 8), seed=3).train()
    assert not extractor.training and not any(p.requires_grad for p in extractor.parameters())
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    extractor.features(x).sum().backward()
    assert x.grad.abs().sum() > 0
    again, other = (build_extractor("random", (3, 8, 8), seed=seed) for seed in (3, 4))
    assert torch.equal(again.features(x), extractor.features(x))
    assert not torch.equal(other.features(x), extractor.features(x))


def test_pictures_are_scaled_and_normalised():
    plain = Extractor(nn.Sequential(nn.ReLU()), size=4, mean=(0.5, 0.5, 0.5), std=(2.0, 1.0, 0.5))
    (shown,), _ = plain(torch.full((1, 1, 2, 2), 0.75))
    expected = torch.tensor([0.125, 0.25, 0.5]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(shown, expected)


def test_lenet_knows_mnist(data_dir):
    extractor = build_extractor("lenet", (1, 28, 28), data=data_dir)
    data = load_dataset("mnist", data_dir, val_fraction=0)
    x = data.test.x[:1000] * data.std[0] + data.mean[0]
    shown, logits = extractor(x)
    assert (logits.argmax(1) == data.test.y[:1000]).double().mean() > 0.98
    assert extractor.features(x[:2]).shape == (2, 6 * 28**2 + 16 * 10**2 + 120 + 84)
    assert pooled(shown).shape == (1000, 84)


@pytest.mark.parametrize(("size", "features"), [(32, 303_104), (64, 1_212_416)])
def test_features_of_vgg_19_are_as_many_as_the_paper_says(size, features):
    """Its arrangement, on the meta device: the real one needs torchvision and its weights."""
    layers, channels = [], 3
    for width, convs in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(convs):
            layers += [nn.Conv2d(channels, width, 3, padding=1, device="meta"), nn.ReLU(True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    vgg = Extractor(nn.Sequential(*layers)).to("meta")
    assert vgg.features(torch.empty(2, 3, size, size, device="meta")).shape == (2, features)
    assert len(vgg(torch.empty(1, 3, size, size, device="meta"))[0]) == 16


def fake_torchvision(monkeypatch) -> None:
    """torchvision.models whose vgg19_bn is a small net with the same outer shape."""

    def vgg19_bn(weights):
        assert weights is None, "nothing may be fetched"
        net = nn.Module()
        net.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        net.classifier = nn.Linear(2, 2)
        return net

    module = ModuleType("torchvision.models")
    module.vgg19_bn = vgg19_bn
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", module)


def test_vgg_comes_from_a_local_file(tmp_path, monkeypatch):
    fake_torchvision(monkeypatch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("SPARSETICKET_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"vgg19-bn: no weights found.*--extractor-file"):
        build_extractor("vgg19-bn", (1, 28, 28))
    net = sys.modules["torchvision.models"].vgg19_bn(None)
    file = tmp_path / "hub" / "checkpoints" / "vgg19_bn-c79401a0.pth"
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict(), file)
    for given in (None, file):
        extractor = build_extractor("vgg19-bn", (1, 28, 28), file=given)
        assert extractor.features(torch.rand(2, 1, 28, 28)).shape == (2, 4 * 30 * 30)
        assert extractor.classes is None
        assert torch.equal(extractor.net[0].weight, net.features[0].weight)


def test_extractors_refuse(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"got 'dino', known: {', '.join(EXTRACTORS)}"):
        build_extractor("dino", (1, 28, 28))
    with pytest.raises(ValueError, match="takes grey images, got 3 channels"):
        build_extractor("lenet", (3, 32, 32))
    with pytest.raises(FileNotFoundError, match=r"pretrained/mnist_lenet_991\.pth"):
        build_extractor("lenet", (1, 28, 28), data=tmp_path)
    torch.save({"convnet.c1.weight": torch.zeros(6, 1, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: weights of another network"):
        build_extractor("lenet", (1, 28, 28), file=tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth: not a file of weights"):
        build_extractor("lenet", (1, 28, 28), file=tmp_path / "text.pth")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"sparseticket\[vision\]"):
        build_extractor("vgg19-bn", (1, 28, 28))
