"""Which backend runs a primitive where the ``cuda`` backend was chosen: a table that measurements change.

A row is a class of calls: the primitive, the convolution's kernel, and whether the image has few pixels or many. It
names backends in the order of preference; the first that can run is taken.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from . import eager, triton


class ShapeClass(NamedTuple):
    """``kernel`` is one of :data:`KERNELS` ("" for a primitive that has none), ``pixels`` one of :data:`PIXELS`."""

    primitive: str
    kernel: str
    pixels: str


FEW = 2**14
"""Pixels of the batch below which an image counts as "few": too few tiles for a large GPU."""

MOST_HALO = 200
"""Pixels of eight neighbours' halo that fit the shared memory of every GPU; a kernel with more is "large"."""

PIXELS = ("few", "many")
KERNELS = {
    "place": ("",),
    "place_backward": ("",),
    "norm_relu_conv": ("1x1", "pooled 1x1", "3", "other", "large"),
    "norm_relu_conv_backward": ("1x1", "pooled 1x1", "3", "other", "large"),
    "norm_relu_pool": ("",),
    "norm_relu_pool_backward": ("",),
}

TABLE: dict[ShapeClass, tuple[str, ...]] = {
    ShapeClass(primitive, kernel, pixels): ("triton", "eager") if kernel == "large" else ("cuda", "triton", "eager")
    for primitive, kernels in KERNELS.items()
    for kernel in kernels
    for pixels in PIXELS
}
"""The order of preference of every class."""


@contextlib.contextmanager
def preferring(rows: Mapping[ShapeClass, tuple[str, ...]]) -> Iterator[None]:
    """Other rows of :data:`TABLE` for as long as the context lasts, for all threads.

    Raises:
        ValueError: there is no such class or backend.
    """
    for shape_class, names in rows.items():
        if shape_class not in TABLE:
            raise ValueError(f"rows: expected classes of choice.TABLE, got {shape_class}")
        if not names or not set(names) <= {"cuda", "triton", "eager"}:
            raise ValueError(f"rows: expected one or more of cuda, triton, eager for {shape_class}, got {names}")
    before = dict(TABLE)
    TABLE.update(rows)
    _forget()
    try:
        yield
    finally:
        TABLE.update(before)
        _forget()


def _forget() -> None:
    _preferred.cache_clear()
    only_cuda.cache_clear()


def classify(
    primitive: str, image: tuple[int, ...], weight: tuple[int, ...] = (), result: tuple[int, ...] = ()
) -> ShapeClass:
    """The class of a call, by the shapes of the contract: ``x`` (or the image placed), ``weight``, ``out`` (or grad)."""
    pixels = PIXELS[image[0] * image[1] * image[2] * image[3] >= FEW]
    return ShapeClass(primitive, _kernel(weight[2:], image[:4] != result[:4]), pixels)


def _kernel(sizes: tuple[int, ...], pools: bool = False) -> str:
    """One of :data:`KERNELS`."""
    if not sizes:
        return ""
    largest = max(sizes)
    if largest == 1:
        return "pooled 1x1" if pools else "1x1"
    if largest <= 3:
        return "3"
    *outer, innermost = sizes
    return "other" if math.prod(outer) * (innermost + 7) <= MOST_HALO else "large"


def backend(
    device: torch.device,
    dtype: torch.dtype,
    primitive: str,
    image: tuple[int, ...],
    weight: tuple[int, ...] = (),
    result: tuple[int, ...] = (),
) -> str:
    """The name of the backend that runs a call on ``device``, for which ``cuda`` was chosen."""
    return _preferred(device, dtype, classify(primitive, image, weight, result))


@functools.cache
def only_cuda(
    device: torch.device, dtype: torch.dtype, many: bool, kinds: frozenset[tuple[str, tuple[int, ...], bool]]
) -> bool:
    """Whether ``cuda`` runs all of a program's calls: functions with kernel sizes and pooling, of images of few pixels or ``many``."""
    classes = [ShapeClass(function, _kernel(sizes, pools), PIXELS[many]) for function, sizes, pools in kinds]
    return all(_preferred(device, dtype, shape_class) == "cuda" for shape_class in classes)


@functools.cache
def _preferred(device: torch.device, dtype: torch.dtype, shape_class: ShapeClass) -> str:
    """Kept by class and not by shape, of which there is no end where images differ in size."""
    others = {"triton": triton, "eager": eager}
    names = TABLE[shape_class]
    return next((n for n in names if n == "cuda" or others[n].unavailable(device, dtype) is None), "eager")


def report() -> list[str]:
    """The table as lines, rows that agree for few and many pixels together."""
    lines = []
    for primitive, kernels in KERNELS.items():
        for kernel in kernels:
            rows = {pixels: ", ".join(TABLE[ShapeClass(primitive, kernel, pixels)]) for pixels in PIXELS}
            label = f"{primitive} {kernel}".rstrip()
            if rows["few"] == rows["many"]:
                lines.append(f"{label}: {rows['few']}")
            else:
                lines += [f"{label}, {pixels} pixels: {names}" for pixels, names in rows.items()]
    return lines
