"""The structs of csrc/problem.h and csrc/cuda/launch.h, filled from tensors that lie in an arena."""

import ctypes
from collections.abc import Sequence

import torch
from arena import Arena
from torch import Tensor

from fused_densenet.backends.contract import Gradient as LoadedGradient
from fused_densenet.backends.contract import Norm as NormTensors
from fused_densenet.backends.contract import Owed as OwedTensors

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p


class Device(ctypes.Structure):
    _fields_ = [("multiprocessors", ctypes.c_int), ("shared_per_block", ctypes.c_int), ("capability", ctypes.c_int)]


class Shape(ctypes.Structure):
    _fields_ = [
        (name, _i64)
        for name in ["n", "d", "h", "w", "kd", "kh", "kw", "input", "output", "window_d", "window_h", "window_w"]
    ]


class Pixels(ctypes.Structure):
    _fields_ = [("data", _pointer), ("ld", _i64)]


class Norm(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("mean", "var", "weight", "bias")),
        ("narrow", ctypes.c_bool),
        ("eps", ctypes.c_double),
        ("negative_slope", ctypes.c_double),
    ]


class Gradient(ctypes.Structure):
    _fields_ = [
        *((name, Pixels) for name in ("stored", "value")),
        *((name, _pointer) for name in ("mean", "constant", "slope")),
        ("negative_slope", ctypes.c_double),
    ]


class Bias(ctypes.Structure):
    _fields_ = [("data", _pointer), ("narrow", ctypes.c_bool)]


class Owed(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("dweight", "dbias", "constant", "slope", "pixels")]


class Weight(ctypes.Structure):
    _fields_ = [("data", _pointer), ("is_float", ctypes.c_bool), ("stride", _i64 * 5)]


class Moments(ctypes.Structure):
    _fields_ = [("mean", _pointer), ("var", _pointer)]


class Strided(ctypes.Structure):
    _fields_ = [("data", _pointer), ("stride", _i64 * 5)]


class Forward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("x", Pixels),
        ("norm", Norm),
        ("weight", Weight),
        ("out", Pixels),
        ("moments", Moments),
        ("bias", Bias),
        ("negative_slope", ctypes.c_double),
    ]


class StridedConv(Forward):
    _fields_ = [(name, _i64 * 3) for name in ("size", "kernel", "stride", "padding")]


class Backward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("grad", Gradient),
        ("x", Pixels),
        ("norm", Norm),
        ("weight", Weight),
        ("dx", Pixels),
        ("accumulate", ctypes.c_bool),
        ("dweight", Weight),
        ("owed", Owed),
        ("dbias", Bias),
    ]


class Place(ctypes.Structure):
    _fields_ = [("shape", Shape), ("x", Strided), ("out", Pixels), ("moments", Moments)]


class PlaceBackward(ctypes.Structure):
    _fields_ = [("shape", Shape), ("grad", Gradient), ("out", Strided)]


class NormReluPool(ctypes.Structure):
    _fields_ = [("shape", Shape), ("pools", ctypes.c_bool), ("x", Pixels), ("norm", Norm), ("out", Pixels)]


class NormReluPoolBackward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("pools", ctypes.c_bool),
        ("grad", Pixels),
        ("x", Pixels),
        ("norm", Norm),
        ("dx", Pixels),
        ("owed", Owed),
    ]


class RunningUpdate(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("batch_mean", "batch_var", "mean", "var", "count")),
        *((name, _i64) for name in ("channels", "mean_stride", "var_stride")),
        *((name, ctypes.c_double) for name in ("momentum", "unbiased")),
    ]


class RunningUpdates(ctypes.Structure):
    _fields_ = [("data", ctypes.POINTER(RunningUpdate)), ("count", _i64)]


PROBLEMS = {
    "place": Place,
    "place_backward": PlaceBackward,
    "norm_relu_pool": NormReluPool,
    "norm_relu_pool_backward": NormReluPoolBackward,
    "update_running": RunningUpdates,
    "forward": Forward,
    "backward": Backward,
}


def place(at: Arena, x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> Place:
    pixels = Pixels() if out is None else _pixels(at, out)
    return Place(_shape(x, x.shape[-1]), _strided(at, x), pixels, _moments(at, mean, var))


def place_backward(at: Arena, grad: LoadedGradient, out: Tensor) -> PlaceBackward:
    return PlaceBackward(_shape(out, out.shape[-1]), _gradient(at, grad), _strided(at, out))


def norm_relu_pool(at: Arena, x: Tensor, norm: NormTensors, out: Tensor) -> NormReluPool:
    pools = out.shape != x.shape
    return NormReluPool(_stem_shape(x), pools, _pixels(at, x), _norm(at, norm, x), _pixels(at, out))


def norm_relu_pool_backward(
    at: Arena, grad: Tensor, x: Tensor, norm: NormTensors, dx: Tensor, owed: OwedTensors
) -> NormReluPoolBackward:
    pools = grad.shape != x.shape
    images = _pixels(at, grad), _pixels(at, x), _norm(at, norm, x), _pixels(at, dx)
    return NormReluPoolBackward(_stem_shape(x), pools, *images, _owed(at, owed))


def update_running(
    at: Arena,
    batches: Sequence[Tensor],
    buffers: Sequence[Sequence[Tensor]],
    momenta: Sequence[float],
    unbiased: Sequence[float],
) -> RunningUpdates:
    """``batches`` are ``(2, channels)``, ``buffers`` the means, variances and counts of the norms."""
    updates = [
        RunningUpdate(
            *(at.address(t) for t in (*batch, mean, var, count)), len(mean), mean.stride(0), var.stride(0), *factors
        )
        for batch, mean, var, count, *factors in zip(batches, *buffers, momenta, unbiased, strict=True)
    ]
    return RunningUpdates((RunningUpdate * len(updates))(*updates), len(updates))


def forward(
    at: Arena,
    x: Tensor,
    norm: NormTensors | None,
    weight: Tensor,
    out: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bias: Tensor | None = None,
    negative_slope: float = 1.0,
) -> Forward:
    return Forward(
        _shape(x, weight.shape[0], weight, out),
        _pixels(at, x),
        _norm(at, norm, x),
        _weight(at, weight),
        _pixels(at, out),
        _moments(at, mean, var),
        _bias(at, bias, x),
        negative_slope,
    )


def strided_conv(at: Arena, x: Tensor, weight: Tensor, out: Tensor, *steps: int) -> StridedConv:
    patch, kernel = weight[0].numel(), weight.shape[2:]
    read = Weight(at.address(weight), weight.dtype == torch.float32, (_i64 * 5)(patch, 1, 0, 0, 0))
    shape = Shape(*out.shape[:4], 1, 1, 1, patch, len(weight), 1, 1, 1)
    forward = shape, _pixels(at, x), Norm(), read, _pixels(at, out), Moments(), Bias(), 1.0
    return StridedConv(*forward, *((_i64 * 3)(*three) for three in (x.shape[1:4], kernel, steps[:3], steps[3:])))


def backward(
    at: Arena,
    grad: LoadedGradient,
    x: Tensor,
    norm: NormTensors | None,
    weight: Tensor,
    dx: Tensor,
    accumulate: bool,
    dweight: Tensor | None,
    owed: OwedTensors | None,
    dbias: Tensor | None = None,
) -> Backward:
    return Backward(
        _shape(x, weight.shape[0], weight, grad.stored),
        _gradient(at, grad),
        _pixels(at, x),
        _norm(at, norm, x),
        _weight(at, weight),
        _pixels(at, dx),
        accumulate,
        Weight() if dweight is None else _weight(at, dweight),
        Owed() if owed is None else _owed(at, owed),
        _bias(at, dbias, x),
    )


def _stem_shape(image: Tensor) -> Shape:
    return Shape(*image.shape[:4], 1, 1, 1, image.shape[4], image.shape[4], 1, 1, 1)


def _shape(image: Tensor, out_channels: int, weight: Tensor | None = None, out: Tensor | None = None) -> Shape:
    kernel, channels = ((1, 1, 1), 1) if weight is None else (weight.shape[2:], weight.shape[1])
    pools = out is not None and out.shape[1:4] != image.shape[1:4]
    window = [2 if pools and size > 1 else 1 for size in image.shape[1:4]]
    return Shape(*image.shape[:4], *kernel, channels, out_channels, *window)


def _pixels(at: Arena, image: Tensor) -> Pixels:
    lengths = [(size, stride) for size, stride in zip(image.shape[:4], image.stride(), strict=False) if size > 1]
    return Pixels(at.address(image), lengths[-1][1] if lengths else image.shape[-1])


def _strided(at: Arena, image: Tensor) -> Strided:
    return Strided(at.address(image), (_i64 * 5)(*image.stride()))


def _gradient(at: Arena, grad: LoadedGradient) -> Gradient:
    value = Pixels() if grad.value is None else _pixels(at, grad.value)
    rows = (None, None) if grad.correction is None else (at.address(row) for row in grad.correction)
    return Gradient(_pixels(at, grad.stored), value, at.address(grad.mean), *rows, grad.negative_slope)


def _norm(at: Arena, norm: NormTensors | None, x: Tensor) -> Norm:
    if norm is None:
        return Norm()
    narrow = norm.weight.dtype == x.dtype != torch.float32
    return Norm(*map(at.address, norm[:4]), narrow, norm.eps, norm.negative_slope)


def _bias(at: Arena, bias: Tensor | None, x: Tensor) -> Bias:
    return Bias() if bias is None else Bias(at.address(bias), bias.dtype == x.dtype != torch.float32)


def _owed(at: Arena, owed: OwedTensors) -> Owed:
    rows = (None, None) if owed.correction is None else (at.address(row) for row in owed.correction)
    return Owed(at.address(owed.dweight), at.address(owed.dbias), *rows, at.address(owed.pixels))


def _weight(at: Arena, weight: Tensor) -> Weight:
    return Weight(at.address(weight), weight.dtype == torch.float32, (_i64 * 5)(*weight.stride()))


def _moments(at: Arena, mean: Tensor | None, var: Tensor | None) -> Moments:
    return Moments(at.address(mean), at.address(var))
