"""What the CUDA kernels would launch for a primitive on a GPU that is not there, and what a block of it executes.

The kernels' own host code says the launches, run by the tests' runner; nvcc's PTX of a kernel, executed for one block by
the tests' interpreter, says how many instructions they are. g++ and the CUDA toolkit are needed, a GPU is not.
"""

import ctypes
import functools
import math
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gpu_primitives import BACKWARD, FORWARD, Problem
from gpu_run import REPOSITORY
from torch import Tensor

from fused_densenet.backends.contract import Gradient, Norm, Owed

sys.path += [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "cuda_backend")]

import building
import nvcc
import problems
from emulated import ARITHMETIC, default_library
from ptx.counting import Counts, count_block
from ptx_launch import Launch, _entries, _kernel, launches

POOL, POOL_BACKWARD = "norm_relu_pool", "norm_relu_pool_backward"
NAMES = {FORWARD: "forward", BACKWARD: "backward"}
"""Of primitives in csrc/cuda/launch.h, where they are others."""


class Kind(NamedTuple):
    """Of GPU, as far as its plans depend on it: ``architecture`` is what nvcc compiles for."""

    architecture: str
    multiprocessors: int
    shared_per_block: int
    capability: int


class Cost(NamedTuple):
    """Of a launch: instructions of one warp by name, threads of a block, blocks, those that fit on a multiprocessor at a
    time, bytes that all blocks ask for."""

    kernel: str
    instructions: Counter[str]
    threads: int
    blocks: int
    resident: int
    requested: int

    @property
    def products(self) -> int:
        """Matrix instructions of a warp."""
        return self.instructions["mma"]


class _Nowhere:
    """In place of memory: nothing is read, so every tensor may lie at one address."""

    def address(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else 1 << 40


def launches_of(problem: Problem, kind: Kind) -> list[Launch]:
    """In bfloat16 with float32 parameters, in a buffer as wide as a block's."""
    noted: list[Launch] = []
    library = default_library()
    device = problems.Device(kind.multiprocessors, kind.shared_per_block, kind.capability)
    name = NAMES.get(problem.primitive, problem.primitive)
    with launches(library, noted.append):
        code = library[f"cuda_host_{name}"](
            ctypes.byref(_struct(problem)), ARITHMETIC["bf16"], ctypes.byref(device), ctypes.c_void_p(1 << 40)
        )
    assert code == 0, f"{problem}: CUDA error {code}"
    return noted


def _struct(problem: Problem) -> ctypes.Structure:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def vectors(length: int, count: int) -> list[Tensor]:
        return [torch.empty(length, device="meta") for _ in range(count)]

    at: Any = _Nowhere()
    c, k = problem.C, problem.K
    wide, gradients = (empty(*problem.pixels, c + k + 32) for _ in range(2))
    x, dx = wide[..., :c], gradients[..., :c]
    out = empty(*problem.out_pixels(), k) if problem.pool else wide[..., c : c + k]
    norm = Norm(*vectors(c, 4), 1e-5)  # type: ignore[arg-type]
    correction = torch.empty(2, c, device="meta")
    owed = Owed(*vectors(c, 2), correction)  # type: ignore[arg-type]
    if problem.primitive == "place":
        return problems.place(at, empty(*problem.pixels, c), x, *vectors(c, 2))
    if problem.primitive == "place_backward":
        return problems.place_backward(at, Gradient(dx, x, *vectors(c, 1), correction), empty(*problem.pixels, c))
    if problem.primitive in (POOL, POOL_BACKWARD):
        maxima = empty(problem.pixels[0], *((size + 1) // 2 for size in problem.pixels[1:]), c)
        if problem.primitive == POOL:
            return problems.norm_relu_pool(at, x, norm, maxima)
        return problems.norm_relu_pool_backward(at, maxima, x, norm, dx, owed)
    depth = 1 if problem.side == 1 or problem.pixels[1] == 1 else problem.side
    weight = torch.empty(k, c, depth, problem.side, problem.side, device="meta")
    if problem.primitive == FORWARD:
        return problems.forward(at, x, norm, weight, out, *vectors(k, 2))
    grad = Gradient(out, out, *vectors(k, 1), torch.empty(2, k, device="meta"))
    return problems.backward(at, grad, x, norm, weight, dx, problem.accumulate, weight, owed)


def cost_of(launch: Launch, kind: Kind) -> Cost:
    """Counted where the launch's first block executes nvcc's PTX; of many boxes of backward, where it executes two."""
    key = (launch.kernel, launch.grid, launch.block, launch.shared, b"".join(launch.arguments), kind)
    if key not in _COSTS:
        _COSTS[key] = _count(launch, kind)
    return _COSTS[key]


_COSTS: dict[tuple[Any, ...], Cost] = {}


def _count(launch: Launch, kind: Kind) -> Cost:
    path = next(path for path in _paths(kind.architecture) if launch.kernel in _entries(path))
    entry = _entries(path)[launch.kernel]
    name, threads = nvcc.readable(entry).partition("<")[0], launch.block[0]

    def count(arguments: Sequence[bytes]) -> Counts:
        return count_block(_kernel(path, entry), launch.grid, threads, launch.shared, list(arguments), 0)

    found = count_boxes(launch.arguments, count) if name == "backward_kernel" else count(launch.arguments)
    used = nvcc.resources(path, kind.architecture)[entry]
    resident = nvcc.blocks_per_multiprocessor(used, threads, launch.shared, kind.architecture)
    blocks = math.prod(launch.grid)
    return Cost(name, found.instructions, threads, blocks, resident, blocks * (found.read + found.written))


BOXES_AT = 120
"""Where BackwardPlan::per_block lies: behind two bools and seven boxes of four numbers, and the number of all boxes."""


def count_boxes(arguments: Sequence[bytes], count: Callable[[Sequence[bytes]], Counts]) -> Counts:
    """Of a block that has many boxes: each after the first costs what the second does."""
    (boxes,) = struct.unpack_from("i", arguments[1], BOXES_AT)
    if boxes <= 2:
        return count(arguments)

    def with_boxes(number: int) -> Counts:
        plan = bytearray(arguments[1])
        struct.pack_into("i", plan, BOXES_AT, number)
        return count([arguments[0], bytes(plan), *arguments[2:]])

    one, two = with_boxes(1), with_boxes(2)
    more = Counter({op: two.instructions[op] - n for op, n in one.instructions.items()})
    instructions = Counter({op: n + (boxes - 1) * more[op] for op, n in one.instructions.items()})
    read, written = (a + (boxes - 1) * (b - a) for a, b in ((one.read, two.read), (one.written, two.written)))
    return Counts(instructions, read, written)


@functools.cache
def _paths(architecture: str) -> list[Any]:
    return list(nvcc.all_ptx(building.kernels(), [architecture]).values())
