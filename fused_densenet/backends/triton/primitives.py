"""The host side of the primitives: workspaces and launches.

Nothing here waits for the device or allocates by the data's values, so a block can be captured in a CUDA graph.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Gradient, Norm, Owed, uses_tf32
from . import plans, tuning
from .affine import Loaded, loaded
from .plans import Backward, Forward, Owes
from .problem import Problem, must_be_packed, pixel_stride
from .tiles_on_disk import Tile

Vectors = tuple[Tensor | None, ...]
"""Mean, variance, weight and bias of a norm; None where there is none."""

_NOTHING_OWED = (None,) * len(Owed._fields)


class Packed(NamedTuple):
    """A weight ``(K, C, kd, kh, kw)``, and its numbers as the products load them."""

    weight: Tensor
    matrix: Tensor


def pack_weights(weights: Sequence[Tensor], x: Tensor) -> list[Tensor | Packed]:
    """Of convolutions of data like ``x``, all that must be at once; none where their dtypes differ."""
    dtype, tf32 = weights[0].dtype, uses_tf32(x)
    if any(weight.dtype != dtype for weight in weights):
        return list(weights)
    needed = [must_be_packed(w.shape, w.stride(), dtype, x.dtype, tf32) for w in weights]
    packed = iter(_pack([weight for weight, wanted in zip(weights, needed, strict=True) if wanted], x))
    return [next(packed) if wanted else weight for weight, wanted in zip(weights, needed, strict=True)]


def _pack(weights: Sequence[Tensor], x: Tensor) -> list[Packed]:
    if not weights:
        return []
    flat, strides = zip(*map(_in_a_row, weights), strict=True)
    dtypes = (weights[0].dtype, x.dtype)
    plan = plans.pack(tuple([weight.shape for weight in weights]), strides, dtypes, uses_tf32(x), x.device)
    packed = torch.empty(plan.size, dtype=x.dtype, device=x.device)
    plan.launch(flat[0] if len(flat) == 1 else torch.cat(flat), plan.table, packed)
    places = [packed.narrow(0, begin, math.prod(shape)) for begin, shape in plan.places]
    return [Packed(weight, matrix) for weight, matrix in zip(weights, places, strict=True)]


def _in_a_row(weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The numbers of a weight one behind the other as they lie, and their strides."""
    last = weight.permute(0, 2, 3, 4, 1)
    if not weight.is_contiguous() and last.is_contiguous():
        return last.reshape(-1), weight.stride()
    weight = weight.contiguous()
    return weight.view(-1), weight.stride()


def place(x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> None:
    if not x.numel():
        return
    stride, dtype = (None, None) if out is None else (pixel_stride(out.shape, out.stride()), out.dtype)
    plan = plans.place(x.shape, x.stride(), stride, (x.dtype, dtype), mean is not None)
    if plan is None:
        place(x.contiguous(), out, mean, var)
    elif mean is not None:
        moments = _workspace(plan.workspace, x)
        plan.copy(x, out, moments)
        plan.merge(moments, mean, var)
    elif out is not None:
        plan.copy(x, out, None)


def place_backward(grad: Gradient, out: Tensor) -> None:
    if not out.numel():
        return
    terms = loaded(grad)
    stored = terms.stored
    strides, dtypes = (out.stride(), stored.stride(), terms.value.stride()), (stored.dtype, out.dtype)
    launch = plans.place_backward(out.shape, *strides, grad.negative_slope, dtypes)
    if launch is None:
        contiguous = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        place_backward(grad, contiguous)
        out.copy_(contiguous)
    else:
        launch(*terms, out)


def norm_relu_conv(
    x: Tensor,
    norm: Norm | None,
    weight: Tensor | Packed,
    out: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bias: Tensor | None = None,
    negative_slope: float = 1.0,
) -> None:
    weight, matrix = weight if isinstance(weight, Packed) else (weight, None)
    if not out.numel():
        return
    problem = _problem(x, out, weight, x.data_ptr() | out.data_ptr(), norm, negative_slope, bias)
    vectors = _vectors(norm)
    if tuning.AUTOTUNE:
        _tune_forward(problem, x, vectors, weight, bias, out, mean)
    plan = plans.norm_relu_conv(problem, mean is not None)
    packed = _packed(plan, weight, matrix, x)
    if mean is None:
        plan.product(x, *vectors, packed, bias, out, None)
    else:
        moments = _workspace(plan.workspace, x)
        plan.product(x, *vectors, packed, bias, out, moments)
        plan.merge(moments, mean, var)


def norm_relu_conv_backward(
    grad: Gradient,
    x: Tensor,
    norm: Norm | None,
    weight: Tensor | Packed,
    dx: Tensor,
    accumulate: bool,
    dweight: Tensor | None,
    owed: Owed | None,
    dbias: Tensor | None = None,
) -> None:
    weight, matrix = weight if isinstance(weight, Packed) else (weight, None)
    terms = loaded(grad)
    stored = terms.stored
    if not stored.numel():
        for result in (dweight, dbias, None if accumulate else dx):
            if result is not None:
                result.zero_()
        if owed is not None:
            _settle_nothing(accumulate, owed)
        return
    address = x.data_ptr() | stored.data_ptr() | terms.value.data_ptr() | dx.data_ptr()
    problem = _problem(x, stored, weight, address, norm, grad.negative_slope, dbias)
    vectors = _vectors(norm)
    owes = None if norm is None or owed is None else _owes(norm, x, owed)
    strides = terms.value.stride(), dx.stride(), None if dweight is None else dweight.stride(), accumulate, owes
    if tuning.AUTOTUNE:
        _tune_backward(problem, strides, terms, x, vectors, weight, dx)
    plan = plans.norm_relu_conv_backward(problem, *strides)
    packed, partials = _packed(plan, weight, matrix, x), _workspace(plan.workspace, x)
    for rest in plan.rest:
        dx.narrow(*rest).zero_()
    plan.data(*terms, x, *vectors, packed, dx, partials)
    if plan.weight is not None:
        plan.weight(*terms, x, *vectors, partials)
    if plan.add is not None:
        plan.add(partials, dweight, *vectors[1:3], *(owed or _NOTHING_OWED))
    if plan.bias is not None:
        shares = _workspace(plan.bias.workspace, x)
        plan.bias.sum(*terms, shares)
        plan.bias.add(shares, dbias)


def norm_relu_pool(x: Tensor, norm: Norm, out: Tensor) -> None:
    if out.numel():
        dtypes = x.dtype, norm.weight.dtype
        slope = norm.negative_slope
        plan = plans.norm_relu_pool(x.shape, x.stride(), out.shape, out.stride(), norm.eps, slope, dtypes)
        plan(x, *norm[:4], out, None)


def norm_relu_pool_backward(grad: Tensor, x: Tensor, norm: Norm, dx: Tensor, owed: Owed) -> None:
    if not x.numel():
        _settle_nothing(False, owed)
        return
    terms = _owes(norm, x, owed), norm.negative_slope, x.dtype, x.device
    plan = plans.norm_relu_pool_backward(x.shape, x.stride(), dx.stride(), grad.shape, grad.stride(), *terms)
    vectors, places = norm[:4], None
    if plan.look is not None:
        places = torch.empty(grad.shape, dtype=torch.uint8, device=x.device)
        plan.look(x, *vectors, None, places)
    partials = _workspace(plan.workspace, x)
    plan.data(grad, places, x, *vectors, dx, partials)
    plan.add(partials, None, norm.var, norm.weight, *owed)


def _vectors(norm: Norm | None) -> Vectors:
    return (None,) * 4 if norm is None else norm[:4]


def _owes(norm: Norm, x: Tensor, owed: Owed) -> Owes:
    correction, channels = owed.correction, x.shape[-1]
    row = channels if correction is None else correction.stride(0)
    kinds = (owed.dweight.dtype, correction is not None, owed.pixels is not None)
    return Owes(norm.eps, x.numel() // channels, row, kinds)


def _settle_nothing(accumulate: bool, owed: Owed) -> None:
    """Of an empty batch."""
    for result in (owed.dweight, owed.dbias, None if accumulate else owed.correction):
        if result is not None:
            result.zero_()


def _problem(
    x: Tensor, out: Tensor, weight: Tensor, address: int, norm: Norm | None, out_slope: float, bias: Tensor | None
) -> Problem:
    dtype = x.dtype
    eps, norm_dtype, slope = (0.0, None, 1.0) if norm is None else (norm.eps, norm.weight.dtype, norm.negative_slope)
    arithmetic = "half" if dtype is not torch.float32 else "tf32" if uses_tf32(x) else "ieee"
    return Problem(
        x.shape,
        x.stride(),
        out.shape,
        out.stride(),
        weight.shape,
        weight.stride(),
        dtype,
        weight.dtype,
        arithmetic,
        address & 15,
        x.device,
        eps,
        norm_dtype,
        slope,
        out_slope,
        None if bias is None else bias.dtype,
    )


def _packed(plan: Forward | Backward, weight: Tensor, matrix: Tensor | None, x: Tensor) -> Tensor:
    """What the product loads: the packed weight, or the weight where it lies so already."""
    if not plan.packs:
        return weight
    return _pack([weight], x)[0].matrix if matrix is None else matrix


def _workspace(size: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _tune_forward(
    problem: Problem, x: Tensor, norm: Vectors, weight: Tensor, bias: Tensor | None, out: Tensor, mean: Tensor | None
) -> None:
    def run(tile: Tile) -> None:
        plan = plans.norm_relu_conv(problem, mean is not None, tile)
        moments = None if mean is None else _workspace(plan.workspace, x)
        plan.product(x, *norm, _packed(plan, weight, None, x), bias, out, moments)

    if tuning.tune(problem.shape_class("norm_relu_conv"), problem.device, run):
        plans.forget()


def _tune_backward(
    problem: Problem, strides: tuple, grad: Loaded, x: Tensor, norm: Vectors, weight: Tensor, dx: Tensor
) -> None:
    """On a copy of ``dx``, which runs would accumulate into."""
    copy: list[Tensor] = []

    def run(kernel: str, tile: Tile) -> None:
        if not copy:
            copy.append(torch.empty_strided(dx.shape, dx.stride(), dtype=dx.dtype, device=dx.device).copy_(dx))
        plan = plans.norm_relu_conv_backward(problem, *strides, ((kernel, tile),))
        partials = _workspace(plan.workspace, x)
        if kernel != "backward_weight":
            plan.data(*grad, x, *norm, _packed(plan, weight, None, x), copy[0], partials)
        elif plan.weight is not None:
            plan.weight(*grad, x, *norm, partials)

    tuned = False
    for kernel in plans.kernels_of_backward(problem, strides[2] is not None):
        shape = problem.shape_class(kernel)
        tuned |= tuning.tune(shape, problem.device, functools.partial(run, kernel))
    if tuned:
        plans.forget()
