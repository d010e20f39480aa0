"""st.fuse_batchnorm_: the same function with fewer layers, and what it must leave alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.train.models import build_model


@dataclass(frozen=True)
class _Form:
    form: str
    density: float = 0.1

    def plan(self, name, module):
        return {"form": self.form, "density": self.density}


def _model(name="resnet20", form=None):
    torch.manual_seed(0)
    model = build_model(name, in_shape=(3, 16, 16), num_classes=10)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    if form:
        st.sparsify_(model, _Form(form))
    return model.eval()


def _norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("form", [None, "masked", "compressed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_network_is_the_same_function(form, dtype):
    model = _model(form=form).to(dtype)
    x = torch.randn(2, 3, 16, 16, dtype=dtype)
    masks = [m.mask_words.clone() for m in model.modules() if isinstance(m, st.SparseConv2d)]
    with torch.no_grad():
        expected, norms = model(x), _norms(model)
        assert sorted(st.fuse_batchnorm_(model)) == sorted(norms)
        assert not _norms(model)
        tolerance = 1e-3 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    after = [m.mask_words for m in model.modules() if isinstance(m, st.SparseConv2d)]
    assert all(map(torch.equal, masks, after))
    assert st.fuse_batchnorm_(model) == []


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", [None, "masked", "compressed"])
def test_bias_groups_and_norms_without_affine(form, bias, affine):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=bias)
    if form:
        conv = st.SparseConv2d.from_dense(conv, density=0.3, form=form)
    model = nn.Sequential(conv, nn.BatchNorm2d(6, affine=affine)).eval()
    nn.init.normal_(model[1].running_mean)
    x = torch.randn(2, 4, 9, 9)
    expected = model(x)
    assert st.fuse_batchnorm_(model) == ["1"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert form != "compressed" or model[0].values.numel() == model[0].mask.kept


@pytest.mark.parametrize("form", [None, "masked", "compressed"])
def test_convolutions_of_one_dimension(form):
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, bias=form is None)
    if form:
        conv = st.SparseConv1d.from_dense(conv, density=0.3, form=form)
    head = [nn.Flatten(), nn.Linear(30, 6), nn.BatchNorm1d(6)]  # no convolution: stays
    model = nn.Sequential(conv, nn.BatchNorm1d(6), nn.ReLU(), *head)
    x = torch.randn(8, 4, 9)
    model(x)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    expected = model.eval()(x)
    assert st.fuse_batchnorm_(model) == ["1"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert form != "compressed" or model[0].values.numel() == model[0].mask.kept


def test_a_norm_of_other_dimensions_is_left_alone():
    """Unbatched images [C, H, W], which the norm takes for a batch of C rows of H channels."""
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm1d(7)).eval()
    nn.init.uniform_(model[1].running_var, 2, 3)
    x = torch.randn(3, 7, 7)
    expected = model(x)
    assert st.fuse_batchnorm_(model) == []
    assert torch.equal(model(x), expected)


def test_weights_from_a_seed_are_their_own_after_folding():
    conv = st.SparseConv2d(3, 4, 3, density=0.5, weights="signed_constant")
    model = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
    nn.init.uniform_(model[1].running_var, 2, 3)
    st.fuse_batchnorm_(model)
    assert "0.seed" not in model.state_dict()
    with pytest.raises(ValueError, match="seed"):
        conv.to_form("ticket")


@pytest.mark.parametrize("form", ["scored", "ticket"])
def test_frozen_random_weights_keep_their_norm(form):
    assert st.fuse_batchnorm_(_model(form=form)) == []


class _Twice(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.bn = how, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other = nn.Conv2d(3, 3, 1)
        if how == "shared parameter":
            self.other.weight = self.conv.weight
        if how == "two names":
            self.alias = self.bn
        if how == "hook":
            self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        if self.how == "conv output":
            z = z + y
        if self.how == "conv called twice":
            z = self.conv(z)
        if self.how == "weight read":
            z = z + self.conv.weight.sum()
        if self.how == "norm parameter read":
            z = z + self.bn.weight.sum()
        return self.other(z)


@pytest.mark.parametrize(
    "how",
    [
        "conv output",
        "conv called twice",
        "weight read",
        "norm parameter read",
        "shared parameter",
        "two names",
        "hook",
    ],
)
def test_what_others_use_is_left_alone(how):
    assert st.fuse_batchnorm_(_Twice(how).eval()) == []


def test_norm_without_statistics_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert st.fuse_batchnorm_(model) == []


class _Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_errors_say_what_is_wrong_and_change_nothing():
    with pytest.raises(TypeError, match="model"):
        st.fuse_batchnorm_("resnet")
    model = _model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="eval"):
        st.fuse_batchnorm_(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    with pytest.raises(ValueError, match="trace"):
        st.fuse_batchnorm_(_Branches().eval())
