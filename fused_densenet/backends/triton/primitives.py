"""The host side of the primitives: workspaces and launches.

Nothing here waits for the device or allocates by the data's values, so a block can be captured in a CUDA graph.
"""

import functools

import torch
from torch import Tensor

from .. import eager
from ..contract import Gradient, Norm, Owed, is_plain, uses_tf32
from . import plans, tuning
from .affine import Affine, Loaded, affine, loaded
from .plans import Backward, Forward, Problem
from .tiles_on_disk import Tile


def place(x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> None:
    if not x.numel():
        return
    stride, dtype = (None, None) if out is None else (plans.pixel_stride(out.shape, out.stride()), out.dtype)
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
    if grad.negative_slope != 1:
        eager.place_backward(grad, out)
        return
    if not out.numel():
        return
    terms = loaded(grad)
    stored = terms.stored
    launch = plans.place_backward(
        out.shape, out.stride(), stored.stride(), terms.value.stride(), (stored.dtype, out.dtype)
    )
    if launch is None:
        contiguous = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        place_backward(grad, contiguous)
        out.copy_(contiguous)
    else:
        launch(*terms, out)


def norm_relu_conv(
    x: Tensor,
    norm: Norm | None,
    weight: Tensor,
    out: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bias: Tensor | None = None,
    negative_slope: float = 1.0,
) -> None:
    if norm is None or not is_plain(norm, bias, negative_slope):
        eager.norm_relu_conv(x, norm, weight, out, mean, var, bias, negative_slope)
        return
    if not out.numel():
        return
    problem = _problem(x, out, weight, x.data_ptr() | out.data_ptr())
    vectors = affine(norm)
    if tuning.AUTOTUNE:
        _tune_forward(problem, x, vectors, weight, out, mean)
    plan = plans.norm_relu_conv(problem, mean is not None)
    packed = _packed(plan, weight, x)
    if mean is None:
        plan.product(x, *vectors, packed, out, None)
    else:
        moments = _workspace(plan.workspace, x)
        plan.product(x, *vectors, packed, out, moments)
        plan.merge(moments, mean, var)


def norm_relu_conv_backward(
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
    if norm is None or owed is None or not is_plain(norm, dbias, grad.negative_slope):
        eager.norm_relu_conv_backward(grad, x, norm, weight, dx, accumulate, dweight, owed, dbias)
        return
    terms = loaded(grad)
    stored = terms.stored
    sums = torch.empty(2, x.shape[-1], dtype=torch.float32, device=x.device)
    if not stored.numel():
        for result in (dweight, None if accumulate else dx):
            if result is not None:
                result.zero_()
        _settle_nothing(accumulate, owed)
        return
    address = x.data_ptr() | stored.data_ptr() | terms.value.data_ptr() | dx.data_ptr()
    problem = _problem(x, stored, weight, address)
    vectors = affine(norm)
    strides = terms.value.stride(), dx.stride(), accumulate, None if dweight is None else dweight.stride()
    if tuning.AUTOTUNE:
        _tune_backward(problem, strides, terms, x, vectors, weight, dx)
    plan = plans.norm_relu_conv_backward(problem, *strides)
    packed, partials = _packed(plan, weight, x), _workspace(plan.workspace, x)
    for rest in plan.rest:
        dx.narrow(*rest).zero_()
    plan.data(*terms, x, *vectors, packed, dx, partials)
    if plan.weight is not None:
        plan.weight(*terms, x, *vectors, partials)
    plan.add(partials, dweight, sums)
    _settle(sums, x, vectors, norm, accumulate, owed)


def norm_relu_pool(x: Tensor, norm: Norm, out: Tensor) -> None:
    if out.numel():
        plans.norm_relu_pool(x.shape, x.stride(), out.shape, out.stride(), x.dtype)(x, *affine(norm), out, None)


def norm_relu_pool_backward(grad: Tensor, x: Tensor, norm: Norm, dx: Tensor, owed: Owed) -> None:
    sums = torch.empty(2, x.shape[-1], dtype=torch.float32, device=x.device)
    if x.numel():
        vectors = affine(norm)
        plan = plans.norm_relu_pool_backward(
            x.shape, x.stride(), dx.stride(), grad.shape, grad.stride(), x.dtype, x.device
        )
        places = None
        if plan.look is not None:
            places = torch.empty(grad.shape, dtype=torch.uint8, device=x.device)
            plan.look(x, *vectors, None, places)
        partials = _workspace(plan.workspace, x)
        plan.data(grad, places, x, *vectors, dx, partials)
        plan.add(partials, None, sums)
        _settle(sums, x, vectors, norm, False, owed)
    else:
        _settle_nothing(False, owed)


def _settle(sums: Tensor, x: Tensor, vectors: Affine, norm: Norm, accumulate: bool, owed: Owed) -> None:
    correction, channels = owed.correction, x.shape[-1]
    row = channels if correction is None else correction.stride(0)
    kinds = (owed.dweight.dtype, correction is not None, owed.pixels is not None)
    launch = plans.settle(channels, x.numel() // channels, row, norm.eps, accumulate, *kinds)
    launch(sums, vectors.scale, norm.var, owed.dweight, owed.dbias, correction, owed.pixels)


def _settle_nothing(accumulate: bool, owed: Owed) -> None:
    """Of an empty batch."""
    for result in (owed.dweight, owed.dbias, None if accumulate else owed.correction):
        if result is not None:
            result.zero_()


def _problem(x: Tensor, out: Tensor, weight: Tensor, address: int) -> Problem:
    dtype = x.dtype
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
    )


def _packed(plan: Forward | Backward, weight: Tensor, x: Tensor) -> Tensor:
    if plan.pack is None:
        return weight
    packed = torch.empty(plan.packed, dtype=x.dtype, device=x.device)
    plan.pack(weight, packed)
    return packed


def _workspace(size: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _tune_forward(problem: Problem, x: Tensor, norm: Affine, weight: Tensor, out: Tensor, mean: Tensor | None) -> None:
    def run(tile: Tile) -> None:
        plan = plans.norm_relu_conv(problem, mean is not None, tile)
        moments = None if mean is None else _workspace(plan.workspace, x)
        plan.product(x, *norm, _packed(plan, weight, x), out, moments)

    if tuning.tune(problem.shape_class("norm_relu_conv"), problem.device, run):
        plans.forget()


def _tune_backward(
    problem: Problem, strides: tuple, grad: Loaded, x: Tensor, norm: Affine, weight: Tensor, dx: Tensor
) -> None:
    """On a copy of ``dx``, which runs would accumulate into."""
    copy: list[Tensor] = []

    def run(kernel: str, tile: Tile) -> None:
        if not copy:
            copy.append(torch.empty_strided(dx.shape, dx.stride(), dtype=dx.dtype, device=dx.device).copy_(dx))
        plan = plans.norm_relu_conv_backward(problem, *strides, ((kernel, tile),))
        partials = _workspace(plan.workspace, x)
        if kernel != "backward_weight":
            plan.data(*grad, x, *norm, _packed(plan, weight, x), copy[0], partials)
        elif plan.weight is not None:
            plan.weight(*grad, x, *norm, partials)

    tuned = False
    for kernel in plans.kernels_of_backward(problem, strides[-1] is not None):
        shape = problem.shape_class(kernel)
        tuned |= tuning.tune(shape, problem.device, functools.partial(run, kernel))
    if tuned:
        plans.forget()
