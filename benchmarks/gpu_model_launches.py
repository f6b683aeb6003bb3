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
from checkout import REPOSITORY
from gpu_primitives import (
    BACKWARD,
    COPY,
    FORWARD,
    MOMENTS,
    PLACE,
    PLACE_BACKWARD,
    POOL,
    POOL_BACKWARD,
    Problem,
)
from torch import Tensor

from fused_densenet.backends.contract import Gradient, Norm, Owed

sys.path += [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "cuda_backend")]

import building
import nvcc
import problems
from emulated import ARITHMETIC, default_library
from ptx.counting import Counts, count_block
from ptx_launch import Launch, _entries, _kernel, launches

NAMES = {FORWARD: "forward", BACKWARD: "backward", COPY: "place", MOMENTS: "place"}
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
    if problem.primitive in (PLACE, COPY, MOMENTS):
        moments: list[Any] = [None, None] if problem.primitive == COPY else vectors(c, 2)
        return problems.place(at, empty(*problem.pixels, c), None if problem.primitive == MOMENTS else x, *moments)
    if problem.primitive == PLACE_BACKWARD:
        return problems.place_backward(at, Gradient(dx, x, *vectors(c, 1), correction), empty(*problem.pixels, c))
    if problem.primitive in (POOL, POOL_BACKWARD):
        maxima = empty(*problem.out_pixels(), c)
        if problem.primitive == POOL:
            return problems.norm_relu_pool(at, x, norm, maxima)
        return problems.norm_relu_pool_backward(at, maxima, x, norm, dx, owed)
    depth = 1 if problem.side == 1 or problem.pixels[1] == 1 else problem.side
    weight = torch.empty(k, c, depth, problem.side, problem.side, device="meta")
    if problem.primitive == FORWARD:
        return problems.forward(at, x, norm, weight, out, *vectors(k, 2))
    grad = Gradient(out, out, *vectors(k, 1), torch.empty(2, k, device="meta"))
    return problems.backward(at, grad, x, norm, weight, dx, problem.accumulate, weight, owed)


def cost_of(launch: Launch, problem: Problem, kind: Kind) -> Cost:
    """Counted where the launch's first block executes nvcc's PTX; of many tiles or boxes it executes two."""
    key = (launch.kernel, launch.grid, launch.block, launch.shared, b"".join(launch.arguments), kind)
    if key not in _COSTS:
        _COSTS[key] = _count(launch, problem, kind)
    return _COSTS[key]


_COSTS: dict[tuple[Any, ...], Cost] = {}


def _count(launch: Launch, problem: Problem, kind: Kind) -> Cost:
    path = next(path for path in _paths(kind.architecture) if launch.kernel in _entries(path))
    entry = _entries(path)[launch.kernel]
    name, threads = nvcc.readable(entry).partition("<")[0], launch.block[0]

    def count(it: Launch) -> Counts:
        return count_block(_kernel(path, entry), it.grid, threads, it.shared, it.arguments, 0)

    if name == "backward_kernel":
        found = count_boxes(launch, count)
    elif name in ("conv1x1_kernel", "conv3_kernel") and launch.grid[2] == 1:
        found = count_tiles(launch, problem, count)
    else:
        found = count(launch)
    used = nvcc.resources(path, kind.architecture)[entry]
    resident = nvcc.blocks_per_multiprocessor(used, threads, launch.shared, kind.architecture)
    blocks = math.prod(launch.grid)
    return Cost(name, found.instructions, threads, blocks, resident, blocks * (found.read + found.written))


BOXES_AT = 120
"""Where BackwardPlan::per_block lies: behind two bools, seven boxes of four numbers, and the number of all boxes."""


def count_boxes(launch: Launch, count: Callable[[Launch], Counts]) -> Counts:
    """Of a block of backward, by its plan."""
    _, plan, *_ = launch.arguments
    (boxes,) = struct.unpack_from("i", plan, BOXES_AT)

    def with_boxes(number: int) -> Launch:
        changed = plan[:BOXES_AT] + struct.pack("i", number) + plan[BOXES_AT + 4 :]
        return launch._replace(arguments=[launch.arguments[0], changed, *launch.arguments[2:]])

    return count(launch) if boxes <= 2 else extended(count(with_boxes(1)), count(with_boxes(2)), boxes)


def count_tiles(launch: Launch, problem: Problem, count: Callable[[Launch], Counts]) -> Counts:
    """Of a block of forward, which takes every so manieth tile: in a grid of more blocks, fewer of them."""
    one = count(launch._replace(grid=(1 << 20, *launch.grid[1:])))
    columns = min(problem.K, math.ceil(problem.K / launch.grid[1] / 16) * 16)
    moments = 4 * (4 * columns)  # two vectors of the block and of those that it merges
    rows = (one.written - moments) // (2 * columns)  # of bfloat16
    tiles = math.ceil(math.prod(problem.out_pixels()) / rows)
    of_block = math.ceil(tiles / launch.grid[0])
    if of_block <= 2:
        return count(launch)
    # Edges make more tiles of an image than its area: of up to half as many again, the first block takes two.
    return extended(one, count(launch._replace(grid=(tiles * 3 // 4, *launch.grid[1:]))), of_block)


def extended(one: Counts, two: Counts, number: int) -> Counts:
    """Where each after the first costs what the second does."""
    more = number - 1
    instructions = Counter({op: n + more * (two.instructions[op] - n) for op, n in one.instructions.items()})
    read, written = (a + more * (b - a) for a, b in ((one.read, two.read), (one.written, two.written)))
    return Counts(instructions, read, written)


PREPARED_TOGETHER = 32
"""Calls of a program whose weights one launch prepares: csrc/cuda/prepare.cu's kCalls."""


def together(launches: Sequence[Cost]) -> Cost:
    """Of one launch that does what these do, each by its own blocks; instructions of a warp on average."""
    blocks = sum(cost.blocks for cost in launches)
    instructions: Counter[str] = Counter()
    for cost in launches:
        instructions.update({op: n * cost.blocks for op, n in cost.instructions.items()})
    mean = Counter({op: round(n / blocks) for op, n in instructions.items()})
    return launches[0]._replace(instructions=mean, blocks=blocks, requested=sum(cost.requested for cost in launches))


@functools.cache
def _paths(architecture: str) -> list[Any]:
    return list(nvcc.all_ptx(building.kernels(), [architecture]).values())
