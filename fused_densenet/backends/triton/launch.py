"""Launches a kernel at little cost on the host.

Triton's own launch works out at every call how each argument specialises the kernel. Here numbers are known when a launch
is planned, so that of a call only the alignment of the tensors is left: the compiled kernel is kept under it, and its
launch in C is given addresses, which it does not look up again. Launches that differ in nothing that triton compiles for
share their kernels, so that a network on images of a size not seen before goes to Triton's launch no more.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

Grid = tuple[int, int, int]
MOST_PROGRAMS: Grid = (2**31 - 1, 65535, 65535)
"""CUDA C++ Programming Guide, table of compute capabilities; the least that any GPU takes."""

Number = int | None
Constants = dict[str, int | float | bool | str]
kernels: dict[tuple[Any, ...], dict[tuple[int, ...], Any]] = {}
"""Compiled ones by device and alignment of their tensors, by what else triton compiles for."""


class Launch:
    """A kernel with its grid, its numbers (last of its arguments) and its compile-time arguments (after those).

    ``launch(*tensors)`` runs it on the device of the first tensor, on its current stream. The dtypes of the tensors are
    always the same.
    """

    __slots__ = ("_compiled", "_rest", "constants", "function", "grid", "numbers", "options")

    def __init__(
        self, function: Any, grid: Grid, numbers: tuple[Number, ...], warps: int, stages: int, **constants: Any
    ) -> None:
        if any(size > most for size, most in zip(grid, MOST_PROGRAMS, strict=True)):
            raise ValueError(f"{function.__name__}: a grid of {grid} programs, a GPU takes {MOST_PROGRAMS}")
        self.function = function
        self.grid = grid
        self.numbers = numbers
        self.constants: Constants = constants
        # Forward and backward round a norm alike, fused or not: which of them is not left to triton's default.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        self._rest = (*numbers, *constants.values())
        self._compiled: dict[tuple[int, ...], Any] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        execute(self, tensors)

    def _find_kernels(self, tensors: tuple[Tensor | None, ...]) -> dict[tuple[int, ...], Any]:
        dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        parameters = self.function.params[len(tensors) :]
        numbers = [_kind(n, p.do_not_specialize) for n, p in zip(self.numbers, parameters, strict=False)]
        key = self.function, *self.options.values(), *self.constants.values(), *dtypes, *numbers
        return kernels.setdefault(key, {})

    def run(self, tensors: tuple[Tensor | None, ...]) -> None:
        if not isinstance(self.function, triton.JITFunction):  # the interpreter
            self.function[self.grid](*tensors, *self.numbers, **self.constants)
            return
        first = tensors[0]
        assert first is not None
        device = first.get_device()
        active = driver.active
        if device >= 0 and device != active.get_current_device():
            with torch.get_device_module(first.device).device(device):
                self.run(tensors)
            return
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        key = (device, *[address & 15 for address in addresses])
        if self._compiled is None:
            self._compiled = self._find_kernels(tensors)
        compiled = self._compiled.get(key)
        runtime = knobs.runtime
        if compiled is None:
            arguments = (*tensors, *self.numbers)
            self._compiled[key] = self.function[self.grid](*arguments, **self.constants, **self.options)
        elif runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # a profiler
            compiled[self.grid](*tensors, *self._rest)
        else:
            stream = active.get_current_stream(device)
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(*self.grid, stream, function, metadata, None, None, None, *addresses, *self._rest)


def _kind(number: Number, plain: bool) -> tuple[bool, ...] | None:
    """What triton compiles for of a number; one that is ``plain`` counts by its width alone."""
    if number is None:
        return None
    return (number.bit_length() > 31, *(() if plain else (number == 1, number % 16 == 0)))


def launch(it: Launch, tensors: tuple[Tensor | None, ...]) -> None:
    it.run(tensors)


execute = launch
"""What runs every kernel; checkers put their own in its place."""
