"""Ticket files: the same bytes, any damage found, application all or nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

import sparseticket as st
from sparseticket import Ticket, TicketError
from sparseticket.io import files
from sparseticket.io import ticket as ticket_module


def build(in_features: int = 12, hidden: int = 17) -> nn.Module:
    return nn.Sequential(
        nn.Linear(in_features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Unflatten(1, (1, 1, hidden)),
        nn.Conv2d(1, 4, (1, 3), stride=(1, 2), padding=(0, 1)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * ((hidden + 1) // 2), 3, bias=False),
    )


def scored(config: st.EdgePopup | None = None, filter_fn=None, seed: int = 0) -> nn.Module:
    """A sparse model whose batch norm has seen data."""
    torch.manual_seed(seed)
    model = build()
    st.sparsify_(model, config or st.EdgePopup(density=0.3, seed=seed), filter_fn)
    for _ in range(3):
        model(2 * torch.randn(32, 12) + 1)
    return model.eval()


def contents(model: nn.Module) -> dict[str, object]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"repr": repr(model), **state}


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()
    )


def tampered(ticket: Ticket, change) -> bytes:
    """A file with changed metadata whose own digest is right."""
    meta = copy.deepcopy(ticket.meta)
    change(meta)
    meta["sha256"] = "0" * 64
    return ticket_module._serialise(meta, load_tensors(ticket.raw))


def test_apply_gives_the_saved_model_back(tmp_path):
    model = scored()
    Ticket.from_model(model).save(tmp_path / "a.safetensors")
    torch.manual_seed(99)
    rebuilt = Ticket.load(tmp_path / "a.safetensors").apply(build()).eval()
    st.to_form_(model, "ticket")
    x = torch.randn(32, 12)
    assert torch.equal(rebuilt(x), model(x))
    assert [type(m) for m in rebuilt] == [type(m) for m in model]
    for layer in (rebuilt[0], rebuilt[4], rebuilt[7]):
        assert layer.form == "ticket" and "weight" not in dict(layer.named_parameters())
    frozen = [rebuilt[0].bias, rebuilt[4].bias, rebuilt[1].weight, rebuilt[1].bias]
    assert not any(parameter.requires_grad for parameter in frozen)


def test_new_process_gets_bit_equal_logits(tmp_path):
    model = scored()
    st.to_form_(model, "ticket")
    Ticket.from_model(model).save(tmp_path / "a.safetensors")
    x = torch.randn(32, 12)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "from sparseticket import Ticket; from tests.io.test_ticket import build\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "model = Ticket.load(sys.argv[3] + '/a.safetensors').apply(build()).eval()\n"
        "torch.save(model(torch.load(sys.argv[3] + '/x.pt')), sys.argv[3] + '/y.pt')"
    )
    here = str(ticket_module.Path(__file__).parents[2])
    package = str(ticket_module.Path(st.__file__).parents[1])
    threads = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", code, package, here, str(tmp_path), threads], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(x))


def test_same_model_same_bytes_in_either_form():
    model = scored()
    ticket = Ticket.from_model(model, method="m", config={"b": 1, "a": 2}, extra={"data": {}})
    again = Ticket.from_model(scored(), method="m", config={"a": 2, "b": 1}, extra={"data": {}})
    assert ticket.raw == again.raw
    st.to_form_(model, "ticket")
    assert Ticket.from_model(
        model, method="m", config={"b": 1, "a": 2}, extra={"data": {}}
    ).raw == (ticket.raw)
    assert ticket.raw != Ticket.from_model(scored(seed=1)).raw


def test_apply_then_from_model_gives_the_same_bytes():
    ticket = Ticket.from_model(scored())
    assert Ticket.from_model(ticket.apply(build())).raw == ticket.raw


def test_file_holds_what_the_format_says(tmp_path):
    config = st.EdgePopup(density=0.3, seed=7)
    model = scored(config, seed=7)
    parent = Ticket.from_model(scored())
    ticket = Ticket.from_model(model, config=config, extra={"model": "x"}, parent=parent)
    ticket.save(tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header["__metadata__"]) == ["sparseticket"]
    text = header["__metadata__"]["sparseticket"]
    meta = json.loads(text)
    assert text == json.dumps(meta, sort_keys=True, separators=(",", ":"))
    assert meta["method"] == "edge-popup" and meta["config"]["density"] == 0.3
    assert meta["extra"] == {"model": "x"} and meta["parent"] == parent.meta["sha256"]
    assert (
        meta["sha256"]
        == hashlib.sha256(raw.replace(meta["sha256"].encode(), b"0" * 64)).hexdigest()
    )
    assert meta["layers"]["4"] == {
        "kind": "conv2d",
        "shape": [4, 1, 1, 3],
        "stride": [1, 2],
        "padding": [0, 1],
        "dilation": [1, 1],
        "groups": 1,
        "padding_mode": "zeros",
        "bias": True,
        "seed": 7,
        "layer": st.prng.layer_id("4"),
        "dist": "signed_constant",
        "std": model[4].recipe.std,
        "sigma": model[4].recipe.sigma,
        "kept": 4,
        "codec": meta["layers"]["4"]["codec"],
        "parameter": meta["layers"]["4"]["parameter"],
    }
    statistics = ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert meta["normalisation"] == statistics and meta["not_weight_free"] == []
    assert meta["constants"] == {"0.bias": 0, "1.bias": 0, "1.weight": 1, "4.bias": 0}
    assert header.keys() == {"__metadata__", "mask:0", "mask:4", "mask:7", *statistics}
    assert not any(word in text for word in ("time", "path", "host", "thread"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_sizes_in_info():
    ticket = Ticket.from_model(scored())
    info = ticket.info()
    weights = 17 * 12 + 4 * 3 + 3 * 36
    assert info["weights"] == info["raw_bits"] == weights
    assert info["kept"] == round(0.3 * 204) + 4 + round(0.3 * 108)
    payloads = [t for name, t in load_tensors(ticket.raw).items() if name.startswith("mask:")]
    assert info["coded_bits"] == 8 * sum(p.numel() for p in payloads)
    assert info["normalisation_bits"] == 8 * (2 * 17 * 4 + 8)
    assert info["not_weight_free_bits"] == 0
    assert info["file_bytes"] == len(ticket.raw)
    assert info["dense_bytes"] == 4 * weights + 2 * 17 * 4 + 8
    assert {row["name"]: row["kept"] for row in info["layers"]} == {"0": 61, "4": 4, "7": 32}
    json.dumps(info)


def test_learned_and_dense_parts_are_stored_and_flagged():
    config = st.EdgePopup(density=0.5, keep_bias=True, affine=True)
    model = scored(config, filter_fn=lambda module, name: name != "7")
    with torch.no_grad():
        model[0].bias.uniform_()
        model[1].weight.uniform_()
    ticket = Ticket.from_model(model)
    assert {"0.bias", "1.weight", "7.weight"} <= set(ticket.meta["not_weight_free"])
    rebuilt = ticket.apply(build()).eval()
    x = torch.randn(8, 12)
    torch.testing.assert_close(rebuilt(x), model(x))
    assert torch.equal(rebuilt[0].bias, model[0].bias)
    assert type(rebuilt[7]) is nn.Linear and torch.equal(rebuilt[7].weight, model[7].weight)


@pytest.mark.parametrize("scale", ["none", "density", "dynamic"])
@pytest.mark.parametrize("weights", ["signed_constant", "uniform", "normal"])
def test_every_distribution_and_scale_survives(weights, scale):
    model = scored(st.EdgePopup(density=0.2, weights=weights, scale=scale, scope="global"))
    rebuilt = Ticket.from_model(model).apply(build())
    for i in (0, 4, 7):
        assert rebuilt[i].recipe == model[i].recipe
        assert torch.equal(rebuilt[i].weight, model[i].to_dense().weight)


def test_apply_to_sparse_models_and_through_wrappers():
    ticket = Ticket.from_model(scored())
    for target in (scored(seed=3), ticket.apply(build()), nn.DataParallel(build())):
        assert ticket.apply(target) is target
        assert Ticket.from_model(target).raw == ticket.raw


def test_shared_layers_stay_shared():
    def build_shared() -> nn.Module:
        layer = nn.Linear(6, 6, bias=False)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = build_shared()
    st.sparsify_(model, st.EdgePopup(density=0.5))
    ticket = Ticket.from_model(model)
    assert list(ticket.masks) == ["0"]
    rebuilt = ticket.apply(build_shared())
    assert rebuilt[0] is rebuilt[2]
    x = torch.randn(5, 6)
    torch.testing.assert_close(rebuilt(x), model(x))
    separate = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    with pytest.raises(TicketError, match=r"2\.weight: this tensor is in the model"):
        ticket.apply(separate)


def test_every_flipped_bit_is_found():
    raw = Ticket.from_model(scored()).raw
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(TicketError):
            Ticket(bytes(damaged))


def test_every_cut_and_every_extension_is_found():
    raw = Ticket.from_model(scored()).raw
    for length in [*range(0, len(raw), 7), len(raw) - 1]:
        with pytest.raises(TicketError):
            Ticket(raw[:length])
    with pytest.raises(TicketError, match=r"sha256|not a valid"):
        Ticket(raw + b"\0")


def test_load_names_the_file(tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(Ticket.from_model(scored()).raw[:100])
    with pytest.raises(TicketError, match=r"cut\.safetensors: not a ticket"):
        Ticket.load(path)
    with pytest.raises(FileNotFoundError):
        Ticket.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a safetensors file"),
        (b"PK\3\4" * 100, "not a safetensors file"),
        (save_tensors({"a": torch.zeros(2)}), "without sparseticket's metadata"),
        (save_tensors({"a": torch.zeros(2)}, {"format": "pt"}), "without sparseticket's metadata"),
        (save_tensors({"a": torch.zeros(2)}, {"sparseticket": "[]"}), "no JSON object"),
        (save_tensors({"a": torch.zeros(2)}, {"sparseticket": "{"}), "damaged or foreign"),
        (save_tensors({"a": torch.zeros(2)}, {"sparseticket": "{}"}), "format_version: got None"),
    ],
)
def test_foreign_files(raw, message):
    with pytest.raises(TicketError, match=message):
        Ticket(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format_version=4), "format_version: got 4.* reads 1 and 2 and 3"),
        (lambda meta: meta.update(generator_version=2), "generator_version: got 2"),
        (lambda meta: meta.update(masks_sha256="1" * 64), "masks_sha256 mismatch"),
        (lambda meta: meta["layers"]["0"].update(kept=60), "not a valid ticket"),
        (lambda meta: meta["layers"]["0"].update(shape=[17, 13]), "masks_sha256 mismatch"),
        (lambda meta: meta["layers"]["0"].update(codec="zip"), "known: bitmap, rice"),
        (lambda meta: meta["layers"]["0"].update(kind="lstm"), "known: linear, conv1d"),
        (lambda meta: meta["layers"]["0"].update(dist="cauchy"), "cauchy"),
        (lambda meta: meta["layers"]["0"].update(seed=-1), "seed: got -1"),
        (lambda meta: meta["layers"]["0"].pop("seed"), "seed"),
        (lambda meta: meta["layers"].pop("0"), "mask:0"),
        (lambda meta: meta["normalisation"].pop(), "running_var"),
        (lambda meta: meta.pop("layers"), "layers"),
    ],
)
def test_inconsistent_metadata_with_a_right_digest(change, message):
    raw = tampered(Ticket.from_model(scored()), change)
    with pytest.raises(TicketError, match=message):
        Ticket(raw)


def test_newer_format_is_named_before_its_digest_is_read():
    raw = Ticket.from_model(scored()).raw.replace(
        rb"\"format_version\":1", rb"\"format_version\":9"
    )
    with pytest.raises(TicketError, match="format_version: got 9"):
        Ticket(raw)


def _smaller_image() -> nn.Module:
    model = build()
    model[4] = nn.Conv2d(1, 4, (1, 3), stride=(1, 2), padding=(0, 1), dilation=(1, 2))
    return model


def _with_extra() -> nn.Module:
    return build().append(nn.Linear(3, 3))


def _without_statistics() -> nn.Module:
    model = build()
    model[1] = nn.BatchNorm1d(17, track_running_stats=False)
    return model


def _with_bias() -> nn.Module:
    model = build()
    model[7] = nn.Linear(36, 3)
    return model


def _other_kind() -> nn.Module:
    model = build()
    model[7] = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: build(13), r"0: shape: the ticket has \[17, 12\], the model \[17, 13\]"),
        (_smaller_image, r"4: dilation: the ticket has \[1, 1\], the model \[1, 2\]"),
        (_with_extra, r"8\.bias: this tensor is in the model, not in the ticket"),
        (_without_statistics, r"1\.num_batches_tracked: this tensor is not in the model"),
        (_with_bias, "7: bias: the ticket has False, the model True"),
        (_other_kind, "7: the ticket has a linear layer, the model a Identity"),
        (lambda: build()[:7], "7: the ticket has a linear layer, the model no such module"),
    ],
)
def test_model_that_does_not_fit_stays_as_it_was(target, message):
    model = target()
    before = contents(model)
    with pytest.raises(TicketError, match=message):
        Ticket.from_model(scored()).apply(model)
    assert same(before, contents(model))
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_are_no_ticket():
    with pytest.raises(TicketError, match="has no sparse layers"):
        Ticket.from_model(build())
    masked = nn.Sequential(st.SparseLinear(4, 4, density=0.5))
    with pytest.raises(TicketError, match="0: form 'masked'"):
        Ticket.from_model(masked)
    with pytest.raises(TicketError, match="itself a sparse layer"):
        Ticket.from_model(st.SparseLinear(4, 4, form="scored"))
    with pytest.raises(TicketError, match="plain JSON"):
        Ticket.from_model(scored(), extra={"x": float("nan")})
    stale = scored()
    with torch.no_grad():
        stale[0].scores.mul_(-1).add_(1)
    with pytest.raises(TicketError, match=r"0: .*update_masks"):
        Ticket.from_model(stale)
    with pytest.raises(TicketError, match="0: it is on the meta device"):
        Ticket.from_model(scored().to("meta"))
    with pytest.raises(TypeError, match="from_model: model: got int"):
        Ticket.from_model(3)


def _rounded() -> nn.Module:
    return scored(st.EdgePopup(weights="uniform")).half().float()


def _trained() -> nn.Module:
    model = scored()
    with torch.no_grad():
        model[0].weight.requires_grad_(True).mul_(1.5)
    return model


@pytest.mark.parametrize("make", [_rounded, _trained])
def test_weights_that_the_seed_does_not_give_are_refused(make):
    with pytest.raises(TicketError, match=r"0: .*trained or rounded"):
        Ticket.from_model(make())


def _hooked(model: nn.Module) -> nn.Module:
    model[4].register_forward_hook(lambda *_: None)
    return model


def _stale() -> nn.Module:
    model = scored()
    with torch.no_grad():
        model[4].scores.add_(1)
    return model


def _lazy_norm() -> nn.Module:
    model = build()
    model[1] = nn.LazyBatchNorm1d()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _hooked(build()), "4: .*hooks"),
        (lambda: _hooked(scored()), "4: .*hooks"),
        (lambda: build().to("meta"), "no storage"),
        (lambda: scored().to("meta"), "no storage"),
        (_lazy_norm, r"1\..*no storage"),
        (_stale, "4: .*update_masks"),
    ],
)
def test_models_that_cannot_take_a_ticket_stay_as_they_were(make, message):
    model = make()
    before, values = list(model.modules()), list(model.parameters())
    ticket = Ticket.from_model(scored())
    with pytest.raises(TicketError, match=message):
        ticket.apply(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    assert all(a is b for a, b in zip(values, model.parameters(), strict=True))


def test_apply_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="apply: model: got dict"):
        Ticket.from_model(scored()).apply({})


def test_save_into_a_missing_folder_names_the_path(tmp_path):
    path = tmp_path / "missing" / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"missing/a\.safetensors: there is no folder"):
        Ticket.from_model(scored()).save(path)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Ticket.from_model(scored()).save(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_verify_finds_later_damage():
    ticket = Ticket.from_model(scored())
    ticket.verify()
    ticket.raw = ticket.raw[:-1] + bytes([ticket.raw[-1] ^ 1])
    with pytest.raises(TicketError, match="sha256"):
        ticket.verify()
