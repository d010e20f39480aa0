"""Batch norms folded into the convolutions before them, for inference."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ._sparse import SparseModule, has_hooks
from .conv2d import SparseConv2d

__all__ = ["fuse_batchnorm_"]

_FORMS = ("masked", "compressed")  # frozen random weights cannot take a scale


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, SparseModule) or super().is_leaf_module(m, qualified_name)


@torch.no_grad()
def fuse_batchnorm_(model: nn.Module) -> list[str]:
    """Fold every ``nn.BatchNorm2d`` after a convolution into its weights and bias, in place.

    Takes ``nn.Conv2d``, and ``SparseConv2d`` in form ``masked`` or ``compressed``, whose masks
    stay; the norms become ``nn.Identity`` and their names are returned. Left alone: convolutions
    and norms that run more than once, whose output or parameters others use too, that carry hooks,
    and norms without running statistics. For inference: ValueError unless the model is in eval
    mode, and where ``torch.fx`` cannot follow its forward.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_batchnorm_: model: got {type(model).__name__}, need an nn.Module")
    if any(m.training for m in model.modules()):
        raise ValueError("fuse_batchnorm_: model: got training mode, need model.eval()")
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(f"fuse_batchnorm_: model: torch.fx cannot trace it: {error}") from error
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs = list(_pairs(graph, modules))
    for conv, name in pairs:
        _fold(conv, modules[name])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity().eval())
    return [name for _, name in pairs]


def _pairs(graph: fx.Graph, modules: dict[str, nn.Module]):
    """Convolution and name of the norm, where folding changes nothing for anyone else."""
    calls = Counter(modules[n.target] for n in graph.nodes if n.op == "call_module")
    read = {id(_attribute(modules, n.target)) for n in graph.nodes if n.op == "get_attr"}
    names = Counter(id(m) for m in modules.values())
    owners = Counter(id(p) for m in set(modules.values()) for p in m.parameters(recurse=False))

    def alone(m: nn.Module) -> bool:
        tensors = (*m.parameters(), *m.buffers())
        own = all(owners[id(p)] == 1 for p in m.parameters())
        unread = not any(id(t) in read for t in tensors)
        return calls[m] == names[id(m)] == 1 and own and unread and not has_hooks(m)

    for node in graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) is not nn.BatchNorm2d:
            continue
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = modules[before.target], modules[node.target]
        if _foldable(conv, norm) and alone(conv) and alone(norm):
            yield conv, node.target


def _attribute(modules: dict[str, nn.Module], target: str):
    owner, _, name = target.rpartition(".")
    return getattr(modules[owner], name)


def _foldable(conv: nn.Module, norm: nn.BatchNorm2d) -> bool:
    if isinstance(conv, SparseConv2d):
        takes = conv.form in _FORMS
    else:
        takes = type(conv) is nn.Conv2d and "weight" in conv._parameters
    return takes and norm.running_mean is not None


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    if getattr(conv, "form", None) == "compressed":
        conv.values.copy_(conv._live(weight.detach()))
    else:
        conv.weight.copy_(weight)
    if isinstance(conv, SparseConv2d):
        conv.recipe = None  # the weights are no longer those of a seed
    conv.bias = bias
