"""The CPU's kernels for aarch64: compiled by a cross compiler as setup.py compiles them, executed by qemu."""

import ctypes
import functools
import importlib.util
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from arena import Arena
from compiled import cached, run
from executed import Executed
from served import Program

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER, DISASSEMBLER, QEMU = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64"
JOBS = 2
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
"""In the order of DType in csrc/problem.h."""


def missing() -> str | None:
    absent = [tool for tool in (COMPILER, DISASSEMBLER, QEMU) if shutil.which(tool) is None]
    install = "Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user"
    return f"there is no {' and no '.join(absent)} on PATH ({install})" if absent else None


@functools.cache
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def objects() -> dict[str, Path]:
    """Of the kernels and of the runner, by the names of their files."""
    setup = setup_script()
    sources = [*setup.kernel_files(COMPILER), HERE / "runner.cpp"]
    headers = [ROOT / "csrc/problem.h", HERE.parent / "serving.h", *sorted((ROOT / "csrc/cpu").glob("*.[hi]*"))]

    def compile_one(source: Path) -> Path:
        command = [COMPILER, *setup.FLAGS, *setup.OPTIMISE, "-Werror", "-c", source]
        return cached(".o", [*command, *headers], lambda made: run([*command, "-o", made]))

    with ThreadPoolExecutor(JOBS) as pool:
        return dict(zip([source.stem for source in sources], pool.map(compile_one, sources), strict=True))


@functools.cache
def runner() -> Path:
    command = [COMPILER, "-static", *objects().values()]
    return cached("", command, lambda made: run([*command, "-o", made]))


def disassembly(name: str) -> str:
    return run([DISASSEMBLER, "-d", "-C", "--no-show-raw-insn", objects()[name]])


def on(processor: str) -> list[str | Path]:
    """The command that executes the runner on a processor, as qemu names it."""
    return [QEMU, "-cpu", processor, runner()]


def environment(capability: str | None) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    return ours if capability is None else {**ours, "ATEN_CPU_CAPABILITY": capability}


def instruction_sets(processor: str, capability: str | None = None) -> list[str]:
    """Of the kernels for float32 and for bfloat16."""
    command: Sequence[str | Path] = [*on(processor), "sets"]
    done = subprocess.run(command, env=environment(capability), check=True, capture_output=True, text=True)
    return done.stdout.split()


class Aarch64(Executed):
    """The backend on a processor.

    Everything is executed twice, by several threads' tasks in two orders, in memory that ends where pages begin or begins
    where they end that cannot be touched: the results must have the same bits.
    """

    threads = 3

    def __init__(self, processor: str) -> None:
        self._program = Program(on(processor), environment(None))

    def close(self) -> None:
        self._program.close()

    def workspace(self, name: str, problem: ctypes.Structure, dtype: torch.dtype) -> int:
        return self._program.request(self._head(name, dtype, measures=True), problem)

    def execute(self, name: str, problem: ctypes.Structure, dtype: torch.dtype, arena: Arena) -> None:
        before = arena.bytes.clone()
        self._program.request(self._head(name, dtype), problem, arena)
        first = [buffer.clone() for buffer in arena.buffers()]
        arena.bytes.copy_(before)
        self._program.request(self._head(name, dtype, at_end=True), problem, arena)
        for buffer, other in zip(arena.buffers()[:-1], first, strict=False):  # all but the workspace
            assert torch.equal(buffer, other), f"{name}: two runs differ"

    def _head(self, name: str, dtype: torch.dtype, measures: bool = False, at_end: bool = False) -> bytes:
        return struct.pack("=32s2i2Q", name.encode(), DTYPES.index(dtype), self.threads, measures, at_end)
