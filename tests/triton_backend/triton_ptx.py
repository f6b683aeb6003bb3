"""Launches kernels of the Triton backend as the PTX that Triton emits for a GPU, executed on CPU tensors."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from ptx import machine
from ptx.parser import Kernel as PtxKernel
from triton_offline import compile_kernel

from fused_densenet.backends.triton import launch, plans, tuning
from fused_densenet.backends.triton.launch import Grid, Launch

_parsed = functools.lru_cache(PtxKernel)


def run(
    function: Any,
    grid: Grid,
    arguments: tuple[Any, ...],
    target: str,
    constants: dict[str, Any],
    change: Callable[[str], str] = str,
) -> machine.Machine:
    """Compiles a ``@triton.jit`` function for ``target`` and executes its PTX; ``constants`` with warps and stages.

    ``change`` may plant a bug in the PTX.
    """
    compiled = compile_kernel(function, *arguments, target=target, **constants)
    kernel = _parsed(change(compiled.asm["ptx"]), compiled.metadata.name)
    named = dict(zip(function.arg_names, arguments, strict=False))
    storages: dict[int, np.ndarray] = {}
    bits = []
    for name, kind in compiled.src.signature.items():
        value = named.get(name)
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            view = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]
            storages[storage.data_ptr()] = view
            value = value.data_ptr()
        bits.append(int(value))
    bits += [0] * (len(kernel.parameters) - len(bits))  # scratch memory, which these kernels do not use
    threads = 32 * compiled.metadata.num_warps
    return machine.launch(kernel, grid, threads, compiled.metadata.shared, bits, list(storages.values()))


@contextlib.contextmanager
def executing_ptx(target: str, change: Callable[[str], str] = str) -> Iterator[list[tuple[str, machine.Machine]]]:
    """Inside the context the backend's kernels run as PTX for ``target``; collects (kernel, machine) of each launch."""
    machines = []

    def execute(it: Launch, tensors: tuple[torch.Tensor | None, ...]) -> None:
        constants = {**it.constants, **it.options}
        arguments = (*tensors, *it.numbers)
        machines.append((it.function.__name__, run(it.function, it.grid, arguments, target, constants, change)))

    plans.forget()
    with mock.patch.object(launch, "execute", execute), mock.patch.object(tuning, "family", return_value=target):
        yield machines
    plans.forget()
