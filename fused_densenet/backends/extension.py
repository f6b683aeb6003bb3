"""Loads what was compiled, and knows why something was not.

The CPU's kernels are a library whose name carries the torch version that it was compiled for (``_cpu_torch_2_13.so``): one
built for another torch misreads tensors without an error, so only the exact one is ever loaded. The CUDA kernels are one
library, ``_cuda.so``, against torch's stable ABI, for every torch. Neither is a Python module: they serve every Python.
"""

import ctypes
import functools
import pathlib
import warnings

import torch

NEWEST_TORCH = (2, 15)
"""The newest that this package was tried with."""

REBUILD = "run `pip install --no-build-isolation --no-deps -e .` in a checkout of fused_densenet"
COMPILER = "g++ 11.3 or newer"
NVCC = "nvcc of CUDA 12.8 or newer"

_GRADIENT = "Tensor stored, Tensor? value, Tensor? value_mean, Tensor? value_correction, float value_slope"
_NORM = "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, float slope"
_OWED = "Tensor(d!)? dgamma, Tensor(e!)? dbeta, Tensor(f!)? correction, Tensor? pixels"

NO_NORM = (None, None, None, None, 0.0, 0.0)
NO_OWED = (None, None, None, None)
"""What an operator is given for a norm, and for what it is owed, where there is none."""

PRIMITIVES = (
    "place(Tensor x, Tensor(a!)? out, Tensor(b!)? out_mean, Tensor(c!)? out_var) -> ()",
    f"place_backward({_GRADIENT}, Tensor(a!) out) -> ()",
    f"norm_relu_conv(Tensor x, {_NORM}, Tensor weight, Tensor(a!) out, Tensor(b!)? out_mean, Tensor(c!)? out_var, "
    "Tensor? bias=None, float out_slope=1.0, bool tf32=False) -> ()",
    f"norm_relu_conv_backward({_GRADIENT}, Tensor x, {_NORM}, Tensor weight, Tensor(a!) dx, bool accumulate, "
    f"Tensor(b!)? dweight, {_OWED}, Tensor(g!)? dbias=None, bool tf32=False) -> ()",
    f"norm_relu_pool(Tensor x, {_NORM}, Tensor(a!) out) -> ()",
    f"norm_relu_pool_backward(Tensor grad, Tensor x, {_NORM}, Tensor(a!) dx, {_OWED}) -> ()",
    f"norm_relu_mean(Tensor x, {_NORM}, Tensor(a!) out) -> ()",
    "strided_conv(Tensor x, Tensor weight, Tensor(a!) out, int[] stride, int[] padding) -> ()",
)
"""The primitives (:mod:`fused_densenet.backends.contract`) as operators.
``tf32`` lets a GPU multiply float32 data in TF32; other devices and dtypes ignore it."""

SCHEMAS = (
    *PRIMITIVES,
    "run_program(Tensor program, Tensor(a!)[] operands, bool tf32, Tensor[] bound) -> ()",
    "run_network(Tensor program, Tensor x, int[] layout, bool spent, bool flat, Tensor bound) -> Tensor",
    "update_running(Tensor[] stats, Tensor[] inside, int[] groups, Tensor(a!)[] buffers, float[] momenta, "
    "float[] unbiased, Tensor? bound=None) -> ()",
    "bind(Tensor[] tensors, bool constant=False) -> Tensor",
    "bind_like(Tensor bound) -> Tensor",
    "bound_tensors(Tensor bound) -> Tensor[]",
    "stand_ins(Tensor[] bound) -> Tensor[]",
    "check_unchanged(Tensor stand_in) -> ()",
    "empty_like(Tensor[] tensors) -> Tensor[]",
    "empty_pages(int[] size, int[] stride, ScalarType dtype) -> Tensor",
)
"""The operators of every compiled library, defined below, once, so that the libraries load alone or together in any order.
What is bound, the CPU's library keeps from call to call; it alone has the last seven, ``run_network``, ``norm_relu_mean`` and ``strided_conv``."""


FUNCTIONS = tuple(schema.partition("(")[0] for schema in PRIMITIVES)
"""The primitives' names; their numbers in a program are the places here."""


def library_name(torch_version: str) -> str:
    """The file that serves a torch version: ``2.13.0+cpu`` is served by ``_cpu_torch_2_13.so``."""
    major, minor = torch_version.split(".")[:2]
    return f"_cpu_torch_{major}_{minor}.so"


_PACKAGE = pathlib.Path(__file__).parents[1]


def absent(folder: pathlib.Path, torch_version: str) -> str | None:
    """Why ``folder`` holds no extension for ``torch_version``, and what to do, or None."""
    built = {file.name for file in folder.glob("_cpu_torch_*.so")}
    if library_name(torch_version) in built:
        return None
    if built:
        minors = sorted(int(name.removesuffix(".so").rpartition("_")[2]) for name in built)
        versions = ", ".join(f"2.{minor}" for minor in minors)
        return f"the C++ extension was compiled for torch {versions} and torch {torch_version} is running; {REBUILD}"
    return f"the C++ extension was not compiled when fused_densenet was installed; install {COMPILER} and {REBUILD}"


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    reason = absent(_PACKAGE, torch.__version__)
    if reason is not None:
        return None, reason
    try:
        return _library(library_name(torch.__version__)), None
    except OSError as error:
        return None, f"the C++ extension does not load ({error}); {REBUILD}"


def _library(name: str) -> ctypes.CDLL:
    torch.ops.load_library(_PACKAGE / name)
    return ctypes.CDLL(str(_PACKAGE / name))


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    if not (_PACKAGE / "_cuda.so").exists():
        return (
            None,
            f"the CUDA kernels were not compiled when fused_densenet was installed; install {NVCC} and {REBUILD}",
        )
    try:
        return _library("_cuda.so"), None
    except OSError as error:
        return None, f"the library of CUDA kernels does not load ({error}); {REBUILD}"


cpu, cpu_missing = _load()
"""The library of the CPU's kernels, or None and why there is none."""

cuda, cuda_missing = _load_cuda()
"""The library of CUDA kernels, or None and why there is none."""


def returns_nothing(*arguments: object) -> None:
    """Operators for tensors without data."""


_operators = torch.library.Library("fused_densenet", "FRAGMENT")
for _schema in SCHEMAS:
    try:
        _operators.define(_schema)
        if _schema.endswith("-> ()"):
            torch.library.register_fake(f"fused_densenet::{_schema.partition('(')[0]}", returns_nothing, lib=_operators)
    except RuntimeError:  # the library's operators are others
        cpu, cpu_missing = None, f"the C++ extension was compiled from other sources; {REBUILD}"


def untried(torch_version: str) -> str | None:
    """What to know where torch is newer than any that this package was tried with, or None."""
    major, minor = map(int, torch_version.split(".")[:2])
    if (major, minor) <= NEWEST_TORCH:
        return None
    newest = ".".join(map(str, NEWEST_TORCH))
    said = f"torch {torch_version} is newer than {newest}, the newest that fused_densenet was tried with"
    return f"{said}; {_SLOWER}: {cpu_missing}" if cpu_missing else said


_SLOWER = "dense blocks run slower on the CPU than they could"
_untried = untried(torch.__version__)
if _untried is not None:
    warnings.warn(_untried, RuntimeWarning, stacklevel=2)


@functools.cache
def warn_if_missing() -> None:
    """Says once, unless it was said at the import, that the CPU works without its kernels, and why."""
    if cpu_missing is not None and _untried is None:
        warnings.warn(f"{_SLOWER}: {cpu_missing}", RuntimeWarning, stacklevel=2)
