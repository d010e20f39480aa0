"""Batch norms folded into the convolutions before them, for inference."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ._sparse import SparseModule, has_hooks
from .conv1d import SparseConv1d
from .conv2d import SparseConv, SparseConv2d

__all__ = ["fuse_batchnorm_"]

_FORMS = ("masked", "compressed")  # frozen random weights cannot take a scale
_NORM_AFTER = {
    **dict.fromkeys((nn.Conv1d, SparseConv1d), nn.BatchNorm1d),
    **dict.fromkeys((nn.Conv2d, SparseConv2d), nn.BatchNorm2d),
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, SparseModule) or super().is_leaf_module(m, qualified_name)


@torch.no_grad()
def fuse_batchnorm_(model: nn.Module) -> list[str]:
    """Fold every batch norm after a convolution into its weights and bias, in place.

    Takes ``nn.Conv1d``, ``nn.Conv2d``, and ours in form ``masked`` or ``compressed``, whose masks
    stay, before ``nn.BatchNorm1d`` and ``nn.BatchNorm2d``; the norms become ``nn.Identity`` and
    their names are returned. Left alone: convolutions and norms that run more than once, whose
    output or parameters others use too, that carry hooks, and norms without running statistics. For
    inference on batches (``nn.BatchNorm1d`` takes the output of an unbatched ``nn.Conv1d`` for one
    of another kind): ValueError unless the model is in eval mode, and where ``torch.fx`` cannot
    follow its forward.
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
        if node.op != "call_module" or type(modules[node.target]) not in _NORM_AFTER.values():
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


def _foldable(conv: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> bool:
    if _NORM_AFTER.get(type(conv)) is not type(norm) or norm.running_mean is None:
        return False
    return conv.form in _FORMS if isinstance(conv, SparseConv) else "weight" in conv._parameters


def _fold(conv: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> None:
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
    if isinstance(conv, SparseConv):
        conv.recipe = None  # the weights are no longer those of a seed
    conv.bias = bias
