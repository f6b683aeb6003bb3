"""A convolution as the plans know it: shapes, strides, types, and what follows from them for every kernel."""

import math
from typing import Any, NamedTuple

import torch
import triton

from . import tuning
from .tiles_on_disk import Tile
from .tuning import ShapeClass

Size = tuple[int, ...]


class Problem(NamedTuple):
    """A convolution: everything that decides its kernels but for their tiles.

    Attributes:
        x, out, weight: shapes; ``out`` is the gradient's in backward, and says whether to pool.
        arithmetic: as in :class:`tuning.ShapeClass`.
        address: the low four bits that any address of ``x``, ``out`` and, in backward, ``value`` and ``dx`` has.
        eps, norm_dtype: the norm's, and the dtype of its weight and bias; ``norm_dtype`` is None where there is none.
        slope: of the activation of ``x``, 1 where there is no norm.
        out_slope: of the activation behind the convolution.
        bias: its dtype, or that of its gradient; None without one.
    """

    x: Size
    x_strides: Size
    out: Size
    out_strides: Size
    weight: Size
    weight_strides: Size
    dtype: torch.dtype
    weight_dtype: torch.dtype
    arithmetic: str
    address: int
    device: torch.device
    eps: float = 1e-5
    norm_dtype: torch.dtype | None = torch.float32
    slope: float = 0.0
    out_slope: float = 1.0
    bias: torch.dtype | None = None

    @property
    def pixels(self) -> int:
        """Of the output."""
        return math.prod(self.out[:4])

    @property
    def pool(self) -> bool:
        return self.out[1:4] != self.x[1:4]

    @property
    def taps(self) -> int:
        return math.prod(self.weight[2:])

    def window(self) -> Size:
        return tuple(1 if out == size else 2 for out, size in zip(self.out[1:4], self.x[1:4], strict=True))

    def sizes(self) -> Size:
        return (self.pixels, *self.x[1:4], self.weight[1], self.weight[0])

    def shape_class(self, kernel: str) -> ShapeClass:
        k, c = self.weight[:2]
        rows = k * self.taps if kernel == "backward_weight" else k
        pixels = 4 ** math.ceil(math.log(max(self.pixels, 1), 4))
        return ShapeClass(kernel, self.arithmetic, power(rows), self.taps, power(c), pixels, self.pool)

    def tile(self, kernel: str) -> Tile:
        return tuning.tile(self.shape_class(kernel), self.device, self.pixels)

    def constants(self, *pixel_strides: int) -> dict[str, Any]:
        """``pixel_strides`` are those of all tensors that the kernel loads and stores."""
        kd, kh, kw = self.window() if self.pool else self.weight[2:]
        size = self.dtype.itemsize
        divided = [size * number for number in (*pixel_strides, *self.weight[:2])]
        align = math.gcd(16, self.address, *divided) // size
        sizes = {"EPS": self.eps, "KD": kd, "KH": kh, "KW": kw, "POOL": self.pool}
        return {**sizes, "SLOPE": self.slope, "PRECISION": self.precision, "ALIGN": align}

    @property
    def precision(self) -> str:
        return "tf32" if self.arithmetic == "tf32" else "ieee"

    def blocks(self, tile: Tile) -> dict[str, Any]:
        return {"BLOCK_P": tile.p, "BLOCK_C": min(tile.c, power(self.weight[1])), "BLOCK_K": tile.k}

    @property
    def packs(self) -> bool:
        """Whether the weight must be packed first."""
        return must_be_packed(
            self.weight, self.weight_strides, self.weight_dtype, self.dtype, self.arithmetic == "tf32"
        )


def must_be_packed(weight: Size, strides: Size, weight_dtype: torch.dtype, dtype: torch.dtype, tf32: bool) -> bool:
    """A weight of such shape and strides for data of ``dtype``; others lie as the products load them."""
    c = weight[1]
    as_it_is = weight_dtype == dtype and not tf32 and math.prod(weight[2:]) == 1
    return not (as_it_is and c % 16 == 0 and strides[:2] == (c, 1))


def power(size: int) -> int:
    """The next power of two, at least 16, the least side of a matrix product's tile."""
    return max(16, triton.next_power_of_2(size))


def pixel_stride(shape: Size, strides: Size) -> int:
    """The stride between neighbouring pixels of ``(N, D, H, W, C)``."""
    for dim in (3, 2, 1, 0):
        if shape[dim] > 1:
            return strides[dim]
    return shape[4]
