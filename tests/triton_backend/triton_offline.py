"""Compiles kernels for GPUs that are not there, with the specialisations of real launches, and reads the resources.

Triton's own binder sees the arguments (divisible by 16, equal to 1); only the driver, which would ask a GPU what it is,
is replaced. Must not be used in a process that interprets.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

FAMILIES = {
    "sm_80": ["sm_80", "sm_86", "sm_89"],
    "sm_90": ["sm_90"],
    "sm_100": ["sm_100", "sm_103"],
    "sm_120": ["sm_120"],
    "gfx942": ["gfx942", "gfx90a", "gfx950"],
    "gfx1100": ["gfx1100", "gfx1201"],
}
"""The GPUs that share the choices of tiles, by the one that names them."""


def _target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


TARGETS = {name: _target(name) for names in FAMILIES.values() for name in names}
SHARED_LIMIT = {
    "sm_80": 101376,  # 166912 were it not for 8.6 and 8.9, which share the choices
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx90a": 65536,
    "gfx950": 163840,
    "gfx1100": 65536,
    "gfx1201": 65536,
}
"""Bytes of shared memory of a block: CUDA C++ Programming Guide, table of compute capabilities; AMD's ISA documents."""

OWN_INSTRUCTION = {90: "wgmma.mma_async", 100: "tcgen05.mma", 103: "tcgen05.mma"}
"""Of tiles of 64 rows and more; smaller ones take ``mma.sync``, as those of other NVIDIA GPUs."""


class _Driver:
    """What triton asks of a driver while it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, Any]:  # the key of triton's cache of compiled kernels
        return (self.target.backend, self.target.arch)

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    @property
    def utils(self) -> "_Driver":
        return self

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 2**20}

    def load_binary(self, *_: Any) -> tuple[str, int, int, int, int]:
        """Module, function, registers, spills and the most threads of a block."""
        return "module", 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """In place of the launch in C, which would reach the driver: nothing."""
        return lambda *arguments: None


@contextlib.contextmanager
def offline(target: str) -> Iterator[None]:
    """Inside the context triton compiles for ``target``, one of :data:`TARGETS`."""
    before, driver._active = getattr(driver, "_active", None), _Driver(TARGETS[target])
    try:
        yield
    finally:
        driver._active = before


def compile_kernel(function: Any, *arguments: Any, target: str, **constants: Any) -> Any:
    """The compiled kernel that a launch with these arguments (CPU tensors or numbers) would run."""
    with offline(target):
        return function.warmup(*arguments, grid=(1,), **constants)


@dataclass
class Resources:
    """Of one compiled kernel.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory per block.
        stack: bytes of local memory per thread; spilled registers live there, and nothing else of these kernels.
        tensor_instructions: matrix instructions in the code.
        own: whether there are some that only GPUs of its kind have.
    """

    registers: int
    shared: int
    stack: int
    tensor_instructions: int
    own: bool


def resources(compiled: Any) -> Resources:
    target = compiled.metadata.target
    if target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
        registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
        code, instruction = compiled.asm["ptx"], "mma.sync"
    else:
        code, instruction = compiled.asm["amdgcn"], "v_mfma" if target.arch.startswith("gfx9") else "v_wmma"
        registers, stack = (
            _number(r"\.vgpr_count:\s+(\d+)", code),
            _number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        )
    own = code.count(OWN_INSTRUCTION[target.arch]) if target.arch in OWN_INSTRUCTION else 0
    return Resources(registers, compiled.metadata.shared, stack, code.count(instruction) + own, own > 0)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return int(match[1])


def _tool(name: str, *arguments: str) -> str:
    """Runs a tool that comes with triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
