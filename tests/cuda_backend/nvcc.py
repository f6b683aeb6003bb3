"""The kernels compiled for GPUs that are not there: PTX by nvcc, and what ptxas says of its machine code."""

import functools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from building import CSRC, JOBS, cached, headers, run, toolkit

ARCHITECTURES = ("80", "90a", "100")
PTX_OF = {"86": "80", "120": "80"}  # what is compiled from another architecture's PTX: the sources know of sm_80 only
FLAGS = ["-std=c++20", "-O3", f"-I{CSRC / 'cuda'}"]


class Resources(NamedTuple):
    """Of one kernel: registers of a thread, bytes of static shared memory, of stack, and of spills."""

    registers: int
    shared: int
    stack: int
    spills: int


class Limits(NamedTuple):
    """Of one multiprocessor: bytes of shared memory for all blocks, for one; threads; blocks."""

    shared: int
    shared_per_block: int
    threads: int
    blocks: int


# CUDA programming guide, "Technical Specifications per Compute Capability". Registers are 65536 everywhere.
LIMITS = {
    "80": Limits(164 << 10, 163 << 10, 2048, 32),
    "90a": Limits(228 << 10, 227 << 10, 2048, 32),
    "100": Limits(228 << 10, 227 << 10, 2048, 32),
}


def ptx(source: Path, architecture: str) -> Path:
    command = [toolkit() / "bin" / "nvcc", *FLAGS, f"-arch=compute_{architecture}", "-ptx"]
    parts = [*map(str, command), source, *headers()]
    return cached(".ptx", parts, lambda made: run([*command, source, "-o", made]))


def all_ptx(sources: Sequence[Path], architectures: Sequence[str] = ARCHITECTURES) -> dict[tuple[str, str], Path]:
    """By (name of the source, architecture)."""
    work = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(JOBS) as pool:
        made = pool.map(lambda item: ptx(*item), work)
        return {(source.stem, arch): path for (source, arch), path in zip(work, made, strict=True)}


@functools.cache
def resources(path: Path, architecture: str) -> dict[str, Resources]:
    """By mangled name of the kernel."""
    command = [toolkit() / "bin" / "ptxas", "-v", f"-arch=sm_{architecture}", path]
    said = cached(".txt", [*map(str, command[:-1]), path], lambda made: made.write_text(_ptxas(command, made)))
    return read_resources(said.read_text())


def _ptxas(command: Sequence[object], made: Path) -> str:
    return run([*command, "-o", made.with_suffix(".cubin")])


def read_resources(said: str) -> dict[str, Resources]:
    found = {}
    for part in said.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        numbers = {
            what: int(number)
            for number, what in re.findall(
                r"(\d+) (?:bytes )?(stack frame|spill stores|spill loads|registers|smem)", part
            )
        }
        spills = numbers["spill stores"] + numbers["spill loads"]
        found[name] = Resources(numbers["registers"], numbers.get("smem", 0), numbers["stack frame"], spills)
    return found


def blocks_per_multiprocessor(used: Resources, threads: int, dynamic_shared: int, architecture: str) -> int:
    """The occupancy: registers are allotted to warps 256 at a time, shared memory to blocks with 1 KiB of the system."""
    limits = LIMITS[architecture]
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-used.registers * 32 // 256) * 256 * warps)
    by_shared = limits.shared // (-(-(used.shared + dynamic_shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, limits.threads // (32 * warps), limits.blocks)


def plain(mangled: str) -> str:
    """A mangled name without what compilers call an anonymous namespace."""
    while match := re.search(r"(\d+)_GLOBAL__N_", mangled):
        digits = next(match[1][i:] for i in range(len(match[1])) if match[1][i] != "0")
        start = match.start(1) + len(match[1]) - len(digits)
        mangled = mangled[:start] + "@" + mangled[start + len(digits) + int(digits) :]
    return mangled


@functools.cache
def readable(mangled: str) -> str:
    """``kernel<arguments>`` of a mangled name, plain or not."""
    name = run(["c++filt", mangled.replace("@", "12_GLOBAL__N_1")]).strip()
    name = re.sub(r"\((anonymous namespace|unnamed)\)::|_GLOBAL__N_\w+::|fused_densenet::|^void |<unnamed>::", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name
