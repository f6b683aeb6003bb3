"""The CUDA kernels as a backend for CPU tensors: csrc/cuda compiled by g++ and executed by the runner.

:class:`Emulated` has the four functions of :mod:`fused_densenet.backends.contract`. Each call works on copies between
guard bytes: results start as NaN, and every byte that is not part of a result must be what it was before.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import building
import torch
from torch import Tensor

from fused_densenet.backends.contract import Gradient, Norm

ARITHMETIC = {"bf16": 0, "f16": 1, "tf32": 2, "f32": 3}
GUARD = 512  # bytes before and after every buffer; a multiple of the alignment that GPU memory has
STATISTICS = ["launches", "blocks", "barriers", "shuffles", "mma", "ldmatrix", "ldmatrix_conflicts", "cp_async"]

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Device(ctypes.Structure):
    _fields_ = [("multiprocessors", ctypes.c_int), ("shared_per_block", ctypes.c_int), ("capability", ctypes.c_int)]


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, _i64)
        for name in ["n", "d", "h", "w", "kd", "kh", "kw", "input", "output", "window_d", "window_h", "window_w"]
    ]


class _Pixels(ctypes.Structure):
    _fields_ = [("data", _pointer), ("ld", _i64)]


class _Norm(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("mean", "scale", "shift")]


class _Gradient(ctypes.Structure):
    _fields_ = [
        *((name, _Pixels) for name in ("stored", "value")),
        *((name, _pointer) for name in ("scale", "slope", "mean", "offset")),
    ]


class _Weight(ctypes.Structure):
    _fields_ = [("data", _pointer), ("is_float", ctypes.c_bool), ("stride", _i64 * 5)]


class _Moments(ctypes.Structure):
    _fields_ = [("mean", _pointer), ("var", _pointer)]


class _Strided(ctypes.Structure):
    _fields_ = [("data", _pointer), ("stride", _i64 * 5)]


class _Forward(ctypes.Structure):
    _fields_ = [
        ("shape", _Shape),
        ("x", _Pixels),
        ("norm", _Norm),
        ("weight", _Weight),
        ("out", _Pixels),
        ("moments", _Moments),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        ("shape", _Shape),
        ("grad", _Gradient),
        ("x", _Pixels),
        ("norm", _Norm),
        ("weight", _Weight),
        ("dx", _Pixels),
        ("accumulate", ctypes.c_bool),
        ("dweight", _Weight),
        ("sum_dz", _pointer),
        ("sum_dz_centered", _pointer),
    ]


class _Place(ctypes.Structure):
    _fields_ = [("shape", _Shape), ("x", _Strided), ("out", _Pixels), ("moments", _Moments)]


class _PlaceBackward(ctypes.Structure):
    _fields_ = [("shape", _Shape), ("grad", _Gradient), ("out", _Strided)]


_PROBLEMS = {"place": _Place, "place_backward": _PlaceBackward, "forward": _Forward, "backward": _Backward}


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.cuda_host_error.restype = ctypes.c_char_p
    library.cuda_host_seed.argtypes = [ctypes.c_uint64]
    for name, problem in _PROBLEMS.items():
        assert library[f"cuda_host_sizeof_{name}"]() == ctypes.sizeof(problem), f"{name} differs from csrc/problem.h"
        library[f"cuda_host_{name}_workspace"].restype = ctypes.c_size_t
    return library


@functools.cache
def default_library() -> ctypes.CDLL:
    return load(building.build(building.kernels()))


class _Buffer(NamedTuple):
    """A copy of a storage between guards: bytes ``begin`` to ``end`` of the arena."""

    begin: int
    end: int


class _Arena:
    """Copies of all the storages of a call, one after the other, with guards of NaN bits."""

    def __init__(self, tensors: Sequence[Tensor], workspace: int) -> None:
        self._buffers: dict[int, _Buffer] = {}
        at, sources = GUARD, []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._buffers:
                self._buffers[storage.data_ptr()] = _Buffer(at, at + storage.nbytes())
                sources.append((at, storage))
                at += -(-storage.nbytes() // GUARD) * GUARD + GUARD
        self._workspace = _Buffer(at, at + workspace)
        memory = torch.full((at + -(-workspace // GUARD) * GUARD + 2 * GUARD,), 0xFF, dtype=torch.uint8)
        self.bytes = memory[-memory.data_ptr() % GUARD :]
        for begin, storage in sources:
            self.bytes[begin : begin + storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]

    def view(self, tensor: Tensor, memory: Tensor | None = None) -> Tensor:
        """The copy of ``tensor``, here or in a clone of the arena's bytes."""
        memory = self.bytes if memory is None else memory
        begin = memory.storage_offset() + self._buffers[tensor.untyped_storage().data_ptr()].begin
        empty = torch.empty(0, dtype=tensor.dtype)
        offset = begin // tensor.element_size() + tensor.storage_offset()
        return empty.set_(memory.untyped_storage(), offset, tensor.shape, tensor.stride())  # type: ignore[call-overload]

    def address(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self.view(tensor).data_ptr()

    def workspace(self) -> int:
        return self.bytes.data_ptr() + self._workspace.begin

    def finish(self, before: Tensor, results: Sequence[Tensor], what: str) -> None:
        """Checks that only ``results`` and the workspace differ from ``before``, and copies the results out."""
        before[self._workspace.begin : self._workspace.end] = self.bytes[self._workspace.begin : self._workspace.end]
        for tensor in results:
            self.view(tensor, before).copy_(self.view(tensor))
        changed = (before != self.bytes).nonzero()
        assert not changed.numel(), f"{what}: {len(changed)} bytes beside the results were written, first {changed[0]}"
        for tensor in results:
            tensor.copy_(self.view(tensor))


class Emulated:
    """The backend: float32 by TF32 products where ``tf32``, on a device with this many ``multiprocessors``.

    ``seed`` other than 0 lets warps run as far ahead of each other as the barriers allow, in a random order.
    """

    def __init__(
        self,
        *,
        library: ctypes.CDLL | None = None,
        tf32: bool = False,
        multiprocessors: int = 4,
        shared_per_block: int = 227 << 10,
        capability: int = 90,
        seed: int = 0,
    ) -> None:
        self.library = library or default_library()
        self._float32 = "tf32" if tf32 else "f32"
        self._device = _Device(multiprocessors, shared_per_block, capability)
        self._seed = seed

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" and dtype in self._arithmetics() else f"no kernels for {dtype} on {device}"

    def statistics(self) -> dict[str, int]:
        """What the launches since the last call did, by :data:`STATISTICS`."""
        values = (ctypes.c_uint64 * len(STATISTICS))()
        self.library.cuda_host_take_stats(values)
        return dict(zip(STATISTICS, values, strict=True))

    def place(self, x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> None:
        def problem(at: _Arena) -> _Place:
            pixels = _Pixels() if out is None else _pixels(at, out)
            return _Place(_shape(x, x.shape[-1]), _strided(at, x), pixels, _moments(at, mean, var))

        self._run("place", problem, x, [x], _present(out, mean, var))

    def place_backward(self, grad: Gradient, out: Tensor) -> None:
        def problem(at: _Arena) -> _PlaceBackward:
            return _PlaceBackward(_shape(out, out.shape[-1]), _gradient(at, grad), _strided(at, out))

        in_place = out.data_ptr() == grad.stored.data_ptr()
        self._run("place_backward", problem, out, [*grad], [out], keep=[out] if in_place else [])

    def norm_relu_conv(
        self, x: Tensor, norm: Norm, weight: Tensor, out: Tensor, mean: Tensor | None, var: Tensor | None
    ) -> None:
        def problem(at: _Arena) -> _Forward:
            return _Forward(
                _shape(x, weight.shape[0], weight, out),
                _pixels(at, x),
                _Norm(*map(at.address, norm)),
                _weight(at, weight),
                _pixels(at, out),
                _moments(at, mean, var),
            )

        self._run("forward", problem, x, [x, *norm, weight], _present(out, mean, var))

    def norm_relu_conv_backward(
        self,
        grad: Gradient,
        x: Tensor,
        norm: Norm,
        weight: Tensor,
        dx: Tensor,
        accumulate: bool,
        dweight: Tensor | None,
        sum_dz: Tensor,
        sum_dz_centered: Tensor,
    ) -> None:
        def problem(at: _Arena) -> _Backward:
            return _Backward(
                _shape(x, weight.shape[0], weight, grad.stored),
                _gradient(at, grad),
                _pixels(at, x),
                _Norm(*map(at.address, norm)),
                _weight(at, weight),
                _pixels(at, dx),
                accumulate,
                _Weight() if dweight is None else _weight(at, dweight),
                at.address(sum_dz),
                at.address(sum_dz_centered),
            )

        results = _present(dx, dweight, sum_dz, sum_dz_centered)
        self._run("backward", problem, x, [*grad, x, *norm, weight], results, keep=[dx] if accumulate else [])

    def _arithmetics(self) -> dict[torch.dtype, str]:
        return {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: self._float32}

    def _run(self, name, problem, data, inputs, results, keep=()) -> None:  # type: ignore[no-untyped-def]
        if not data[..., 0].numel():
            return
        arithmetic = ARITHMETIC[self._arithmetics()[data.dtype]]
        inputs, results = [t.detach() for t in inputs], [t.detach() for t in results]
        sizes = problem(_Arena([*inputs, *results], 0))
        bytes_ = self.library[f"cuda_host_{name}_workspace"](
            ctypes.byref(sizes), arithmetic, ctypes.byref(self._device)
        )
        assert bytes_ % 256 == 0, f"{name}: a workspace of {bytes_} bytes"
        arena = _Arena([*inputs, *results], bytes_)
        for tensor in results:
            if not any(tensor.data_ptr() == kept.data_ptr() for kept in keep):
                arena.view(tensor).fill_(float("nan"))
        before = arena.bytes.clone()
        arguments = problem(arena)
        self.library.cuda_host_seed(self._seed)
        code = self.library[f"cuda_host_{name}"](
            ctypes.byref(arguments), arithmetic, ctypes.byref(self._device), _pointer(arena.workspace())
        )
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}: {self.library.cuda_host_error().decode()}")
        with torch.no_grad():
            arena.finish(before, results, name)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _shape(image: Tensor, out_channels: int, weight: Tensor | None = None, out: Tensor | None = None) -> _Shape:
    kernel, channels = ((1, 1, 1), 1) if weight is None else (weight.shape[2:], weight.shape[1])
    pools = out is not None and out.shape[1:4] != image.shape[1:4]
    window = [2 if pools and size > 1 else 1 for size in image.shape[1:4]]
    return _Shape(*image.shape[:4], *kernel, channels, out_channels, *window)


def _pixels(at: _Arena, image: Tensor) -> _Pixels:
    lengths = [(size, stride) for size, stride in zip(image.shape[:4], image.stride(), strict=False) if size > 1]
    return _Pixels(at.address(image), lengths[-1][1] if lengths else image.shape[-1])


def _strided(at: _Arena, image: Tensor) -> _Strided:
    return _Strided(at.address(image), (_i64 * 5)(*image.stride()))


def _gradient(at: _Arena, grad: Gradient) -> _Gradient:
    return _Gradient(_pixels(at, grad.stored), _pixels(at, grad.value), *map(at.address, grad[2:]))


def _weight(at: _Arena, weight: Tensor) -> _Weight:
    return _Weight(at.address(weight), weight.dtype == torch.float32, (_i64 * 5)(*weight.stride()))


def _moments(at: _Arena, mean: Tensor | None, var: Tensor | None) -> _Moments:
    return _Moments(at.address(mean), at.address(var))
