"""Resident bytes of weights, counted from the tensors a model really holds."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

import sparseticket as st
from sparseticket.train.models import build_model

__all__ = ["MemoryRow", "memory_rows"]


@dataclass(frozen=True)
class MemoryRow:
    model: str
    form: str
    weight_bytes: int
    fp32_over: float  # dense fp32 bytes / these bytes


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _weight_tensors(model: torch.nn.Module):
    """Every tensor of the converted layers that stands for weights."""
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    for module in model.modules():
        if isinstance(module, layers):
            yield from (p for n, p in module.named_parameters(recurse=False) if n != "bias")
            yield from module.buffers(recurse=False)


def memory_rows() -> list[MemoryRow]:
    rows = []
    for name, in_shape, classes in (("conv4", (3, 32, 32), 10), ("resnet50", (3, 224, 224), 1000)):
        model = build_model(name, in_shape=in_shape, num_classes=classes)
        dense = _bytes(_weight_tensors(model))
        st.sparsify_(model, st.EdgePopup(density=0.3))
        scored = _bytes(_weight_tensors(model))
        ticket, coded = copy.deepcopy(model), copy.deepcopy(model)
        st.to_form_(ticket, "ticket")
        st.to_form_(coded, "ticket", codes=True)
        for form, size in (
            ("dense fp32", dense),
            ("dense bf16", dense // 2),
            ("scored (search)", scored),
            ("ticket", _bytes(_weight_tensors(ticket))),
            ("ticket, codes", _bytes(_weight_tensors(coded))),
        ):
            rows.append(MemoryRow(name, form, size, round(dense / size, 2)))
        for form, frozen in (("nothing frozen", 0.0), ("70 % frozen", 0.35)):
            size = _search_state(name, in_shape, classes, frozen)
            label = f"scores + momentum, {form}"
            rows.append(MemoryRow(name, label, size, round(dense / size, 2)))
    return rows


def _search_state(name, in_shape, classes, frozen) -> int:
    """Bytes of scores and optimizer after a step of a search with twice ``frozen`` frozen."""
    model = build_model(name, in_shape=in_shape, num_classes=classes)
    st.sparsify_(model, st.Frozen(density=0.5, pruned=frozen, locked=frozen))
    scores = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(scores, lr=0.1, momentum=0.9)
    for parameter in scores:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return _bytes([*scores, *(t for state in optimizer.state.values() for t in state.values())])
