"""Triton kernels on small inputs: in the interpreter on the CPU, or compiled on a GPU.

Triton decides at its import whether it interprets, so these files run in processes of their own:
``TRITON_INTERPRET=1 pytest tests/kernels``, as ``tests/test_kernels.py`` does, or without it on
a machine with a GPU.
"""

from __future__ import annotations

import os

import oracle
import pytest
import torch

from sparseticket.kernels.philox import philox_words

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch(tensor, *rest):
        """Triton 3.6 makes a scalar an array of one, which NumPy 2.4 takes for no index."""
        _patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch
    _slow_call = InterpretedFunction.__call__

    def _call(self, *args, **kwargs):
        """Without patching triton.language once more for a helper of ours, which takes a third of
        all the time: the launch has done it."""
        ours = not self.fn.__module__.startswith("triton.")
        return self.rewrite()(*args, **kwargs) if ours else _slow_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = _call
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETING else "cuda")


@pytest.fixture
def on_cuda():
    """Calls an op's CUDA body, also where Triton interprets CPU tensors: ``on_cuda(op, *args)``."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(op, *args, **kwargs):
        if not INTERPRETING:
            return op(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA"):
            return op.redispatch(cuda, *args, **kwargs)
        module = oracle.module_of(op._schema.name.split("::")[1])  # a factory: by its device
        return module._cuda(*args, **kwargs)

    return call


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the kernels launched so far, in order."""
    made: list[str] = []
    kind = type(philox_words)
    run = kind.run

    def spy(self, *args, **kwargs):
        made.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", spy)
    return made
