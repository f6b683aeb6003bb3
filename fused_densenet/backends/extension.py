"""Loads what was compiled, and knows why something was not.

The CPU's kernels are a Python module whose name carries the torch version that it was compiled for: a library built for
one torch and loaded by another misreads tensors without an error, so only the exact one is ever loaded. The CUDA kernels
are a plain library, ``_cuda.so``, against torch's stable ABI: one file serves every torch.
"""

import ctypes
import functools
import importlib
import importlib.machinery
import pathlib
import warnings
from types import ModuleType

import torch

REBUILD = "run `pip install --no-build-isolation --no-deps -e .` in a checkout of fused_densenet"
COMPILER = "g++ 11.3 or newer"
NVCC = "nvcc of CUDA 12.8 or newer"

_GRADIENT = "Tensor stored, Tensor? value, Tensor? value_mean, Tensor? value_correction"
_NORM = "Tensor mean, Tensor var, Tensor gamma, Tensor beta, float eps"
_OWED = "Tensor(d!) dgamma, Tensor(e!) dbeta, Tensor(f!)? correction, Tensor? pixels"

SCHEMAS = (
    "place(Tensor x, Tensor(a!)? out, Tensor(b!)? out_mean, Tensor(c!)? out_var) -> ()",
    f"place_backward({_GRADIENT}, Tensor(a!) out) -> ()",
    f"norm_relu_conv(Tensor x, {_NORM}, Tensor weight, Tensor(a!) out, Tensor(b!)? out_mean, Tensor(c!)? out_var, "
    "bool tf32=False) -> ()",
    f"norm_relu_conv_backward({_GRADIENT}, Tensor x, {_NORM}, Tensor weight, Tensor(a!) dx, bool accumulate, "
    f"Tensor(b!)? dweight, {_OWED}, bool tf32=False) -> ()",
    f"norm_relu_pool(Tensor x, {_NORM}, Tensor(a!) out) -> ()",
    f"norm_relu_pool_backward(Tensor grad, Tensor x, {_NORM}, Tensor(a!) dx, {_OWED}) -> ()",
    "run_program(Tensor program, Tensor(a!)[] operands) -> ()",
)
"""The primitives' operators (:mod:`fused_densenet.backends.contract`), which every compiled library implements for its
device (the last three the CPU's alone): defined below, once, so that the libraries load alone or together in any order.
``tf32`` lets a GPU multiply float32 data in TF32; other devices and dtypes ignore it."""


FUNCTIONS = tuple(schema.partition("(")[0] for schema in SCHEMAS[:-1])
"""The primitives' names; their numbers in a program are the places here."""


def extension_name(torch_version: str) -> str:
    """The module that serves a torch version: ``2.13.0+cpu`` is served by ``_C_torch_2_13``."""
    major, minor = torch_version.split(".")[:2]
    return f"_C_torch_{major}_{minor}"


_PACKAGE = pathlib.Path(__file__).parents[1]


def absent(folder: pathlib.Path, torch_version: str) -> str | None:
    """Why ``folder`` holds no extension for this Python and ``torch_version``, and what to do, or None."""
    name = extension_name(torch_version)
    built = [file.name.partition(".") for file in sorted(folder.glob("_C_torch_*.so"))]
    here = {module for module, _, tag in built if f".{tag}" in importlib.machinery.EXTENSION_SUFFIXES}
    if name in here:
        return None
    if here:
        versions = ", ".join(module.removeprefix("_C_torch_").replace("_", ".") for module in sorted(here))
        return f"the C++ extension was compiled for torch {versions} and torch {torch_version} is running; {REBUILD}"
    if built:
        files = ", ".join("".join(file) for file in built)
        return f"the C++ extension was compiled for another Python ({files}); {REBUILD}"
    return f"the C++ extension was not compiled when fused_densenet was installed; install {COMPILER} and {REBUILD}"


def _load() -> tuple[ModuleType | None, str | None]:
    reason = absent(_PACKAGE, torch.__version__)
    if reason is not None:
        return None, reason
    name = extension_name(torch.__version__)
    try:
        return importlib.import_module(f"fused_densenet.{name}"), None
    except ImportError as error:
        return None, f"the C++ extension {name} does not load ({error}); {REBUILD}"


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    file = _PACKAGE / "_cuda.so"
    if not file.exists():
        return (
            None,
            f"the CUDA kernels were not compiled when fused_densenet was installed; install {NVCC} and {REBUILD}",
        )
    try:
        torch.ops.load_library(file)
        return ctypes.CDLL(str(file)), None
    except OSError as error:
        return None, f"the library of CUDA kernels does not load ({error}); {REBUILD}"


module, missing = _load()
"""The compiled extension, or None and why there is none."""

cuda, cuda_missing = _load_cuda()
"""The library of CUDA kernels, or None and why there is none."""


def returns_nothing(*arguments: object) -> None:
    """The primitives' operators for tensors without data."""


_library = torch.library.Library("fused_densenet", "FRAGMENT")
for _schema in SCHEMAS:
    try:
        _library.define(_schema)
        torch.library.register_fake(f"fused_densenet::{_schema.partition('(')[0]}", returns_nothing, lib=_library)
    except RuntimeError:  # the library's operators are others
        module, missing = None, f"the C++ extension was compiled from other sources; {REBUILD}"


@functools.cache
def warn_if_missing() -> None:
    """Says once that the CPU works without its kernels, and why."""
    if missing is not None:
        warnings.warn(f"dense blocks run slower on the CPU than they could: {missing}", RuntimeWarning, stacklevel=2)
