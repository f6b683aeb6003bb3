"""The CUDA kernels as a backend for CPU tensors: csrc/cuda compiled by g++ and executed by the runner.

:class:`Emulated` has the functions of :mod:`fused_densenet.backends.contract`. Each call works on copies between guard
bytes: results start as NaN, and every byte that is not part of a result must be what it was before.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import building
import problems
import torch
from arena import Arena
from torch import Tensor

from fused_densenet.backends import extension
from fused_densenet.backends.contract import Gradient, Norm, Owed

ARITHMETIC = {"bf16": 0, "f16": 1, "tf32": 2, "f32": 3}
STATISTICS = [
    "launches",
    "blocks",
    "barriers",
    "shuffles",
    "mma",
    "ldmatrix",
    "ldmatrix_conflicts",
    "cp_async",
    "attributes",
]


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.cuda_host_error.restype = ctypes.c_char_p
    library.cuda_host_seed.argtypes = [ctypes.c_uint64]
    for name, problem in problems.PROBLEMS.items():
        assert library[f"cuda_host_sizeof_{name}"]() == ctypes.sizeof(problem), f"{name} differs from csrc/problem.h"
        library[f"cuda_host_{name}_workspace"].restype = ctypes.c_size_t
    return library


@functools.cache
def default_library() -> ctypes.CDLL:
    return load(building.build(building.kernels()))


class Executor(Protocol):
    """Who executes a primitive, and how; on a device that gives a block ``shared_per_block`` bytes."""

    library: ctypes.CDLL
    shared_per_block: int

    def execute(
        self, name: str, problem: ctypes.Structure, arithmetic: int, device: problems.Device, arena: Arena
    ) -> None: ...


class Host:
    """The runner, in this process.

    ``seed`` other than 0 lets warps run as far ahead of each other as the barriers allow, in a random order.
    """

    shared_per_block = 227 << 10

    def __init__(self, library: ctypes.CDLL | None = None, seed: int = 0) -> None:
        self.library = library or default_library()
        self.seed = seed

    def execute(
        self, name: str, problem: ctypes.Structure, arithmetic: int, device: problems.Device, arena: Arena
    ) -> None:
        self.library.cuda_host_seed(self.seed)
        workspace = ctypes.c_void_p(arena.workspace())
        code = self.library[f"cuda_host_{name}"](ctypes.byref(problem), arithmetic, ctypes.byref(device), workspace)
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}: {self.library.cuda_host_error().decode()}")

    def statistics(self) -> dict[str, int]:
        """What the launches since the last call did, by :data:`STATISTICS`."""
        values = (ctypes.c_uint64 * len(STATISTICS))()
        self.library.cuda_host_take_stats(values)
        return dict(zip(STATISTICS, values, strict=True))


class Emulated:
    """The backend: float32 by TF32 products where ``tf32``, on a device with this many ``multiprocessors``."""

    def __init__(
        self,
        executor: Executor | None = None,
        *,
        tf32: bool = False,
        multiprocessors: int = 4,
        shared_per_block: int | None = None,
        capability: int = 90,
        seed: int = 0,
    ) -> None:
        self.executor = executor or Host(seed=seed)
        self._float32 = "tf32" if tf32 else "f32"
        self._device = problems.Device(multiprocessors, shared_per_block or self.executor.shared_per_block, capability)

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" and dtype in self._arithmetics() else f"no kernels for {dtype} on {device}"

    def statistics(self) -> dict[str, int]:
        assert isinstance(self.executor, Host)
        return self.executor.statistics()

    def place(self, x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> None:
        self._run("place", lambda at: problems.place(at, x, out, mean, var), x, [x], _present(out, mean, var))

    def place_backward(self, grad: Gradient, out: Tensor) -> None:
        in_place = out.data_ptr() == grad.stored.data_ptr()
        kept = [out] if in_place else []
        inputs = _present(*grad)
        self._run("place_backward", lambda at: problems.place_backward(at, grad, out), out, inputs, [out], kept)

    def norm_relu_pool(self, x: Tensor, norm: Norm, out: Tensor) -> None:
        self._run("norm_relu_pool", lambda at: problems.norm_relu_pool(at, x, norm, out), x, [x, *norm[:4]], [out])

    def norm_relu_pool_backward(self, grad: Tensor, x: Tensor, norm: Norm, dx: Tensor, owed: Owed) -> None:
        self._run(
            "norm_relu_pool_backward",
            lambda at: problems.norm_relu_pool_backward(at, grad, x, norm, dx, owed),
            x,
            [grad, x, *norm[:4], *_present(owed.pixels)],
            _present(dx, owed.dweight, owed.dbias, owed.correction),
        )

    def update_running(
        self, batches: Sequence[Tensor], buffers: Sequence[Sequence[Tensor]], momenta: Sequence[float], factor: float
    ) -> None:
        """Arguments as of :func:`problems.update_running`."""
        running = [tensor for kind in buffers for tensor in kind]
        self._run(
            "update_running",
            lambda at: problems.update_running(at, batches, buffers, momenta, factor),
            batches[0],
            batches,
            running,
            running,
        )

    def norm_relu_conv(
        self,
        x: Tensor,
        norm: Norm | None,
        weight: Tensor,
        out: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        bias: Tensor | None = None,
        negative_slope: float = 1.0,
    ) -> None:
        self._run(
            "forward",
            lambda at: problems.forward(at, x, norm, weight, out, mean, var, bias, negative_slope),
            x,
            _present(x, *(norm or ()), weight, bias),
            _present(out, mean, var),
        )

    def norm_relu_conv_backward(
        self,
        grad: Gradient,
        x: Tensor,
        norm: Norm | None,
        weight: Tensor,
        dx: Tensor,
        accumulate: bool,
        dweight: Tensor | None,
        owed: Owed | None,
        dbias: Tensor | None = None,
    ) -> None:
        arguments = (grad, x, norm, weight, dx, accumulate, dweight, owed, dbias)
        dgamma, dbeta, correction, pixels = owed or extension.NO_OWED
        self._run(
            "backward",
            lambda at: problems.backward(at, *arguments),
            x,
            _present(*grad, pixels, x, *(norm or ()), weight),
            _present(dx, dweight, dgamma, dbeta, correction, dbias),
            kept=_present(dx, correction) if accumulate else [],
        )

    def _arithmetics(self) -> dict[torch.dtype, str]:
        return {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: self._float32}

    def _run(
        self,
        name: str,
        problem: Callable[[Arena], Any],
        data: Tensor,
        inputs: Sequence[Tensor],
        results: Sequence[Tensor],
        kept: Sequence[Tensor] = (),
    ) -> None:
        """``problem`` is what the kernels get of the tensors in an arena; results are NaN before, but those ``kept``."""
        if not data[..., 0].numel():
            return
        arithmetic = ARITHMETIC[self._arithmetics()[data.dtype]]
        inputs, results = [t.detach() for t in inputs], [t.detach() for t in results]
        sizes = problem(Arena([*inputs, *results], 0))
        workspace = self.executor.library[f"cuda_host_{name}_workspace"](
            ctypes.byref(sizes), arithmetic, ctypes.byref(self._device)
        )
        assert workspace % 256 == 0, f"{name}: a workspace of {workspace} bytes"
        arena = Arena([*inputs, *results], workspace)
        for tensor in results:
            if not any(tensor.data_ptr() == other.data_ptr() for other in kept):
                arena.view(tensor).fill_(float("nan"))
        before = arena.bytes.clone()
        self.executor.execute(name, problem(arena), arithmetic, self._device, arena)
        with torch.no_grad():
            arena.finish(before, results, name)


def _present(*values: Tensor | float | None) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
