"""Launches of the CUDA kernels, noted or executed as the PTX that nvcc makes of them."""

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import building
import nvcc
import problems
from arena import Arena
from emulated import default_library
from ptx.limits import SHARED_PER_BLOCK
from ptx.machine import Machine
from ptx.machine import launch as launch_ptx
from ptx.parser import Kernel


class _Task(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("arguments", ctypes.c_int),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_size_t)),
        ("run", ctypes.c_void_p),
    ]


_LAUNCHER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Task))


class Launch(NamedTuple):
    """``kernel`` is the mangled name, as :func:`nvcc.plain` gives it; ``shared`` bytes are dynamic."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: list[bytes]


@functools.cache
def _symbols(path: Path) -> dict[int, str]:
    """Names of a library's functions by address, those of anonymous namespaces too."""
    lines = building.run(["nm", "--defined-only", path]).splitlines()
    return {int(line.split()[0], 16): line.split()[2] for line in lines}


@contextlib.contextmanager
def launches(library: ctypes.CDLL, handle: Callable[[Launch], None]) -> Iterator[None]:
    """Inside the context ``handle`` gets every launch, and the runner executes none."""
    symbols = _symbols(Path(library._name))
    exported = ctypes.cast(library.cuda_host_error, ctypes.c_void_p).value or 0
    base = exported - next(address for address, name in symbols.items() if name == "cuda_host_error")
    errors: list[BaseException] = []

    def launcher(task: "ctypes._Pointer[_Task]") -> int:
        it = task[0]
        values = [ctypes.string_at(it.values[i], it.sizes[i]) for i in range(it.arguments)]
        name = nvcc.plain(symbols[it.kernel - base])
        try:
            handle(Launch(name, tuple(it.grid), tuple(it.block), it.shared, values))
        except BaseException as error:  # ctypes would print it and go on
            errors.append(error)
            return 1
        return 0

    callback = _LAUNCHER(launcher)
    library.cuda_host_launcher(callback)
    try:
        yield
    finally:
        library.cuda_host_launcher(None)
        if errors:
            raise errors[0]


class _NoLaunch:
    """Executes a primitive's host code only."""

    shared_per_block = 227 << 10

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self.library = library or default_library()

    def handle(self, launch: Launch, arena: Arena) -> None:
        raise NotImplementedError

    def execute(
        self, name: str, problem: ctypes.Structure, arithmetic: int, device: problems.Device, arena: Arena
    ) -> None:
        with launches(self.library, lambda launch: self.handle(launch, arena)):
            workspace = ctypes.c_void_p(arena.workspace())
            code = self.library[f"cuda_host_{name}"](ctypes.byref(problem), arithmetic, ctypes.byref(device), workspace)
        assert code == 0, f"{name}: CUDA error {code}"


class Notes(_NoLaunch):
    """Notes launches and executes none: for shapes that are too large for a CPU."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        super().__init__(library)
        self.launches: list[Launch] = []

    def handle(self, launch: Launch, arena: Arena) -> None:
        self.launches.append(launch)


class Ptx(_NoLaunch):
    """Executes nvcc's PTX for an architecture; ``machines`` are the finished launches with their kernels' names.

    ``change`` may plant a bug in the PTX. ``measure`` counts bank conflicts.
    """

    def __init__(
        self,
        architecture: str,
        sources: tuple[Path, ...] | None = None,
        library: ctypes.CDLL | None = None,
        change: Callable[[str], str] = str,
        measure: bool = False,
    ) -> None:
        super().__init__(library)
        self.shared_per_block = SHARED_PER_BLOCK[architecture.rstrip("a")]
        self.paths = [nvcc.ptx(source, architecture) for source in sources or tuple(building.kernels())]
        self.change, self.measure = change, measure
        self.machines: list[tuple[str, Machine]] = []

    def handle(self, launch: Launch, arena: Arena) -> None:
        path, entry = next(
            (path, entries[launch.kernel]) for path in self.paths if launch.kernel in (entries := _entries(path))
        )
        kernel = _kernel(path, entry) if self.change is str else Kernel(self.change(_entry_text(path, entry)), entry)
        assert launch.block[1:] == (1, 1), "blocks are expected to be lines"
        tensors = [buffer.numpy() for buffer in arena.buffers() if buffer.numel()]
        machine = launch_ptx(
            kernel, launch.grid, launch.block[0], launch.shared, launch.arguments, tensors, self.measure
        )
        self.machines.append((nvcc.readable(entry), machine))


@functools.cache
def _entries(path: Path) -> dict[str, str]:
    names = re.findall(r"\.entry\s+([\w$]+)", path.read_text())
    return {nvcc.plain(name): name for name in names}


@functools.cache
def _entry_text(path: Path, entry: str) -> str:
    """The file without other entries' bodies."""
    text = path.read_text()
    parts = re.split(r"(?=^(?:\.visible|\.weak)? *\.entry)", text, flags=re.M)
    return parts[0] + next(part for part in parts[1:] if re.search(rf"\.entry\s+{re.escape(entry)}\b", part))


@functools.cache
def _kernel(path: Path, entry: str) -> Kernel:
    return Kernel(_entry_text(path, entry), entry)
