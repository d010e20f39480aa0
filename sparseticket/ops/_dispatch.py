"""The one door to torch.library, the compiled module and the reference fall-back.

Every op file calls :func:`define` once. CPU implementations hand tensors to ``_C`` as DLPack
capsules (:func:`cap`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import operator
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.dlpack import to_dlpack

from sparseticket import _C

__all__ = [
    "Choice",
    "C",
    "LIB",
    "autocast_off",
    "call",
    "cap",
    "caps",
    "check_padding",
    "check_words",
    "define",
    "explain_op",
    "nthreads",
    "on_plain_cpu",
    "signed64",
    "triton_runs",
]

C = _C
LIB = torch.library.Library("sparseticket", "DEF")
_LOG = logging.getLogger("sparseticket")
_OPS: set[str] = set()
_CHOOSERS: dict[str, Callable[..., Choice]] = {}
_CUDA_CHOOSERS: dict[str, Callable[..., Choice]] = {}  # of the ops with Triton kernels
_ON_CPU: dict[int, tuple[Callable, Callable | None]] = {}  # by id of the op: kernel, autograd node
nthreads = torch.get_num_threads
cap = to_dlpack  # borrows: the capsule keeps the tensor's storage alive for the call


class Choice(NamedTuple):
    """Which kernel runs an op and why; ``str()`` is one line for people."""

    op: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.kernel} ({self.reason})"


def caps(tensors: Iterable[torch.Tensor]) -> list:
    return [cap(t) for t in tensors]


def signed64(layer: int) -> int:
    """A 64-bit layer id as the int64 that op schemas carry."""
    return layer - 2**64 if layer >= 2**63 else layer


@contextlib.contextmanager
def autocast_off(device_type: str):
    """Op bodies compute in the dtypes they were given; modules do the autocasting."""
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield


def check_words(op: str, words: torch.Tensor, rows: int, k: int, name: str = "words") -> None:
    expected = (rows, 2 * ((k + 63) // 64))
    if words.dtype != torch.int32 or words.shape != expected:
        raise ValueError(
            f"{op}: {name}: got {words.dtype} {tuple(words.shape)}, need int32 {expected}, the "
            f"packed mask of a weight whose canonical form is [{rows}, {k}]"
        )


def check_padding(op: str, words: torch.Tensor, k: int, name: str) -> None:
    """ValueError if bits past the ``k`` columns are set: where a count of bits must be a count of
    weights. Kernels themselves never read them."""
    tail = k % 64
    if not tail or not words.numel():
        return
    place = torch.arange(32, device=words.device)
    padding = torch.cat([place, place + 32]).view(2, 32) >= tail
    if bool(((words[:, -2:, None] >> place) & 1)[:, padding].any()):
        raise ValueError(f"{op}: {name}: bits past the weight's {k} columns are set")


def call(op: Callable, *args):
    """``op(*args)``, past the dispatcher where that would find plain CPU tensors and nothing else.
    Its search takes as long as a small product; modules call their ops by this. For ops whose
    tensors are arguments of their own, not in lists."""
    if not on_plain_cpu(args):
        return op(*args)
    kernel, node = _ON_CPU[id(op)]
    wanted = node is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
    if wanted and not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
        return node(*args)
    return kernel(*args)


def on_plain_cpu(args: Iterable) -> bool:
    """Would the dispatcher send an op on these arguments straight to its CPU body: no tensor on
    another device or of a subclass, no mode, transform or profiler?"""
    if torch.compiler.is_compiling() or not _nothing_watches():
        return False
    for arg in args:
        if type(arg) in _PLAIN_TYPES:
            if _keys_of(arg).raw_repr() != _PLAIN_KEYS:
                return False
        elif isinstance(arg, torch.Tensor):  # it may have those keys and override ops all the same
            return False
    return True


def _keys(*names: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, sets).raw_repr()


# Written out: a tensor made here would be one of the mode or device that is on at the import.
_PLAIN_KEYS = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
_PLAIN_TYPES = torch.Tensor, torch.nn.Parameter
_NONE_ADDED = _keys("BackendSelect", "ADInplaceOrView")
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_keys_of, _keys_added = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set


def _nothing_watches() -> bool:
    return (
        _keys_added().raw_repr() == _NONE_ADDED
        and not torch.autograd._profiler_enabled()
        and not torch._C._is_torch_function_mode_enabled()
    )


def define(
    schema: str,
    *,
    cpu: Callable,
    reference: Callable,
    meta: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    choose: Callable[..., Choice] | None = None,
    check: Callable | None = None,
    factory: bool = False,
    cuda: Callable | None = None,
    choose_cuda: Callable[..., Choice] | None = None,
) -> Callable:
    """Register one op: schema, CPU and CUDA bodies, Meta, autograd.

    ``cuda`` is the body that launches Triton kernels (imported inside it); left out, or where
    Triton cannot run, the reference serves CUDA tensors. ``check`` raises for arguments that those
    bodies would misread; left out, Meta does it. A ``factory`` op has no tensor argument that must
    be there; its body looks at ``device``. ``choose`` and ``choose_cuda`` say which of several
    kernels would run. Returns the op as a plain callable.
    """
    name = schema.split("(")[0]
    LIB.define(schema)
    _OPS.add(name)
    meta = _on_one_device(name, meta)
    fallback = _device_body(name, cuda, reference, check or meta)
    if factory:
        kernels = {"CompositeExplicitAutograd": _by_device(cpu, fallback, meta)}
    else:
        differentiable = name if backward is not None else None
        kernels = {
            "CPU": _as_kernel(cpu, "cpu", differentiable),
            "CUDA": _as_kernel(fallback, "cuda", differentiable),
        }
    for key, kernel in kernels.items():
        LIB.impl(name, kernel, key)
    torch.library.register_fake(f"sparseticket::{name}", meta, lib=LIB)
    op = getattr(torch.ops.sparseticket, name).default
    nodes = dict.fromkeys(kernels)
    if backward is not None:
        arguments = op._schema.arguments
        backward = _with_all_needs(backward, len(arguments))
        for key, kernel in kernels.items():
            nodes[key] = _node(kernel, backward, setup_context, arguments)
        torch.library.register_autograd(
            f"sparseticket::{name}",
            backward,
            setup_context=setup_context,
            lib=_WithShortcut({key: (kernels[key], nodes[key]) for key in kernels}),
        )
    if not factory:
        _ON_CPU[id(op)] = kernels["CPU"], nodes["CPU"]
    if choose is not None:
        _CHOOSERS[name] = choose
    if cuda is not None:
        _CUDA_CHOOSERS[name] = choose_cuda or _only_triton(name)
    return op


def _on_one_device(name: str, meta: Callable) -> Callable:
    """Meta that refuses tensors of several devices. The dispatcher sends such a mixture to CUDA's
    or Meta's body, both of which come here; the CPU body sees CPU tensors only."""

    @functools.wraps(meta)
    def run(*args, **kwargs):
        devices = {device.type for device in _devices_of(args, kwargs)}
        if len(devices) > 1:
            listed = ", ".join(sorted(devices))
            raise ValueError(f"{name}: got tensors on {listed}, need one device")
        return meta(*args, **kwargs)

    return run


def _with_all_needs(backward: Callable, count: int) -> Callable:
    """``backward`` with one ``needs_input_grad`` an argument: the dispatcher drops trailing
    arguments that equal their defaults, and their entries with them."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        needs = ctx.needs_input_grad  # restored by torch after the call
        ctx.needs_input_grad = (*needs, *[False] * (count - len(needs)))
        return backward(ctx, *grads)

    return run


class _WithShortcut:
    """``LIB``, to which ``register_autograd`` gives a kernel that spends tens of microseconds on
    finding the next one: plain tensors of one device go straight to theirs, as one autograd node
    with the registered backward where a gradient is wanted."""

    def __init__(self, kernels: dict[str, tuple[Callable, Callable]]) -> None:
        self.kernels = {_plain_keys(device): found for device, found in kernels.items()}

    def impl(self, name: str, autograd: Callable, key: str, *, with_keyset: bool) -> None:
        grad_enabled, any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad
        find = self.kernels.get

        def run(keyset, *args, **kwargs):
            # Modes, transforms and subclasses of tensors add keys of their own.
            found = find(keyset.raw_repr())
            if found is None or kwargs:
                return autograd(keyset, *args, **kwargs)
            kernel, node = found
            if grad_enabled() and any_requires_grad(*args):
                return node(*args)
            return kernel(*args)

        LIB.impl(name, run, key, with_keyset=with_keyset)


def _node(
    kernel: Callable, backward: Callable, setup_context: Callable | None, arguments
) -> Callable:
    """``kernel`` and its registered backward as one autograd node."""
    defaults = tuple(a.default_value if a.has_default_value() else None for a in arguments)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = kernel(*args)
            if setup_context is not None:
                # The dispatcher drops trailing arguments that equal their defaults.
                setup_context(ctx, (*args, *defaults[len(args) :]), output)
            return output

    Node.backward = staticmethod(backward)
    # What Function.apply does before this is for transforms, and keys of plain tensors have none.
    return super(torch.autograd.Function, Node).apply


def _plain_keys(device: str) -> int:
    """The set of keys of an op on strided tensors of this device and nothing else."""
    return _keys(device, f"Autograd{device}")


def _as_kernel(body: Callable, device_type: str, differentiable: str | None) -> Callable:
    """``body`` as a C++ kernel would run: without autocast and autograd, and with its views
    untracked: an output made by ``view`` is no view to autograd (``nn.ReLU(inplace=True)`` would
    raise). One of a ``differentiable`` op, given by name, refuses forward-mode differentiation,
    whose tangents would silently be 0."""
    enabled, below = torch.is_autocast_enabled, torch._C._AutoDispatchBelowADInplaceOrView

    @functools.wraps(body)
    def run(*args, **kwargs):
        # The level, because torch.func.jvp hides the tangents themselves.
        if differentiable and forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{differentiable}: has no forward-mode derivative (jvp, jacfwd, dual_level); "
                "use backward"
            )
        with below():
            if not enabled(device_type):
                return body(*args, **kwargs)
            with autocast_off(device_type):
                return body(*args, **kwargs)

    return run


def _by_device(cpu: Callable, fallback: Callable, meta: Callable) -> Callable:
    bodies = {"cpu": cpu, "meta": meta}

    @functools.wraps(cpu)
    def run(*args, device=None, **kwargs):
        if device is None and kwargs.get("words") is not None:
            device = kwargs["words"].device
        device = torch.device(device or "cpu")
        return bodies.get(device.type, fallback)(*args, device=device, **kwargs)

    return run


def _device_body(
    name: str, cuda: Callable | None, reference: Callable, check: Callable
) -> Callable:
    """The body for CUDA tensors: arguments checked, then Triton kernels, or the plain torch
    reference where there are none or they cannot run."""

    @functools.wraps(reference)
    def run(*args, **kwargs):
        check(*args, **kwargs)
        if cuda is not None and triton_runs(_devices_of(args, kwargs)):
            return cuda(*args, **kwargs)
        _log_once(name)
        return reference(*args, **kwargs)

    return run


def triton_runs(devices: Iterable[torch.device]) -> bool:
    """Whether Triton kernels can run on these devices: on CUDA, on CPU in its interpreter."""
    accepted = {"cuda", "cpu"} if _interpreting() else {"cuda"}
    return all(device.type in accepted for device in devices) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _only_triton(name: str) -> Callable[..., Choice]:
    return lambda *args, **kwargs: Choice(name, "Triton", "the only kernel of this op on CUDA")


@functools.cache
def _log_once(name: str) -> None:
    _LOG.warning("%s: no kernel for this device, the plain torch reference runs", name)


def _devices_of(args: tuple, kwargs: dict) -> set[torch.device]:
    tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    asked = kwargs.get("device")
    return {t.device for t in tensors} | (set() if asked is None else {torch.device(asked)})


def explain_op(name: str, *args, **kwargs) -> Choice:
    """Which kernel ``torch.ops.sparseticket.<name>(*args, **kwargs)`` would run, and why."""
    if name not in _OPS:
        raise ValueError(f"explain: unknown op {name!r}; known: {', '.join(sorted(_OPS))}")
    devices = _devices_of(args, kwargs)
    if any(device.type != "cpu" for device in devices):
        if name in _CUDA_CHOOSERS and triton_runs(devices):
            return _CUDA_CHOOSERS[name](*args, **kwargs)
        return Choice(name, "reference", "no kernel for this device yet, plain torch runs it")
    if name in _CHOOSERS:
        return _CHOOSERS[name](*args, **kwargs)
    return Choice(name, f"{_C.isa()} C++", "the only kernel of this op on CPU")
