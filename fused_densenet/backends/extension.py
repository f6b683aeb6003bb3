"""Loads what was compiled, and knows why something was not.

The CPU's kernels are a library whose name carries the torch version that it was compiled for (``_cpu_torch_2_13.so``): one
built for another torch misreads tensors without an error, so only the exact one is ever loaded. The CUDA kernels are one
library, ``_cuda.so``, against torch's stable ABI, for every torch. Neither is a Python module: they serve every Python.
"""

import ctypes
import functools
import pathlib

import torch

from ..callers import warn
from . import sources

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
    if not folder.is_dir():
        return f"{folder} is part of an archive, of which no library can be loaded; install the wheel instead"
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
    return _library(library_name(torch.__version__), "the C++ extension")


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    if not (_PACKAGE / sources.CUDA).exists():
        return (
            None,
            f"the CUDA kernels were not compiled when fused_densenet was installed; install {NVCC} and {REBUILD}",
        )
    return _library(sources.CUDA, "the library of CUDA kernels")


def _library(name: str, called: str) -> tuple[ctypes.CDLL | None, str | None]:
    file = _PACKAGE / name
    try:
        if sources.is_stale(file):
            return None, f"{called} was compiled from other sources than csrc has now; {REBUILD}"
        torch.ops.load_library(file)
        return ctypes.CDLL(str(file)), None
    except OSError as error:
        return None, f"{called} does not load ({error}); {REBUILD}"


cpu, cpu_missing = _load()
"""The library of the CPU's kernels, or None and why there is none."""

cuda, cuda_missing = _load_cuda()
"""The library of CUDA kernels, or None and why there is none."""


def returns_nothing(*arguments: object) -> None:
    """Operators for tensors without data."""


def _define() -> bool:
    """Whether the process has the operators of ``SCHEMAS``.

    They stay for as long as the process: another import of this package, as test runners and notebooks make, finds those
    of the first, which whatever is left of it uses as well.
    """
    found = vars(torch.ops.fused_densenet)
    if "_defined" not in found:
        operators = torch.library.Library("fused_densenet", "FRAGMENT")
        found["_defined"] = SCHEMAS, operators
        for schema in SCHEMAS:
            operators.define(schema)
            if schema.endswith("-> ()"):
                name = schema.partition("(")[0]
                torch.library.register_fake(f"fused_densenet::{name}", returns_nothing, lib=operators)
    return bool(found["_defined"][0] == SCHEMAS)


if not _define():
    cpu = cuda = None
    cpu_missing = cuda_missing = "this process imported another fused_densenet before; start it again"


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
    warn(_untried, RuntimeWarning)


@functools.cache
def warn_if_missing() -> None:
    """Says once, unless it was said at the import, that the CPU works without its kernels, and why."""
    if cpu_missing is not None and _untried is None:
        warn(f"{_SLOWER}: {cpu_missing}", RuntimeWarning)
