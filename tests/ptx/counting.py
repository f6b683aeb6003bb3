"""What one block of a launch executes, counted without the memory that it works on: for launches of any size."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import matrix, scalar  # noqa: F401, the instructions
from .machine import Machine
from .memory import SharedMemory
from .order import Order
from .parser import Kernel


class Counts(NamedTuple):
    """Instructions by name of a warp, branches aside, and bytes that the block asks global memory for."""

    instructions: Counter[str]
    read: int
    written: int


def count_block(
    kernel: Kernel, grid: tuple[int, int, int], threads: int, shared: int, arguments: Sequence[int | bytes], block: int
) -> Counts:
    """Of block number ``block``; what it reads is zero. Warps that go other ways are added up."""
    machine = _OneBlock(kernel, grid, threads, shared, arguments, [], only=[block])
    return Counts(machine.counts, machine.memory.read, machine.memory.written)


class _NoMemory:
    """Zero everywhere: a block is the first to come, not the one that adds up what others left."""

    def __init__(self, tensors: list[np.ndarray], blocks: int) -> None:
        self.read = self.written = 0
        self.order = Order(1)  # of the one block, whatever its number

    def load(self, addresses: np.ndarray, size: int, blocks: np.ndarray, align: int | None = None) -> np.ndarray:
        self.read += addresses.size * size
        return np.zeros((addresses.size, size), np.uint8)

    def store(self, addresses: np.ndarray, data: np.ndarray, blocks: np.ndarray) -> None:
        self.written += data.size

    def add(self, address: int, value: int, block: int, fenced: bool) -> int:
        return 0


class _Unchecked(SharedMemory):
    """Others have checked it."""

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        super().__init__(blocks, 0, threads)
        self.size = size
        self.data = np.zeros(blocks * size, np.uint8)

    def load(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        return self.data[addresses.astype(np.int64)[:, None] + np.arange(size)]

    def store(self, addresses: np.ndarray, data: np.ndarray, lanes: np.ndarray) -> None:
        self.data[addresses.astype(np.int64)[:, None] + np.arange(data.shape[1])] = data

    def claim(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> None:
        pass

    def put(self, addresses: np.ndarray, data: np.ndarray | int, size: int, lanes: np.ndarray) -> None:
        self.data[addresses.astype(np.int64)[:, None] + np.arange(size)] = data


class _OneBlock(Machine):
    make_memory = _NoMemory
    make_shared = _Unchecked
