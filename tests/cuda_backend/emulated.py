"""The CUDA kernels as a backend for CPU tensors: csrc/cuda compiled by g++ and executed by the runner."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import building
import problems
import torch
from arena import Arena
from executed import Executed
from torch import Tensor

ARITHMETIC = {"bf16": 0, "f16": 1, "tf32": 2, "f32": 3}
STATISTICS = [
    "launches",
    "blocks",
    "barriers",
    "shuffles",
    "mma",
    "ldmatrix",
    "ldmatrix_conflicts",
    "cp_async",
    "attributes",
]


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.cuda_host_error.restype = ctypes.c_char_p
    library.cuda_host_seed.argtypes = [ctypes.c_uint64]
    for name, problem in problems.PROBLEMS.items():
        assert library[f"cuda_host_sizeof_{name}"]() == ctypes.sizeof(problem), f"{name} differs from csrc/problem.h"
        library[f"cuda_host_{name}_workspace"].restype = ctypes.c_size_t
    return library


@functools.cache
def default_library() -> ctypes.CDLL:
    return load(building.build(building.kernels()))


class Executor(Protocol):
    """Who executes a primitive, and how; on a device that gives a block ``shared_per_block`` bytes."""

    library: ctypes.CDLL
    shared_per_block: int

    def execute(
        self, name: str, problem: ctypes.Structure, arithmetic: int, device: problems.Device, arena: Arena
    ) -> None: ...


class Host:
    """The runner, in this process.

    ``seed`` other than 0 lets warps run as far ahead of each other as the barriers allow, in a random order.
    """

    shared_per_block = 227 << 10

    def __init__(self, library: ctypes.CDLL | None = None, seed: int = 0) -> None:
        self.library = library or default_library()
        self.seed = seed

    def execute(
        self, name: str, problem: ctypes.Structure, arithmetic: int, device: problems.Device, arena: Arena
    ) -> None:
        self.library.cuda_host_seed(self.seed)
        workspace = ctypes.c_void_p(arena.workspace())
        code = self.library[f"cuda_host_{name}"](ctypes.byref(problem), arithmetic, ctypes.byref(device), workspace)
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}: {self.library.cuda_host_error().decode()}")

    def statistics(self) -> dict[str, int]:
        """What the launches since the last call did, by :data:`STATISTICS`."""
        values = (ctypes.c_uint64 * len(STATISTICS))()
        self.library.cuda_host_take_stats(values)
        return dict(zip(STATISTICS, values, strict=True))


class Emulated(Executed):
    """The backend: float32 by TF32 products where ``tf32``, on a device with this many ``multiprocessors``."""

    def __init__(
        self,
        executor: Executor | None = None,
        *,
        tf32: bool = False,
        multiprocessors: int = 4,
        shared_per_block: int | None = None,
        capability: int = 90,
        seed: int = 0,
    ) -> None:
        self.executor = executor or Host(seed=seed)
        self._float32 = "tf32" if tf32 else "f32"
        self._device = problems.Device(multiprocessors, shared_per_block or self.executor.shared_per_block, capability)

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" and dtype in self._arithmetics() else f"no kernels for {dtype} on {device}"

    def statistics(self) -> dict[str, int]:
        assert isinstance(self.executor, Host)
        return self.executor.statistics()

    def workspace(self, name: str, problem: ctypes.Structure, dtype: torch.dtype) -> int:
        arithmetic = ARITHMETIC[self._arithmetics()[dtype]]
        workspace = self.executor.library[f"cuda_host_{name}_workspace"]
        size = workspace(ctypes.byref(problem), arithmetic, ctypes.byref(self._device))
        assert size % 256 == 0, f"{name}: a workspace of {size} bytes"
        return size

    def execute(self, name: str, problem: ctypes.Structure, dtype: torch.dtype, arena: Arena) -> None:
        self.executor.execute(name, problem, ARITHMETIC[self._arithmetics()[dtype]], self._device, arena)

    def update_running(
        self,
        batches: Sequence[Tensor],
        buffers: Sequence[Sequence[Tensor]],
        momenta: Sequence[float],
        unbiased: Sequence[float],
    ) -> None:
        """Arguments as of :func:`problems.update_running`."""
        running = [tensor for kind in buffers for tensor in kind]
        self.run(
            "update_running",
            lambda at: problems.update_running(at, batches, buffers, momenta, unbiased),
            batches[0],
            batches,
            running,
            running,
        )

    def _arithmetics(self) -> dict[torch.dtype, str]:
        return {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: self._float32}
