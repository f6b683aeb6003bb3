"""The backends, and which of them runs where.

Each backend has the functions of :mod:`fused_densenet.backends.contract`.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from types import ModuleType

import torch

from ..compilers import constant
from . import cpu, cuda, eager, extension, triton

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton, "eager": eager}
"""All backends by name, the preferred first."""

_VARIABLE = "FUSED_DENSENET_BACKEND"
_thread = threading.local()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the dense blocks called inside the context with backend ``name``; one of :data:`BACKENDS`, or ``"auto"``.

    Takes precedence over the variable FUSED_DENSENET_BACKEND. A backward pass uses the backend of its forward pass.
    Holds for the thread that enters it, as ``torch.no_grad`` does.

    Raises:
        ValueError: there is no such backend. A backend that cannot run raises RuntimeError when a block is called.
    """
    before = getattr(_thread, "backend", None)
    _thread.backend = _known(name)
    try:
        yield
    finally:
        _thread.backend = before


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that runs on ``device`` with data of ``dtype``.

    Raises:
        RuntimeError: the backend that was asked for cannot run there; the message says why.
    """
    name = getattr(_thread, "backend", None) or _known(os.environ.get(_VARIABLE) or "auto")
    if name == "auto":
        for name in BACKENDS:
            if (name, device.type) != ("triton", "cpu") and _reason(name, device, dtype) is None:
                break  # Triton's interpreter on the CPU is for tests
        if name == "eager" and device.type == "cpu" and not torch.compiler.is_compiling():
            extension.warn_if_missing()
        return name
    reason = _reason(name, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for and cannot run: {reason}")
    return name


def rejected(device: torch.device, dtype: torch.dtype, chosen: str) -> list[tuple[str, str]]:
    """The backends that :func:`choose` would prefer to ``chosen``, each with the reason why it does not run."""
    reasons = []
    for name in list(BACKENDS)[: list(BACKENDS).index(chosen)]:
        reason = BACKENDS[name].unavailable(device, dtype)
        if reason is None and (name, device.type) == ("triton", "cpu"):
            reason = "on the CPU its interpreter is for tests"
        reasons.append((name, reason or f"backend {chosen!r} was asked for"))
    return reasons


@constant
def _reason(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot run; a compiler asks rather than traces, as the answer takes a look at the machine."""
    return BACKENDS[name].unavailable(device, dtype)


def _known(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {name!r}")
    return name
