"""The primitives as Triton kernels: NVIDIA, AMD and Intel GPUs. At run time triton needs a C compiler.

Every function follows the contract of :mod:`fused_densenet.backends.contract`; :mod:`.primitives`, which has them,
imports triton and is itself imported at first use.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

_PRIMITIVES = (
    "place",
    "place_backward",
    "norm_relu_conv",
    "norm_relu_conv_backward",
    "norm_relu_pool",
    "norm_relu_pool_backward",
    "pack_weights",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _installed():
        return "triton is not installed"
    if dtype not in _DTYPES:
        return f"it has no kernels for {dtype}"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")  # as triton reads it
        return None if interpreted else "it serves GPUs (and the CPU under TRITON_INTERPRET=1), not cpu"
    if device.type not in ("cuda", "xpu"):
        return f"it serves cuda and xpu devices, not {device.type}"
    return _too_old(device) or _no_compiler()


@functools.cache
def _installed() -> bool:
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None  # a folder of that name has a spec without an origin


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"triton needs compute capability 8.0, this GPU has {major}.{minor}"


@functools.cache
def _no_compiler() -> str | None:
    """Why triton could not compile what launches its kernels, C with Python's headers, at its first launch."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return f"triton needs a C compiler at run time and finds no {' or '.join(names)}"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's, as triton does
    if not Path(sysconfig.get_path("include", scheme), "Python.h").exists():
        return "triton needs Python's headers (Python.h) at run time, and they are missing"
    return None


def __getattr__(name: str) -> Any:
    if name not in _PRIMITIVES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import primitives

    globals().update({primitive: getattr(primitives, primitive) for primitive in _PRIMITIVES})
    return globals()[name]
