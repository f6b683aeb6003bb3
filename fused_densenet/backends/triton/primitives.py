"""The host side of the four primitives: workspaces and launches.

Nothing here waits for the device or allocates by the data's values, so a block can be captured in a CUDA graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contract import Gradient, Norm, uses_tf32
from . import plans, tuning
from .plans import Plan
from .tuning import Tile


def place(x: Tensor, out: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
    layout = _images(x)
    if layout is None:
        x = x.contiguous()
        layout = _images(x)
        assert layout is not None
    images, pixels, strides = layout
    plan = plans.place(images, pixels, x.shape[4], mean is not None)
    moments = _workspace(x, plan.rows, 2) if mean is not None else None
    plan.kernel(plan.grid, x, *strides, out, _pixel_stride(out), moments, *plan.sizes)
    if moments is not None:
        _merge_moments(moments, mean, var, plan, pixels)


def place_backward(grad: Gradient, out: Tensor) -> None:
    layout = _images(out)
    if layout is None:
        contiguous = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        place_backward(grad, contiguous)
        out.copy_(contiguous)
        return
    images, pixels, strides = layout
    plan = plans.place_backward(images, pixels, out.shape[4])
    plan.kernel(plan.grid, *_loaded(grad), out, *strides, *plan.sizes)


def norm_relu_conv(x: Tensor, norm: Norm, weight: Tensor, out: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
    arithmetic = _arithmetic(x)

    def run(tile: Tile | None = None) -> tuple[Plan, Tensor | None]:
        plan = plans.norm_relu_conv(x.shape, weight.shape, arithmetic, mean is not None, x.device, tile)
        moments = _workspace(out, plan.rows, 2) if mean is not None else None
        operands = (x, _pixel_stride(x), *norm, weight, *weight.stride(), out, _pixel_stride(out), moments)
        plan.kernel(plan.grid, *operands, *plan.sizes)
        return plan, moments

    _tune("norm_relu_conv", weight, arithmetic, run)
    plan, moments = run()
    if moments is not None:
        _merge_moments(moments, mean, var, plan, plan.sizes[0])


def norm_relu_conv_backward(
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
    arithmetic = _arithmetic(x)
    operands = (*_loaded(grad), x, _pixel_stride(x), *norm)
    rows = weight.shape[0] * plans.taps(weight.shape) if dweight is not None else 0
    shapes = (x.shape, weight.shape, arithmetic)

    def run_pointwise(tile: Tile | None = None, dx: Tensor = dx) -> tuple[Tensor, Tensor | None]:
        plan = plans.backward_pointwise(*shapes, accumulate, dweight is not None, x.device, tile)
        sums = _workspace(x, plan.rows, 2)
        weights = _workspace(x, plan.splits, rows) if dweight is not None else None
        target = (weight, *weight.stride()[:2], dx, _pixel_stride(dx), weights, sums)
        plan.kernel(plan.grid, *operands, *target, *plan.sizes)
        return sums, weights

    def run_data(tile: Tile | None = None, dx: Tensor = dx) -> Tensor:
        plan = plans.backward_data(*shapes, accumulate, x.device, tile)
        sums = _workspace(x, plan.rows, 2)
        target = (weight, *weight.stride(), dx, _pixel_stride(dx), sums)
        plan.kernel(plan.grid, *operands, *target, *plan.sizes)
        return sums

    def run_weight(tile: Tile | None = None) -> Tensor:
        plan = plans.backward_weight(*shapes, x.device, tile)
        weights = _workspace(x, plan.splits, rows)
        plan.kernel(plan.grid, *operands, weights, *plan.sizes)
        return weights

    if plans.has_pointwise(weight.shape, arithmetic):
        _tune("backward_pointwise", weight, arithmetic, run_pointwise, dx)
        sums, weights = run_pointwise()
    else:
        _tune("backward_data", weight, arithmetic, run_data, dx)
        sums, weights = run_data(), None
        if dweight is not None:
            _tune("backward_weight", weight, arithmetic, run_weight)
            weights = run_weight()
    splits = 0 if weights is None else weights.shape[0]
    strides = (0,) * 5 if dweight is None else dweight.stride()
    kernel, grid = plans.add_partials(weight.shape, dweight is not None)
    outputs = (dweight, *strides, sum_dz, sum_dz_centered)
    kernel(grid, weights, sums, rows * x.shape[4], splits, sums.shape[0], *outputs, x.shape[4], weight.shape[0])


def _tune(kernel: str, weight: Tensor, arithmetic: str, run: Callable[..., Any], dx: Tensor | None = None) -> None:
    """Tunes a kernel if that is wanted, on a copy of ``dx``, which runs would accumulate into."""
    if not tuning.AUTOTUNE:
        return
    shape = plans.shape_class(kernel, weight.shape, arithmetic)
    if tuning.wanted(shape, weight.device):
        copy = () if dx is None else (dx.clone(),)
        tuning.tune(shape, weight.device, lambda tile: run(tile, *copy))
        plans.forget()


def _merge_moments(moments: Tensor, mean: Tensor | None, var: Tensor | None, plan: Plan, pixels: int) -> None:
    kernel, grid = plans.merge_moments(moments.shape[2])
    row_pixels = plan.kernel.constants["BLOCK_P"]
    rows_per_image = -(-pixels // row_pixels)
    kernel(grid, moments, mean, var, plan.rows, rows_per_image, row_pixels, pixels, moments.shape[2])


def _loaded(grad: Gradient) -> tuple[Any, ...]:
    stored, value, *vectors = grad
    return (stored, _pixel_stride(stored), value, _pixel_stride(value), *vectors)


def _workspace(like: Tensor, shares: int, values: int) -> Tensor:
    """``values`` for each channel of ``like``, from each of ``shares`` tiles or programs."""
    return torch.empty((shares, values, like.shape[4]), dtype=torch.float32, device=like.device)


def _arithmetic(x: Tensor) -> str:
    """float32 follows torch's switch for convolutions; TF32 is NVIDIA's."""
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if uses_tf32(x) else "ieee"


def _pixel_stride(x: Tensor) -> int:
    """The stride between neighbouring pixels of ``(N, D, H, W, C)``."""
    shape, stride = x.shape, x.stride()
    for dim in (3, 2, 1, 0):
        if shape[dim] > 1:
            return stride[dim]
    return shape[4]


def _images(x: Tensor) -> tuple[int, int, tuple[int, int, int]] | None:
    """(images, pixels of each, strides of image, pixel and channel), or None if pixels have no single stride.

    All pixels count as one image where they have one stride.
    """
    images, pixels = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    strides = x.stride()
    step, count = None, 1
    for dim in (3, 2, 1, 0):
        if x.shape[dim] == 1:
            continue
        if step is None:
            step = strides[dim]
        elif strides[dim] != step * count:
            if dim > 0:
                return None
            return images, pixels, (strides[0], step, strides[4])
        count *= x.shape[dim]
    return 1, images * pixels, (0, step or 0, strides[4])
