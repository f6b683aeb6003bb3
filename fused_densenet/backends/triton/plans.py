"""Which kernel with which tile and grid serves a shape; worked out once per shape and kept.

Sums are never added where they arise: every tile of pixels leaves its moments or sums in a row of a workspace, and the
weight gradient's pixels are split between a few programs per multiprocessor, each with a share in a workspace. Both are
added in a fixed order.
"""

import functools
from typing import NamedTuple

import torch
import triton

from . import backward, forward, placement, tuning
from .launch import Grid, Kernel
from .tuning import ShapeClass, Tile

Size = tuple[int, ...]
_kept = functools.lru_cache(maxsize=4096)


class Plan(NamedTuple):
    """``sizes`` are the kernel's last arguments; ``rows`` its tiles of pixels, ``splits`` the shares of the weight
    gradient."""

    kernel: Kernel
    grid: Grid
    sizes: Size
    rows: int
    splits: int = 0


@_kept
def place(images: int, pixels: int, channels: int, moments: bool) -> Plan:
    block_p, block_c = 128, min(_power(channels), 32)
    tiles = triton.cdiv(pixels, block_p)
    kernel = Kernel(placement.place, 8, 1, MOMENTS=moments, BLOCK_P=block_p, BLOCK_C=block_c)
    return Plan(kernel, (images * tiles, triton.cdiv(channels, block_c), 1), (pixels, channels, tiles), images * tiles)


@_kept
def place_backward(images: int, pixels: int, channels: int) -> Plan:
    block_p, block_c = 128, min(_power(channels), 32)
    tiles = triton.cdiv(pixels, block_p)
    kernel = Kernel(placement.place_backward, 8, 1, BLOCK_P=block_p, BLOCK_C=block_c)
    return Plan(kernel, (images * tiles, triton.cdiv(channels, block_c), 1), (pixels, channels, tiles), images * tiles)


@_kept
def merge_moments(channels: int) -> tuple[Kernel, Grid]:
    kernel = Kernel(forward.merge_moments, 8, 1, BLOCK_R=512, BLOCK_K=8)
    return kernel, (triton.cdiv(channels, 8), 1, 1)


@_kept
def add_partials(weight: Size, weight_needed: bool) -> tuple[Kernel, Grid]:
    block, values, channels = 256, weight[0] * taps(weight) * weight[1] if weight_needed else 0, weight[1]
    blocks = {"BLOCK_S": 16, "BLOCK": block, "BLOCK_R": 512, "BLOCK_C": 8}
    kernel = Kernel(backward.add_partials, 8, 1, KH=weight[3], KW=weight[4], **blocks)
    return kernel, (triton.cdiv(values, block) + triton.cdiv(2 * channels, 8), 1, 1)


@_kept
def norm_relu_conv(
    x: Size, weight: Size, arithmetic: str, moments: bool, device: torch.device, tile: Tile | None = None
) -> Plan:
    """Here and below ``tile`` is None for the one in use, and ``arithmetic`` that of :class:`tuning.ShapeClass`."""
    tile = tile or tuning.tile(shape_class("norm_relu_conv", weight, arithmetic), device)
    k_tiles = triton.cdiv(weight[0], tile.k)
    constants = {**_convolution(weight, arithmetic), "MOMENTS": moments, **_blocks(tile, weight)}
    kernel = Kernel(forward.norm_relu_conv, tile.warps, tile.stages, **constants)
    rows = triton.cdiv(_pixels(x), tile.p)
    return Plan(kernel, (k_tiles, rows, 1), _sizes(x, weight), rows)


def has_pointwise(weight: Size, arithmetic: str) -> bool:
    """Whether one kernel does the whole backward of the convolution."""
    return taps(weight) == 1 and weight[0] <= 256 and arithmetic != "ieee"


@_kept
def backward_pointwise(
    x: Size,
    weight: Size,
    arithmetic: str,
    accumulate: bool,
    weight_needed: bool,
    device: torch.device,
    tile: Tile | None = None,
) -> Plan:
    tile = tile or tuning.tile(shape_class("backward_pointwise", weight, arithmetic), device)
    flags = {"PRECISION": _precision(arithmetic), "ACCUMULATE": accumulate, "WEIGHT": weight_needed}
    constants = {**flags, **_blocks(tile, weight)}
    kernel = Kernel(backward.backward_pointwise, tile.warps, tile.stages, **constants)
    c_tiles = triton.cdiv(weight[1], constants["BLOCK_C"])
    tiles, splits = _split(_pixels(x), tile.p, 2 * tuning.multiprocessors(device) // c_tiles)
    rows = triton.cdiv(_pixels(x), tile.p)
    return Plan(kernel, (c_tiles, splits, 1), (*_sizes(x, weight), tiles), rows, splits)


@_kept
def backward_data(
    x: Size, weight: Size, arithmetic: str, accumulate: bool, device: torch.device, tile: Tile | None = None
) -> Plan:
    tile = tile or tuning.tile(shape_class("backward_data", weight, arithmetic), device)
    constants = {**_convolution(weight, arithmetic), "ACCUMULATE": accumulate, **_blocks(tile, weight)}
    kernel = Kernel(backward.backward_data, tile.warps, tile.stages, **constants)
    c_tiles = triton.cdiv(weight[1], constants["BLOCK_C"])
    rows = triton.cdiv(_pixels(x), tile.p)
    return Plan(kernel, (c_tiles, rows, 1), _sizes(x, weight), rows)


@_kept
def backward_weight(x: Size, weight: Size, arithmetic: str, device: torch.device, tile: Tile | None = None) -> Plan:
    tile = tile or tuning.tile(shape_class("backward_weight", weight, arithmetic), device)
    constants = {**_convolution(weight, arithmetic), **_blocks(tile, weight)}
    kernel = Kernel(backward.backward_weight, tile.warps, tile.stages, **constants)
    n_tiles, c_tiles = triton.cdiv(taps(weight) * weight[0], tile.k), triton.cdiv(weight[1], constants["BLOCK_C"])
    tiles, splits = _split(_pixels(x), tile.p, 2 * tuning.multiprocessors(device) // (n_tiles * c_tiles))
    return Plan(kernel, (n_tiles, c_tiles, splits), (*_sizes(x, weight), tiles), 0, splits)


def shape_class(kernel: str, weight: Size, arithmetic: str) -> ShapeClass:
    if kernel == "backward_weight":
        return ShapeClass(kernel, arithmetic, max(64, _power(weight[0] * taps(weight))), taps(weight))
    return ShapeClass(kernel, arithmetic, _power(weight[0]), taps(weight))


def taps(weight: Size) -> int:
    return weight[2] * weight[3] * weight[4]


def forget() -> None:
    """Drops what is kept: the tiles in use changed."""
    for plan in (norm_relu_conv, backward_pointwise, backward_data, backward_weight):
        plan.cache_clear()


def _convolution(weight: Size, arithmetic: str) -> dict[str, int | str]:
    return {"KD": weight[2], "KH": weight[3], "KW": weight[4], "PRECISION": _precision(arithmetic)}


def _precision(arithmetic: str) -> str:
    return "tf32" if arithmetic == "tf32" else "ieee"


def _blocks(tile: Tile, weight: Size) -> dict[str, int]:
    return {"BLOCK_P": tile.p, "BLOCK_C": min(tile.c, _power(weight[1])), "BLOCK_K": tile.k}


def _power(size: int) -> int:
    """The next power of two, at least 16, the least side of a matrix product's tile."""
    return max(16, triton.next_power_of_2(size))


def _pixels(x: Size) -> int:
    return x[0] * x[1] * x[2] * x[3]


def _sizes(x: Size, weight: Size) -> Size:
    return (_pixels(x), x[1], x[2], x[3], weight[1], weight[0])


def _split(pixels: int, block: int, programs: int) -> tuple[int, int]:
    """Tiles of each program, and the number of programs: at most ``programs`` where that is at least 1."""
    all_tiles = triton.cdiv(pixels, block)
    tiles = triton.cdiv(all_tiles, max(1, programs))
    return tiles, triton.cdiv(all_tiles, tiles)
