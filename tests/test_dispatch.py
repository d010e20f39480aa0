"""What every op owes to its registration: devices, the reference elsewhere, no false tangents."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparseticket import ops

GEOMETRY = ((1, 1), (1, 1), (1, 1), 2)
RECIPE = (5, 7, "signed_constant", 0.5)


def _calls() -> dict[str, tuple]:
    """Small valid arguments of every op that takes tensors."""
    torch.manual_seed(0)
    mask, conv_mask = torch.rand(5, 70) < 0.5, torch.rand(6, 2, 3, 3) < 0.05
    words, conv_words = ops.pack_mask(mask), ops.pack_mask(conv_mask)
    x, weight, bias = torch.randn(3, 70), torch.randn(5, 70), torch.randn(5)
    x4d, conv_weight, conv_bias = torch.randn(2, 4, 7, 9), torch.randn(6, 2, 3, 3), torch.randn(6)
    code, grad = ops.rice_encode(words, 70, 1), torch.randn(3, 5)
    live, conv_live = weight[mask], torch.randn(int(conv_mask.sum()))
    grad4d = torch.randn(2, 6, 7, 9)
    return {
        "apply_mask": (weight, words),
        "conv2d_flip": (conv_words, (6, 2, 3, 3), 2, len(conv_live)),
        "conv2d_taps": (conv_words, (6, 2, 3, 3), (7, 9), *GEOMETRY),
        "gather_live": (weight, words, len(live)),
        "mask_ops": (words, ~words, "xor"),
        "masked_conv2d": (x4d, conv_weight, conv_words, conv_bias, *GEOMETRY),
        "masked_linear": (x, weight, words, bias),
        "pack_mask": (mask,),
        "popup_conv2d": (
            *(x4d, conv_weight, conv_weight + 1, conv_words, conv_bias, "abs", 5, 7, 0.5),
            *GEOMETRY,
        ),
        "popup_linear": (x, weight, weight + 1, words, bias, "abs", 5, 7, 0.5),
        "popup_linear_ds": (grad, x, weight + 1, "abs", 5, 7, 0.5),
        "popup_weight": (weight, weight + 1, words, "abs"),
        "regenerate_many": (
            [words, conv_words],
            [5, 5],
            [7, 8],
            [2, 4],
            [5, 70, 6, 2, 3, 3],
            [0.5, 1],
        ),
        "rice_decode": (code, 5, 70, int(mask.sum()), 1),
        "rice_encode": (words, 70, 1),
        "scatter_live": (live, words, (5, 70)),
        "select_mask": ([weight, x], [100, 30]),
        "sparse_conv2d": (x4d, conv_live, conv_words, conv_bias, (6, 2, 3, 3), *GEOMETRY),
        "sparse_conv2d_dw": (x4d, grad4d, conv_words, len(conv_live), (6, 2, 3, 3), *GEOMETRY),
        "sparse_linear": (x, live, words, bias),
        "sparse_linear_dw": (grad, x, words, len(live)),
        "sparse_linear_dx": (grad, live, words, 70),
        "sparse_pattern": (words, 70, len(live)),
        "subset_sum": (x[:, :9].double(), grad.double(), torch.tensor(0.1, dtype=torch.float64)),
        "ticket_codes": (words, 70, 5, 7),
        "ticket_conv2d": (x4d, conv_words, conv_bias, *RECIPE, (6, 2, 3, 3), *GEOMETRY),
        "ticket_linear": (x, words, bias, *RECIPE),
        "unpack_mask": (words, (5, 70)),
    }


CALLS = _calls()
LAYERS = ("masked", "popup", "sparse", "ticket")
DIFFERENTIABLE = ["apply_mask", *(f"{a}_{b}" for a in LAYERS for b in ("linear", "conv2d"))]
FULL = [(name, name[:6] != "sparse") for name in DIFFERENTIABLE]  # those have values to their mask
FACTORIES = {"regenerate", "sign_words"}
LISTS = {"regenerate_many", "select_mask"}  # take lists of tensors
MUTATING = {"masked_step", "popup_step"}  # return nothing
LAYOUT_OF_KERNELS = {"conv2d_taps", "sparse_pattern"}  # the reference's derived data are its own


def test_every_op_is_listed():
    public = {n for n in ops.__all__ if isinstance(getattr(ops, n), torch._ops.OpOverload)}
    assert public == CALLS.keys() | FACTORIES | MUTATING


@pytest.mark.parametrize("name", [n for n in CALLS if n not in LAYOUT_OF_KERNELS])
def test_the_body_of_other_devices_is_the_reference(name):
    """What a CUDA tensor would meet, run on CPU tensors."""
    op, args = getattr(ops, name), CALLS[name]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    made = pytree.tree_leaves(op.redispatch(cuda, *args))
    for got, expected in zip(made, pytree.tree_leaves(op(*args)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_several_devices_are_refused(name):
    op, (leaves, spec) = getattr(ops, name), pytree.tree_flatten(CALLS[name])
    places = [i for i, a in enumerate(leaves) if isinstance(a, torch.Tensor)]
    for i in places if len(places) > 1 else []:
        moved = [a.to("meta") if j == i else a for j, a in enumerate(leaves)]
        with pytest.raises(ValueError, match=f"{name}: got tensors on cpu, meta, need one device"):
            op(*pytree.tree_unflatten(moved, spec))


def test_masks_of_another_device_are_refused():
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    with pytest.raises(ValueError, match="select_mask: within: got meta, need cpu"):
        ops.select_mask([torch.randn(5, 70)], [3], [words.to("meta")])
    with pytest.raises(ValueError, match="regenerate: got tensors on cpu, meta, need one"):
        ops.regenerate(*RECIPE[:2], (5, 70), *RECIPE[2:], words=words.to("meta"), device="cpu")


@pytest.mark.parametrize(
    ("name", "full"), [(n, f) for n, may in FULL for f in ((False, True) if may else (False,))]
)
def test_outputs_may_be_changed_in_place(name, full):
    """As nn.ReLU(inplace=True) does, after every shape of input that is run in its own way."""
    op, (x, *rest) = getattr(ops, name), CALLS[name]
    if full:
        rest = [
            a | -1 if isinstance(a, torch.Tensor) and a.dtype == torch.int32 else a for a in rest
        ]
    many = [] if name == "apply_mask" else [x[:1].expand(20, *x.shape[1:]), x[0], x[None, :1]]
    for given in (x, *(t for t in many if t.ndim < 5)):
        leaf = given.clone().requires_grad_()
        torch.autograd.backward(op(leaf, *rest).relu_().sum())
        inplace, leaf.grad = leaf.grad, None
        torch.autograd.backward(op(leaf, *rest).relu().sum())
        assert torch.equal(inplace, leaf.grad)


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


class _Override(torch.Tensor):
    """Known to torch's Python arguments only; its keys are those of any tensor."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, op, types, args=(), kwargs=None):
        cls.seen.append(op)
        with torch._C.DisableTorchFunctionSubclass():
            return op(*args, **(kwargs or {}))


WAYS = {"op": lambda op: op, "call": lambda op: partial(ops.call, op)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_modes_and_transforms_see_the_op(name, way):
    """The short ways to a kernel are for plain tensors only."""
    op, (x, *rest) = getattr(ops, name), CALLS[name]
    named, op = op, WAYS[way](op)
    expected = named(x, *rest)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(op(x, *rest), expected)
    assert f"sparseticket::{name}" in {event.key for event in profile.key_averages()}
    for given in (x, x.clone().requires_grad_()):
        with _Seen() as seen:
            got = op(given, *rest)
        assert torch.equal(got, expected) and seen.ops == [named]
    with torch.inference_mode():
        assert torch.equal(op(x, *rest), expected)
    _Override.seen.clear()
    assert torch.equal(op(x.as_subclass(_Override), *rest), expected)
    assert _Override.seen == [named]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(x, *rest), expected)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in (x, *rest)]
        assert op(*fakes).shape == expected.shape
    constant = torch.func.grad(lambda t: (op(t.detach(), *rest) * t.sum()).sum())(x)
    torch.testing.assert_close(constant, expected.sum().expand_as(x))


@pytest.mark.parametrize("name", sorted(CALLS.keys() - LISTS))
def test_a_call_past_the_dispatcher_is_the_op(name):
    op, args = getattr(ops, name), CALLS[name]
    made = pytree.tree_leaves(ops.call(op, *args))
    for got, expected in zip(made, pytree.tree_leaves(op(*args)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
def test_no_gradient_where_autograd_is_left_out(way):
    op, (x, *rest) = WAYS[way](ops.masked_linear), CALLS["masked_linear"]
    leaf = x.clone().requires_grad_()
    with torch._C._AutoDispatchBelowAutograd():
        assert not op(leaf, *rest).requires_grad
    assert op(leaf, *rest).requires_grad


@pytest.mark.parametrize(
    "around", ["contextlib.nullcontext()", "torch.device('meta')", "torch.inference_mode()"]
)
def test_what_is_plain_does_not_depend_on_the_first_import(around):
    code = f"""
import contextlib, torch
with {around}:
    from sparseticket import ops
print(ops.on_plain_cpu([torch.ones(2), 3, torch.nn.Parameter(torch.ones(2))]))
print(ops.on_plain_cpu([torch.ones(2, device="meta")]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "popup_weight"])
def test_the_short_way_has_the_registered_gradients(name, way):
    """And second ones, for every argument that has any."""
    op, args = WAYS[way](getattr(ops, name)), CALLS[name]
    at = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def gradients():
        leaves = [args[i].clone().requires_grad_() for i in at]
        given = [leaves[at.index(i)] if i in at else a for i, a in enumerate(args)]
        y = op(*given)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        again = sum(g.sum() for g in first)
        return [y, *first, *torch.autograd.grad(again, leaves, allow_unused=True)]

    short = gradients()
    with _Seen():  # under a mode the dispatcher goes its whole way
        whole = gradients()
    for ours, theirs in zip(short, whole, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name):
    """torch would give tangents of 0."""
    op, (x, *rest) = getattr(ops, name), CALLS[name]
    with pytest.raises(NotImplementedError, match=f"{name}: has no forward-mode derivative"):
        torch.func.jvp(lambda t: op(t, *rest), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        op(torch.autograd.forward_ad.make_dual(x, x), *rest)
    op(x, *rest)


def test_explain_names_triton_where_it_would_run():
    recipe = (5, 7, (3, 70), "uniform", 0.5)
    assert ops.explain_op("regenerate", *recipe, device="cuda").kernel == "Triton"
    assert ops.explain_op("regenerate", *recipe, device="meta").kernel == "reference"
    assert ops.explain_op("regenerate", *recipe).kernel.endswith("C++")
    assert ops.explain_op("sign_words", *recipe[:3], device="cuda").kernel == "Triton"
