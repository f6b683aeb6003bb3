"""Which kernels with which tiles and grids serve a primitive's arguments; worked out once for each and kept.

Sums are never added where they arise: every tile of pixels leaves its moments or sums in a row of a workspace, and the
weight gradient's pixels are split between a few programs per multiprocessor, each with a share in the workspace. Both are
added in a fixed order.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import backward, biases, forward, merging, packing, placement, pooling, tuning
from .constants import constant
from .launch import Launch, kernels
from .problem import Problem, Size, pixel_stride, power
from .tiles_on_disk import Tile

_kept = functools.lru_cache(maxsize=1 << 15)  # of 2 KB each: 270 sizes of images in DenseNet-121


class Owes(NamedTuple):
    """What a backward owes its norm: its channels, of so many pixels, by ``eps``.

    Attributes:
        row: from one row of the correction to the other.
        kinds: dtype of the gradients, whether there is a correction, whether the pixels are counted: the tensors there are.
    """

    eps: float
    pixels: int
    row: int
    kinds: tuple[torch.dtype, bool, bool]


@dataclass(slots=True)
class Place:
    """``copy(x, out, moments)``, then ``merge(moments, mean, var)`` where moments are wanted."""

    copy: Launch
    workspace: Size
    merge: Launch


@dataclass(slots=True)
class Forward:
    """``product(x, *norm, weight, bias, out, moments)``, ``merge`` as in :class:`Place`.

    Attributes:
        packs: whether the weight must be packed first.
    """

    packs: bool
    product: Launch
    workspace: Size
    merge: Launch


@dataclass(slots=True)
class Bias:
    """``sum(*grad, partials)``, then ``add(partials, dbias)``.

    Attributes:
        workspace: the shape of ``partials``.
    """

    sum: Launch
    add: Launch
    workspace: Size


@dataclass(slots=True)
class Backward:
    """``data(*grad, x, *norm, weight, dx, partials)``, ``weight(*grad, x, *norm, partials)`` unless the former does it
    or nothing of the kind is wanted, ``add(partials, dweight, *settled)``, the norm's variance and weight and its
    :class:`contract.Owed`, all None without one; no ``add`` where it has nothing to add.

    Attributes:
        packs: as in :class:`Forward`.
        workspace: values of ``partials``.
        rest: (dimension, start, length) of the pixels that odd sizes leave without a window, where ``dx`` is zero.
        bias: what makes the bias's gradient, if one is wanted.
    """

    packs: bool
    data: Launch
    weight: Launch | None
    add: Launch | None
    workspace: Size
    rest: list[tuple[int, int, int]]
    bias: Bias | None


@dataclass(slots=True)
class PoolBackward:
    """``look(x, *norm, None, places)`` where anything is pooled, ``data(grad, places, x, *norm, dx, partials)``,
    ``add(partials, None, *settled)`` as in :class:`Backward`.

    Attributes:
        workspace: values of ``partials``.
    """

    look: Launch | None
    data: Launch
    add: Launch
    workspace: Size


class Packing(NamedTuple):
    """``launch(weights, table, packed)`` of several weights.

    Attributes:
        size: numbers of ``packed``.
        places: where each begins there, and its shape ``(taps, K, C)``, C rounded up.
    """

    launch: Launch
    table: Tensor
    size: int
    places: tuple[tuple[int, Size], ...]


@_kept
def pack(
    shapes: tuple[Size, ...],
    strides: tuple[Size, ...],
    dtypes: tuple[torch.dtype, ...],
    tf32: bool,
    device: torch.device,
) -> Packing:
    """Of weights that lie one behind the other."""
    rows, places, begin, end = [], [], 0, 0
    for (k, c, *kernel), steps in zip(shapes, strides, strict=True):
        shape = (math.prod(kernel), k, triton.cdiv(c, 16) * 16)
        rows.append((begin, end, k, c, *steps, *kernel))
        places.append((end, shape))
        begin, end = begin + k * c * math.prod(kernel), end + math.prod(shape)
    grid = (triton.cdiv(max(math.prod(shape) for _, shape in places), 512), len(rows), 1)
    launch = Launch(packing.pack, grid, (), 4, 1, PRECISION="tf32" if tf32 else "ieee", BLOCK=512)
    return Packing(launch, _table(tuple(rows), device), end, tuple(places))


@functools.cache
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return constant(rows, torch.int32, device)


@_kept
def place(
    x: Size, x_strides: Size, out_stride: int | None, dtypes: tuple[torch.dtype, torch.dtype | None], moments: bool
) -> Place | None:
    """``out_stride`` between pixels, or None. None if pixels of ``x`` have no single stride within an image."""
    found = images(x, x_strides)
    if found is None:
        return None
    count, pixels, strides = found
    channels = x[4]
    blocks = {"BLOCK_P": 128, "BLOCK_C": min(power(channels), 32)}
    tiles = triton.cdiv(pixels, 128)
    grid = (count * tiles, triton.cdiv(channels, blocks["BLOCK_C"]), 1)
    numbers = (*strides, out_stride or 0, pixels, channels, tiles)
    copy = Launch(placement.place, grid, numbers, 8, 1, MOMENTS=moments, **blocks)
    rows = count * tiles
    return Place(copy, (rows, 2, channels), _merge(rows, tiles, 128, pixels, channels))


@_kept
def place_backward(
    out: Size, out_strides: Size, stored: Size, value: Size, slope: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> Launch | None:
    """``stored`` and ``value`` are strides, ``slope`` that of the gradient. None as :func:`place`."""
    found = images(out, out_strides)
    if found is None:
        return None
    count, pixels, strides = found
    channels = out[4]
    blocks = {"BLOCK_P": 128, "BLOCK_C": min(power(channels), 32)}
    tiles = triton.cdiv(pixels, 128)
    grid = (count * tiles, triton.cdiv(channels, blocks["BLOCK_C"]), 1)
    numbers = (pixel_stride(out, stored), pixel_stride(out, value), *strides, pixels, channels, tiles)
    return Launch(placement.place_backward, grid, numbers, 8, 1, VALUE_SLOPE=slope, **blocks)


@_kept
def norm_relu_conv(problem: Problem, moments: bool, tile: Tile | None = None) -> Forward:
    """Here and below ``tile`` is None for the one in use."""
    tile = tile or problem.tile("norm_relu_conv")
    k = problem.weight[0]
    rows = triton.cdiv(problem.pixels, tile.p)
    strides = _x_stride(problem), pixel_stride(problem.out, problem.out_strides)
    product = Launch(
        forward.norm_relu_conv,
        (triton.cdiv(k, tile.k) * rows, 1, 1),
        (*strides, *problem.sizes()),
        tile.warps,
        tile.stages,
        **problem.constants(*strides),
        OUT_SLOPE=problem.out_slope,
        MOMENTS=moments,
        **problem.blocks(tile),
    )
    return Forward(problem.packs, product, (rows, 2, k), _merge(rows, rows, tile.p, problem.pixels, k))


def has_pointwise(problem: Problem) -> bool:
    """Whether one kernel does the whole backward of the convolution."""
    family = tuning.family(problem.device)
    widest = tuning.widest("backward_pointwise", problem.arithmetic, problem.pool, family)
    return problem.taps == 1 and problem.weight[0] <= widest


def kernels_of_backward(problem: Problem, weight_needed: bool) -> list[str]:
    if has_pointwise(problem):
        return ["backward_pointwise"]
    return ["backward_data", *(["backward_weight"] if weight_needed else [])]


@_kept
def norm_relu_conv_backward(
    problem: Problem,
    value: Size,
    dx: Size,
    dweight: Size | None,
    accumulate: bool,
    owes: Owes | None,
    tiles: tuple[tuple[str, Tile], ...] = (),
) -> Backward:
    """``value`` and ``dx`` are strides, as ``dweight``, which is None where none is wanted; ``tiles`` by kernel."""
    chosen = dict(tiles)
    k, c = problem.weight[:2]
    stored = pixel_stride(problem.out, problem.out_strides)
    strides = (stored, pixel_stride(problem.out, value), _x_stride(problem), pixel_stride(problem.x, dx))
    values = k * c * problem.taps if dweight is not None else 0
    name = "backward_pointwise" if has_pointwise(problem) else "backward_data"
    tile = chosen.get(name) or problem.tile(name)
    rows = triton.cdiv(problem.pixels, tile.p)
    c_tiles = triton.cdiv(c, problem.blocks(tile)["BLOCK_C"])
    weights_at = 0 if owes is None else triton.cdiv(rows * 2 * c, 16) * 16
    weight, splits = None, 0
    constants = {**problem.constants(*strides), "VALUE_SLOPE": problem.out_slope, "ACCUMULATE": accumulate}
    if has_pointwise(problem):
        constants["WEIGHT"] = dweight is not None
        del constants["POOL"]
        share, splits = _split(problem.pixels, tile.p, 2 * tuning.multiprocessors(problem.device) // c_tiles)
        numbers: Size = (*strides, weights_at, *problem.sizes(), share)
        grid = (c_tiles, splits, 1)
    else:
        numbers, grid = (*strides, *problem.sizes()), (c_tiles * rows, 1, 1)
        if dweight is not None:
            weight_tile = chosen.get("backward_weight") or problem.tile("backward_weight")
            weight, splits = _backward_weight(problem, strides[:3], weights_at, weight_tile)
    function = getattr(backward, name)
    data = Launch(function, grid, numbers, tile.warps, tile.stages, **constants, **problem.blocks(tile))
    add = None
    if owes is not None or values:
        add = _add(weights_at, values, splits, rows, accumulate, owes, c, k, dweight or (0,) * 5, problem.weight[3:])
    rest = [] if accumulate else _rest(problem)
    bias = None if problem.bias is None else _bias(problem, strides[:2])
    return Backward(problem.packs, data, weight, add, (weights_at + splits * values,), rest, bias)


def _backward_weight(problem: Problem, strides: Size, weights_at: int, tile: Tile) -> tuple[Launch, int]:
    k, c = problem.weight[:2]
    blocks = problem.blocks(tile)
    n_tiles, c_tiles = triton.cdiv(problem.taps * k, tile.k), triton.cdiv(c, blocks["BLOCK_C"])
    programs = 2 * tuning.multiprocessors(problem.device) // (n_tiles * c_tiles)
    share, splits = _split(problem.pixels, tile.p, programs)
    launch = Launch(
        backward.backward_weight,
        (n_tiles, c_tiles, splits),
        (*strides, weights_at, *problem.sizes(), share),
        tile.warps,
        tile.stages,
        **problem.constants(*strides),
        VALUE_SLOPE=problem.out_slope,
        **blocks,
    )
    return launch, splits


def _bias(problem: Problem, strides: Size) -> Bias:
    """``strides`` between pixels of the gradient and of its value."""
    k = problem.weight[0]
    blocks = {"BLOCK_P": 128, "BLOCK_K": min(power(k), 32)}
    k_tiles = triton.cdiv(k, blocks["BLOCK_K"])
    share, programs = _split(problem.pixels, 128, 4 * tuning.multiprocessors(problem.device) // k_tiles)
    constants = {"VALUE_SLOPE": problem.out_slope, "ALIGN": problem.constants(*strides)["ALIGN"], **blocks}
    numbers = (*strides, problem.pixels, k, share)
    sum_gradient = Launch(biases.sum_gradient, (programs, k_tiles, 1), numbers, 8, 1, **constants)
    add = Launch(biases.add_biases, (triton.cdiv(k, 8), 1, 1), (programs, k), 4, 1, BLOCK_R=128, BLOCK_K=8)
    return Bias(sum_gradient, add, (programs, k))


def _add(
    weights_at: int,
    values: int,
    splits: int,
    rows: int,
    accumulate: bool,
    owes: Owes | None,
    c: int,
    k: int = 1,
    strides: Size = (0,) * 5,
    kernel: Size = (1, 1),
) -> Launch:
    """``strides`` are those of the weight's gradient, ``kernel`` the last two sizes of it."""
    sums = 0 if owes is None else triton.cdiv(2 * c, 8)
    owes = owes or Owes(0.0, 1, 0, (torch.float32, False, False))
    blocks = {"KH": kernel[0], "KW": kernel[1], "EPS": owes.eps, "ACCUMULATE": accumulate}
    blocks |= {"BLOCK_S": 16, "BLOCK": 256, "BLOCK_R": 512, "BLOCK_C": 8}
    grid = (triton.cdiv(values, 256) + sums, 1, 1)
    numbers = (weights_at, values, splits, rows, *strides, owes.pixels, owes.row, c, k)
    return Launch(merging.add_partials, grid, numbers, 8, 1, **blocks)


@_kept
def norm_relu_pool(
    x: Size,
    x_strides: Size,
    out: Size,
    out_strides: Size,
    eps: float,
    slope: float,
    dtypes: tuple[torch.dtype, ...],
) -> Launch:
    """``launch(x, *norm, out, None)``; ``dtypes`` of ``x`` and the norm's weight."""
    return _windows(x, pixel_stride(x, x_strides), out, pixel_stride(out, out_strides), eps, slope)


@_kept
def norm_relu_pool_backward(
    x: Size,
    x_strides: Size,
    dx_strides: Size,
    grad: Size,
    grad_strides: Size,
    owes: Owes,
    slope: float,
    dtype: torch.dtype,
    device: torch.device,
) -> PoolBackward:
    pixels, c = math.prod(x[:4]), x[4]
    window = _window(x, grad)
    blocks = _pool_blocks(c, window)
    c_tiles = triton.cdiv(c, blocks["BLOCK_C"])
    share, programs = _split(pixels, blocks["BLOCK_P"], 8 * tuning.multiprocessors(device) // c_tiles)
    strides = (pixel_stride(grad, grad_strides), pixel_stride(x, x_strides), pixel_stride(x, dx_strides))
    numbers = (*strides, pixels, *x[1:], share)
    constants = {"EPS": owes.eps, "SLOPE": slope, **window, **blocks}
    data = Launch(pooling.norm_relu_pool_backward, (programs, c_tiles, 1), numbers, 8, 1, **constants)
    look = None if grad == x else _windows(x, strides[1], grad, 0, owes.eps, slope)
    return PoolBackward(look, data, _add(0, 0, 0, programs, False, owes, c), (programs * 2 * c,))


def _windows(x: Size, x_stride: int, out: Size, out_stride: int, eps: float, slope: float) -> Launch:
    pixels, c = math.prod(out[:4]), x[4]
    window = _window(x, out)
    blocks = _pool_blocks(c, window)
    grid = (triton.cdiv(pixels, blocks["BLOCK_P"]), triton.cdiv(c, blocks["BLOCK_C"]), 1)
    numbers = (x_stride, out_stride, pixels, *x[1:])
    return Launch(pooling.norm_relu_pool, grid, numbers, 8, 1, EPS=eps, SLOPE=slope, **window, **blocks)


def _window(x: Size, out: Size) -> dict[str, int]:
    sizes = zip(("WD", "WH", "WW"), x[1:4], out[1:4], strict=True)
    return {name: 1 if size == pooled else 3 for name, size, pooled in sizes}


def _pool_blocks(channels: int, window: dict[str, int]) -> dict[str, int]:
    return {"BLOCK_P": 8 if window["WD"] > 1 else 32, "BLOCK_C": min(power(channels), 64)}


def _merge(rows: int, rows_per_image: int, row_pixels: int, pixels: int, channels: int) -> Launch:
    numbers = (rows, rows_per_image, row_pixels, pixels, channels)
    return Launch(merging.merge_moments, (triton.cdiv(channels, 8), 1, 1), numbers, 16, 1, BLOCK_R=512, BLOCK_K=8)


def _rest(problem: Problem) -> list[tuple[int, int, int]]:
    sizes = zip((1, 2, 3), problem.x[1:4], problem.window(), strict=True)
    return [(dim, size - 1, 1) for dim, size, window in sizes if window == 2 and size % 2]


def forget() -> None:
    """Drops what is kept: the tiles in use changed."""
    kernels.clear()
    for plan in (
        pack,
        place,
        place_backward,
        norm_relu_conv,
        norm_relu_conv_backward,
        norm_relu_pool,
        norm_relu_pool_backward,
    ):
        plan.cache_clear()


def _x_stride(problem: Problem) -> int:
    return pixel_stride(problem.x, problem.x_strides)


def images(shape: Size, strides: Size) -> tuple[int, int, tuple[int, int, int]] | None:
    """(images, pixels of each, strides of image, pixel and channel), or None if pixels have no single stride.

    All pixels count as one image where they have one stride.
    """
    pixels = math.prod(shape[1:4])
    step, seen = None, 1
    for dim in (3, 2, 1, 0):
        if shape[dim] == 1:
            continue
        if step is None:
            step = strides[dim]
        elif strides[dim] != step * seen:
            return None if dim > 0 else (shape[0], pixels, (strides[0], step, strides[4]))
        seen *= shape[dim]
    return 1, shape[0] * pixels, (0, step or 0, strides[4])


def _split(pixels: int, block: int, programs: int) -> tuple[int, int]:
    """Tiles of each program, and the number of programs: at most ``programs`` where that is at least 1."""
    all_tiles = triton.cdiv(pixels, block)
    tiles = triton.cdiv(all_tiles, max(1, programs))
    return tiles, triton.cdiv(all_tiles, tiles)
