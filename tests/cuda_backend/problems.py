"""The structs of csrc/problem.h and csrc/cuda/launch.h, filled from tensors that lie in an arena."""

import ctypes

import torch
from arena import Arena
from torch import Tensor

from fused_densenet.backends.contract import Gradient as LoadedGradient
from fused_densenet.backends.contract import Norm as NormVectors

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
    _fields_ = [(name, _pointer) for name in ("mean", "scale", "shift")]


class Gradient(ctypes.Structure):
    _fields_ = [
        *((name, Pixels) for name in ("stored", "value")),
        *((name, _pointer) for name in ("scale", "slope", "mean", "offset")),
    ]


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
    ]


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
        ("sum_dz", _pointer),
        ("sum_dz_centered", _pointer),
    ]


class Place(ctypes.Structure):
    _fields_ = [("shape", Shape), ("x", Strided), ("out", Pixels), ("moments", Moments)]


class PlaceBackward(ctypes.Structure):
    _fields_ = [("shape", Shape), ("grad", Gradient), ("out", Strided)]


class NormScale(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("var", _pointer),
        ("gamma", _pointer),
        ("eps", ctypes.c_double),
        ("scale", _pointer),
    ]


class NormBackward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("sums", _pointer),
        ("sums_ld", _i64),
        ("scale", _pointer),
        ("var", _pointer),
        ("eps", ctypes.c_double),
        ("pixels", _pointer),
        ("dgamma", _pointer),
        ("correction", _pointer),
        ("correction_ld", _i64),
        ("accumulate", ctypes.c_bool),
    ]


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
        ("sum_dz", _pointer),
        ("sum_dz_centered", _pointer),
    ]


PROBLEMS = {
    "place": Place,
    "place_backward": PlaceBackward,
    "norm_scale": NormScale,
    "norm_backward": NormBackward,
    "norm_relu_pool": NormReluPool,
    "norm_relu_pool_backward": NormReluPoolBackward,
    "forward": Forward,
    "backward": Backward,
}


def place(at: Arena, x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> Place:
    pixels = Pixels() if out is None else _pixels(at, out)
    return Place(_shape(x, x.shape[-1]), _strided(at, x), pixels, _moments(at, mean, var))


def place_backward(at: Arena, grad: LoadedGradient, out: Tensor) -> PlaceBackward:
    return PlaceBackward(_shape(out, out.shape[-1]), _gradient(at, grad), _strided(at, out))


def norm_scale(at: Arena, var: Tensor, gamma: Tensor, eps: float, scale: Tensor) -> NormScale:
    return NormScale(_vector_shape(var), at.address(var), at.address(gamma), eps, at.address(scale))


def norm_backward(
    at: Arena,
    sums: Tensor,
    scale: Tensor,
    var: Tensor,
    eps: float,
    pixels: Tensor | None,
    dgamma: Tensor,
    correction: Tensor,
    accumulate: bool,
) -> NormBackward:
    rows = (at.address(sums), sums.stride(0)), (at.address(correction), correction.stride(0))
    vectors = at.address(scale), at.address(var)
    tail = at.address(pixels), at.address(dgamma), *rows[1], accumulate
    return NormBackward(_vector_shape(var), *rows[0], *vectors, eps, *tail)


def norm_relu_pool(at: Arena, x: Tensor, norm: NormVectors, out: Tensor) -> NormReluPool:
    pools = out.shape != x.shape
    return NormReluPool(_stem_shape(x), pools, _pixels(at, x), Norm(*map(at.address, norm)), _pixels(at, out))


def norm_relu_pool_backward(
    at: Arena, grad: Tensor, x: Tensor, norm: NormVectors, dx: Tensor, sum_dz: Tensor, sum_dz_centered: Tensor
) -> NormReluPoolBackward:
    pools = grad.shape != x.shape
    images = _pixels(at, grad), _pixels(at, x), Norm(*map(at.address, norm)), _pixels(at, dx)
    return NormReluPoolBackward(_stem_shape(x), pools, *images, at.address(sum_dz), at.address(sum_dz_centered))


def forward(
    at: Arena, x: Tensor, norm: NormVectors, weight: Tensor, out: Tensor, mean: Tensor | None, var: Tensor | None
) -> Forward:
    return Forward(
        _shape(x, weight.shape[0], weight, out),
        _pixels(at, x),
        Norm(*map(at.address, norm)),
        _weight(at, weight),
        _pixels(at, out),
        _moments(at, mean, var),
    )


def backward(
    at: Arena,
    grad: LoadedGradient,
    x: Tensor,
    norm: NormVectors,
    weight: Tensor,
    dx: Tensor,
    accumulate: bool,
    dweight: Tensor | None,
    sum_dz: Tensor,
    sum_dz_centered: Tensor,
) -> Backward:
    return Backward(
        _shape(x, weight.shape[0], weight, grad.stored),
        _gradient(at, grad),
        _pixels(at, x),
        Norm(*map(at.address, norm)),
        _weight(at, weight),
        _pixels(at, dx),
        accumulate,
        Weight() if dweight is None else _weight(at, dweight),
        at.address(sum_dz),
        at.address(sum_dz_centered),
    )


def _vector_shape(vector: Tensor) -> Shape:
    return Shape(1, 1, 1, 1, 1, 1, 1, len(vector), len(vector), 1, 1, 1)


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
    return Gradient(_pixels(at, grad.stored), _pixels(at, grad.value), *map(at.address, grad[2:]))


def _weight(at: Arena, weight: Tensor) -> Weight:
    return Weight(at.address(weight), weight.dtype == torch.float32, (_i64 * 5)(*weight.stride()))


def _moments(at: Arena, mean: Tensor | None, var: Tensor | None) -> Moments:
    return Moments(at.address(mean), at.address(var))
