"""Compiles csrc/cuda with g++ for the runner, once per content of the sources."""

import functools
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compiled import cached, run

HERE = Path(__file__).parent
RUNNER = HERE / "runner"
CSRC = HERE.parent.parent / "csrc"
JOBS = 2
COMPILER = os.environ.get("CXX", "g++")
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# Multiplication and addition are contracted on a GPU only where the source says fmaf, or by nvcc's choice: here never.
NUMBERS = ["-ffp-contract=off", "-march=native"]
FLAGS = ["-std=c++20", "-DCUDA_HOST", "-g1", "-fPIC", *NUMBERS, *WARNINGS, f"-I{CSRC / 'cuda'}", f"-I{RUNNER}"]


@functools.cache
def toolkit() -> Path:
    """The CUDA toolkit's folder: CUDA_HOME, or where nvcc is."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parent.parent, "/usr/local/cuda"]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_bf16.h").exists():
            return Path(home)
    raise RuntimeError("these tests need the CUDA toolkit: set CUDA_HOME or put nvcc on PATH")


def kernels() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def headers() -> list[Path]:
    return sorted([CSRC / "problem.h", HERE.parent / "serving.h", *(CSRC / "cuda").glob("*.*h"), *RUNNER.glob("*.h")])


def compile_object(source: Path, flags: Sequence[str]) -> Path:
    command = [COMPILER, *FLAGS, f"-isystem{toolkit() / 'include'}", *flags, "-x", "c++", "-c"]
    parts = [*command, source, *headers(), *sorted(CSRC.glob("*.h") if source.parent == CSRC else [])]
    return cached(".o", parts, lambda made: run([*command, source, "-o", made]))


def build(
    sources: Sequence[Path],
    kernel_flags: Sequence[str] = ("-O2",),
    runner_flags: Sequence[str] = (),
    link_flags: Sequence[str] = ("-shared",),
    main: Sequence[str] = (),
    others: Sequence[tuple[Path, Sequence[str]]] = (),
) -> Path:
    """A library of kernels, the runner and ``others`` with flags of their own, or a program with ``main``.

    Objects are compiled ``JOBS`` at a time.

    Only the kernels get ``kernel_flags``: the runner calls no memset or memcpy that a sanitizer would see.
    """
    quiet = ["-O2", "-fno-tree-loop-distribute-patterns", *runner_flags]
    parts = [
        RUNNER / name
        for name in ("scheduler.cpp", "collectives.cpp", "tensor_core.cpp", "runtime.cpp", "shim.cpp", *main)
    ]
    work = [(source, kernel_flags) for source in sources] + [(part, quiet) for part in parts]
    work += others
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda item: compile_object(*item), work))
    # A torch with CUDA brings the runtime's functions, which have the names of the runner's, into the process.
    command = [COMPILER, *link_flags, "-Wl,-Bsymbolic", *objects]
    return cached("" if main else ".so", command, lambda made: run([*command, "-o", made]))
