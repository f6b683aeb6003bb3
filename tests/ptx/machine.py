"""Executes PTX on the CPU: one numpy lane per CUDA thread, the blocks of a launch some at a time.

Lanes run lowest program counter first, which brings diverged lanes together again. An instruction that is not known is
an error. What the compilers emit is executed as it stands, so this also covers what Triton does after its interpreter:
layouts, swizzled shared memory, asynchronous copies, tensor-core fragments. See :mod:`ptx.memory` for what is checked.
Not modelled: timing, weaker memory orders, tensor-core rounding, and Blackwell's and TMA's instructions.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .limits import check_launch
from .memory import AccessError, GlobalMemory, SharedMemory, bank_conflicts
from .parser import Address, Immediate, Instruction, Kernel, Operand, PtxError, Register, Sink, Symbol

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}
WARP = 32
_LANES_AT_ONCE = 8192

Handler = Callable[["Machine", Instruction, "np.ndarray"], None]
HANDLERS: dict[str, Handler] = {}


def instruction(*names: str) -> Callable[[Handler], Handler]:
    """Registers what executes the instructions of these names for the active lanes (a mask)."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Machine:
    """A launch of ``kernel``, or of some of its blocks, ``only``; runs on construction.

    ``counts`` are executed instructions by name, over all warps that run at once. Where ``measure`` is set,
    ``conflicts`` are the additional passes over shared memory that bank conflicts cost, by position of the instruction.
    """

    make_memory: Callable[[list[np.ndarray], int], Any] = GlobalMemory
    make_shared: Callable[[int, int, int], SharedMemory] = SharedMemory

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: Sequence[int | bytes],
        tensors: list[np.ndarray],
        measure: bool = False,
        only: Sequence[int] | None = None,
    ) -> None:
        self.kernel, self.grid, self.threads, self.measure = kernel, grid, threads, measure
        self.parameters = np.zeros(kernel.parameter_bytes + 16, np.uint8)
        for value, at in zip(arguments, kernel.parameters.values(), strict=False):
            raw = value if isinstance(value, bytes) else (value & (2**64 - 1)).to_bytes(8, "little")
            self.parameters[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
        self.shared_size = kernel.static_shared + shared
        check_launch(kernel, grid, threads, self.shared_size)
        self.memory = self.make_memory(tensors, math.prod(grid))
        self.counts: Counter[str] = Counter()
        self.conflicts: Counter[int] = Counter()
        blocks, at_once = np.arange(math.prod(grid)) if only is None else np.array(only), _LANES_AT_ONCE // threads
        for first in range(0, blocks.size, max(1, at_once)):
            self._start(blocks[first : first + max(1, at_once)])
            with np.errstate(all="ignore"):
                self._run()

    def _start(self, blocks: np.ndarray) -> None:
        self.lanes = blocks.size * self.threads
        thread = np.tile(np.arange(self.threads), blocks.size)
        self.block = np.repeat(blocks, self.threads)
        zero = np.zeros(self.lanes, np.int64)
        x, y, _ = self.grid
        block = (self.block % x, self.block // x % y, self.block // (x * y))
        self.special = {f"%tid.{axis}": value for axis, value in zip("xyz", (thread, zero, zero), strict=True)}
        self.special |= {f"%ctaid.{axis}": value for axis, value in zip("xyz", block, strict=True)}
        self.special |= {f"%nctaid.{axis}": zero + size for axis, size in zip("xyz", self.grid, strict=True)}
        self.special |= {f"%ntid.{a}": zero + size for a, size in zip("xyz", (self.threads, 1, 1), strict=True)}
        self.special |= {"%laneid": thread % WARP, "%warpid": thread // WARP}
        self.alive = np.ones(self.lanes, bool)
        self.registers = {
            name: np.zeros(self.lanes, bool if bits == 1 else UNSIGNED[bits])
            for name, bits in self.kernel.registers.items()
        }
        self.shared = self.make_shared(blocks.size, self.shared_size, self.threads)
        self.local = np.full((self.lanes, self.kernel.local_bytes), 0xFF, np.uint8)
        self.unfenced = np.zeros(self.lanes, bool)  # threads that have written since they fenced
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # not waited for: addresses, data, lanes
        self.copy_groups: list[int] = []  # copies issued before each commit

    def _run(self) -> None:
        waiting = {0: self.alive.copy()}
        end = len(self.kernel.instructions)
        while waiting:
            at = min(waiting)
            active = waiting.pop(at)
            if at >= end:
                self.alive &= ~active
                continue
            while at < end and active.any():
                at, active = self._step(at, active, waiting)
                if at in waiting:
                    active = active | waiting.pop(at)
                if waiting and at > min(waiting):
                    waiting[at] = waiting.get(at, False) | active
                    break
            else:
                self.alive &= ~active

    def _step(self, at: int, active: np.ndarray, waiting: dict[int, np.ndarray]) -> tuple[int, np.ndarray]:
        """Executes one instruction; returns the next position and its lanes, others go to ``waiting``."""
        it = self.kernel.instructions[at]
        chosen = active
        if it.predicate is not None:
            chosen = active & (self.registers[it.predicate] ^ it.negated)
        if it.op == "bra":
            target = it.operands[0]
            assert isinstance(target, Symbol)
            stay = active & ~chosen
            if not chosen.any():
                return at + 1, active
            if stay.any():
                first, second = sorted([(self.kernel.labels[target.name], chosen), (at + 1, stay)], key=lambda p: p[0])
                waiting[second[0]] = waiting.get(second[0], False) | second[1]
                return first
            return self.kernel.labels[target.name], active
        if it.op in ("ret", "exit"):
            self.alive &= ~chosen
            return at + 1, active & ~chosen
        self.position = at
        handler = HANDLERS.get(it.op)
        if handler is None:
            raise self.error(it, "unknown instruction")
        self.counts[it.op] += 1
        if chosen.any():
            try:
                handler(self, it, chosen)
            except AccessError as error:
                raise self.error(it, str(error), int(np.flatnonzero(chosen)[0]) + error.lane) from error
        return at + 1, active

    def error(self, it: Instruction, message: str, lane: int | None = None) -> PtxError:
        where = "" if lane is None else f", block {self.block[min(lane, self.lanes - 1)]}"
        return PtxError(f"{message} at line {it.line}: {it.text}{where}")

    def bits(self, operand: Operand, size: int) -> np.ndarray:
        """An operand's raw bits in every lane, as unsigned numbers (bool for predicates)."""
        if isinstance(operand, Register):
            value = self.registers.get(operand.name)
            if value is None:
                value = self.special[operand.name]
            return value if value.dtype == bool or size == 1 else value.astype(UNSIGNED[size], copy=False)
        if isinstance(operand, Immediate):
            if size == 1:
                return np.full(self.lanes, bool(operand.bits))
            return np.full(self.lanes, operand.bits & (2**size - 1), UNSIGNED[size])
        if isinstance(operand, Symbol):
            return np.full(self.lanes, self._symbol(operand.name), UNSIGNED[size])
        raise PtxError(f"operand {operand}")

    def _symbol(self, name: str) -> int:
        """Its address, in the memory where it lies."""
        for space in (self.kernel.shared, self.kernel.local, self.kernel.parameters):
            if name in space:
                return space[name]
        raise PtxError(f"symbol {name}")

    def put(self, operand: Operand, value: np.ndarray, active: np.ndarray) -> None:
        """Sets a register of the active lanes to raw bits, or to a number of the register's width."""
        if isinstance(operand, Sink):
            return
        assert isinstance(operand, Register)
        size = self.kernel.registers[operand.name]
        if size == 1:
            value = value.astype(bool)
        else:
            if value.dtype.kind == "f":
                value = value.view(UNSIGNED[value.dtype.itemsize * 8])
            value = value.astype(UNSIGNED[size], copy=False)
        self.registers[operand.name] = np.where(active, value, self.registers[operand.name])

    def address(self, operand: Operand) -> np.ndarray:
        assert isinstance(operand, Address)
        if operand.base in self.registers:
            return self.registers[operand.base].astype(np.int64) + operand.offset
        return np.full(self.lanes, self._symbol(operand.base) + operand.offset, np.int64)

    def count_conflicts(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> None:
        if self.measure:
            self.conflicts[self.position] += bank_conflicts(addresses, size, lanes)


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: Sequence[int | bytes],
    tensors: list[np.ndarray],
    measure: bool = False,
) -> Machine:
    """Runs ``kernel`` on blocks of ``threads``; ``arguments`` are raw bits: addresses within ``tensors``, numbers, bytes.

    A tensor is memory that may be accessed: an array of any type.
    """
    from . import matrix, scalar  # noqa: F401, the instructions

    return Machine(kernel, grid, threads, shared, arguments, tensors, measure)
