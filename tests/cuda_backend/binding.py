"""csrc/cuda_binding.cpp over the kernels that the runner executes: operators of torch for CPU tensors."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import building
import torch

from fused_densenet.backends import extension

TORCH = Path(torch.__file__).parent
FLAGS = ["-O2", f"-isystem{TORCH / 'include'}", "-DTORCH_TARGET_VERSION=0x020B000000000000", "-DTORCH_STABLE_ONLY"]
LINK = ["-shared", f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]


def load(namespace: str, kernels: Sequence[Path]) -> Any:
    """``torch.ops``'s namespace of that name, with the binding over ``kernels``; loaded once in a process."""
    return _load(namespace, tuple(kernels))


@functools.cache
def _load(namespace: str, kernels: tuple[Path, ...]) -> Any:
    library = build(namespace, kernels, 4)
    _libraries.append(define(namespace))
    torch.ops.load_library(library)
    return getattr(torch.ops, namespace)


def build(namespace: str, kernels: Sequence[Path], multiprocessors: int) -> Path:
    """The library, for a device of so many ``multiprocessors``."""
    flags = [*FLAGS, f"-DFD_LIBRARY={namespace}", f"-DFD_MULTIPROCESSORS={multiprocessors}"]
    return building.build(kernels, link_flags=LINK, others=[(building.CSRC / "cuda_binding.cpp", flags)])


def define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "FRAGMENT")
    for schema in extension.SCHEMAS:
        library.define(schema)
        torch.library.register_fake(f"{namespace}::{schema.partition('(')[0]}", extension.returns_nothing, lib=library)
    return library


_libraries: list[torch.library.Library] = []  # kept alive: with them their operators go
