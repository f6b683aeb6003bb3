"""Channels-last memory: how images and weights are laid out, and seen by the backends."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import extension
from .operator import is_batched, is_plain

_LARGE = 8 << 20
"""Bytes: of what is smaller, malloc keeps most itself."""


def pixels_last(x: Tensor) -> Tensor:
    """``(N, C, *spatial)`` seen as ``(N, D, H, W, C)``, missing sizes equal to 1."""
    while x.dim() < 5:
        x = x.unsqueeze(2)
    return x.permute(0, 2, 3, 4, 1)


def weight_5d(weight: Tensor) -> Tensor:
    """``(K, C, *kernel)`` seen as ``(K, C, kd, kh, kw)``, missing sizes equal to 1."""
    while weight.dim() < 5:
        weight = weight.unsqueeze(2)
    return weight


def channels_last(x: Tensor) -> Tensor:
    """``x`` ``(N, C, *spatial)``, or a copy where it is not laid out as the backends' contract wants it."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    sizes, steps = (x.shape[0], *x.shape[2:]), (x.stride(0), *x.stride()[2:])
    longer = [(size, step) for size, step in zip(sizes, steps, strict=True) if size > 1]
    one_stride = all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(longer))
    wide = all(step >= x.shape[1] for _, step in longer)
    if one_stride and wide and (x.stride(1) == 1 or x.shape[1] == 1):
        return x
    return empty_channels_last(x.shape, x.shape[1], x).copy_(x)


def empty(size: Sequence[int], stride: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised, of the dtype and device of ``like``: on the CPU, what is large in pages that others gave back (``csrc/pages.h``)."""
    plain = like.device.type == "cpu" and extension.cpu is not None and is_plain(like) and not is_batched(like)
    if plain and math.prod(size) * like.itemsize >= _LARGE:  # of symbolic sizes nothing is asked
        return torch.ops.fused_densenet.empty_pages.default(size, stride, like.dtype)
    return torch.empty_strided(size, stride, dtype=like.dtype, device=like.device)


def empty_channels_last(shape: Sequence[int], pixel_stride: int, like: Tensor) -> Tensor:
    """Uninitialised, of the dtype and device of ``like``."""
    return empty(tuple(shape), strides_of(shape, pixel_stride), like)


def empty_images(count: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised: so many images ``(N, C, *spatial)`` as one tensor ``(count, N, D, H, W, C)``, missing sizes equal to 1."""
    batch, channels, *spatial = shape
    sizes = count, batch, *[1] * (3 - len(spatial)), *spatial, channels
    return empty(sizes, [math.prod(sizes[i + 1 :]) for i in range(len(sizes))], like)


def empty_like(tensors: list[Tensor]) -> list[Tensor]:
    """Uninitialised, each laid out like its tensor; of plain tensors on one device, which nothing looks at."""
    if tensors and tensors[0].device.type == "cpu" and extension.cpu is not None:
        return torch.ops.fused_densenet.empty_like.default(tensors)
    return [torch.empty_like(t) for t in tensors]


def strides_of(shape: Sequence[int], pixel_stride: int) -> list[int]:
    """Of ``(N, C, *spatial)``, channels-last, with so many entries from one pixel to the next."""
    strides = [0, 1, *[0] * (len(shape) - 2)]
    step = pixel_stride
    for dim in reversed(range(2, len(shape))):
        strides[dim] = step
        step = step * shape[dim]
    strides[0] = step
    return strides
