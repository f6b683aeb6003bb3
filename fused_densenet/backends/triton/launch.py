"""Launches a kernel at little cost on the host.

Triton's own launch works out at every call how each argument specialises the kernel. Here the compiled kernel is kept
under the few properties that decide it, and called directly.
"""

from typing import Any

import triton
from triton.runtime import driver

Grid = tuple[int, int, int]


class Kernel:
    """One kernel with all its compile-time arguments; ``kernel(grid, *arguments)`` launches it."""

    def __init__(self, function: Any, warps: int, stages: int, **constants: Any) -> None:
        self.function = function
        self.constants = constants
        self.options = {"num_warps": warps, "num_stages": stages}
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: Grid, *arguments: Any) -> None:
        execute(self, grid, arguments)


def launch(kernel: Kernel, grid: Grid, arguments: tuple[Any, ...]) -> None:
    if not isinstance(kernel.function, triton.JITFunction):  # the interpreter
        kernel.function[grid](*arguments, **kernel.constants)
        return
    properties = [a if a.__class__ is int or a is None else a.data_ptr() & 15 for a in arguments]
    key = (driver.active.get_current_device(), *properties)
    compiled = kernel.compiled.get(key)
    if compiled is None:
        kernel.compiled[key] = kernel.function[grid](*arguments, **kernel.constants, **kernel.options)
    else:
        compiled[grid](*arguments, *kernel.constants.values())


execute = launch
"""What runs every kernel; checkers put their own in its place."""
