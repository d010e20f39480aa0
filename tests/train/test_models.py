"""Models: weight counts against the papers, shapes, batch size 1, copies, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseticket.train.models import MODELS, build_model

MNIST, CIFAR, IMAGENET = ((1, 28, 28), 10), ((3, 32, 32), 10), ((3, 224, 224), 1000)
DIGITS = ((1, 8, 8), 10)

# specs/strong_tickets.md 1.4; resnet20: specs/trained_tickets.md, 267,696 + 2,560 + 640.
WEIGHTS = {
    "mlp": (DIGITS, 84_480),
    "fc300": (MNIST, 328_200),
    "lenet300": (MNIST, 266_200),
    "conv2": (CIFAR, 4_300_992),
    "conv4": (CIFAR, 2_425_024),
    "conv6": (CIFAR, 2_261_184),
    "conv8": (CIFAR, 5_275_840),
    "cresnet18": (CIFAR, 11_164_352),
    "resnet20": (CIFAR, 270_896),
    "vit": (MNIST, 103_104),
    "resnet18": (IMAGENET, 11_678_912),
    "resnet50": (IMAGENET, 25_502_912),
    "resnet101": (IMAGENET, 44_442_816),
    "wide_resnet50": (IMAGENET, 68_814_016),
}


def _build(name: str, setting=None) -> nn.Module:
    in_shape, num_classes = setting or WEIGHTS[name][0]
    return build_model(name, in_shape=in_shape, num_classes=num_classes)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_every_model_has_an_oracle():
    assert set(WEIGHTS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_weight_count(name):
    with torch.device("meta"):
        model = _build(name)
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == WEIGHTS[name][1]
    assert all(layer.bias is None for layer in _layers(model))


def test_resnet50_has_54_weight_tensors():
    with torch.device("meta"):
        assert len(_layers(_build("resnet50"))) == 54


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101", "wide_resnet50"])
def test_image_nets_reach_7x7_before_the_pool(name):
    with torch.device("meta"):
        model = _build(name)
        seen = []
        model.avgpool.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert seen[0][2:] == (7, 7)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "lenet300", "conv2", "conv4", "conv6", "resnet20"])
def test_forward_shape(name, batch):
    model = _build(name, ((2, 17, 9), 5)).eval()
    y = model(torch.randn(batch, 2, 17, 9))
    assert y.shape == (batch, 5)
    assert y.isfinite().all()


@pytest.mark.parametrize("name", ["mlp", "conv2", "resnet20", "resnet18", "resnet50"])
def test_deepcopy_and_state_dict(name):
    model = _build(name, ((1, 8, 8), 3)).eval()
    twin = copy.deepcopy(model)
    other = _build(name, ((1, 8, 8), 3)).eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x), twin(x))
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", ["mlp", "conv2", "resnet20", "resnet50"])
def test_one_graph_under_compile(name):
    model = _build(name, ((1, 8, 8), 3)).eval()
    x = torch.randn(1, 1, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


def test_resnets_have_torchvision_names():
    with torch.device("meta"):
        keys = set(_build("resnet50").state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.1.weight"} <= keys
    assert {"layer4.2.conv3.weight", "fc.weight"} <= keys
    assert "layer2.1.downsample.0.weight" not in keys


def test_initial_weights_are_kaiming_normal_and_follow_the_seed():
    torch.manual_seed(3)
    model = _build("lenet300")
    torch.manual_seed(3)
    assert torch.equal(model.fc1.weight, _build("lenet300").fc1.weight)
    assert model.fc1.weight.std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.02)


def test_gradients_reach_every_weight():
    model = _build("resnet20", ((1, 8, 8), 3))
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "size"), [("conv2", 1), ("conv4", 3), ("conv6", 7), ("conv8", 15)]
)
def test_conv_net_refuses_images_its_pools_do_not_fit(name, size):
    with pytest.raises(ValueError, match=f"{name}: got {size}x32 images"):
        build_model(name, in_shape=(3, size, 32), num_classes=10)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"'vgg'.*mlp.*wide_resnet50"):
        build_model("vgg", in_shape=(1, 8, 8), num_classes=10)
    with pytest.raises(ValueError, match="in_shape"):
        build_model("mlp", in_shape=(8, 8), num_classes=10)
    with pytest.raises(ValueError, match="num_classes"):
        build_model("mlp", in_shape=(1, 8, 8), num_classes=0)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8), (16, 9)])
def test_stem_pool_is_torchs(size):
    pool = build_model("resnet18", in_shape=(3, 32, 32), num_classes=10).maxpool
    x = torch.randn(2, 5, *size)
    expected = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    assert torch.equal(pool(x), expected)
    assert torch.equal(pool(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(pool(x.requires_grad_()), expected)
