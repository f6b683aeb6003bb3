"""A norm and a gradient as Triton's kernels take them: finished affine maps."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Gradient, Norm


class Affine(NamedTuple):
    """``(x - mean) * scale + shift``."""

    mean: Tensor
    scale: Tensor
    shift: Tensor


class Loaded(NamedTuple):
    """``g = scale * stored + (slope * (value - mean) + offset)``."""

    stored: Tensor
    value: Tensor
    scale: Tensor
    slope: Tensor
    mean: Tensor
    offset: Tensor


def affine(norm: Norm) -> Affine:
    rstd = torch.rsqrt(norm.var + norm.eps)
    bias = norm.bias if norm.bias.dtype is rstd.dtype else norm.bias.to(rstd.dtype)
    return Affine(norm.mean, rstd.mul_(norm.weight), bias)


def loaded(grad: Gradient) -> Loaded:
    zeros, ones = _constants(grad.stored.shape[-1], grad.stored.device)
    if grad.value is None or grad.mean is None or grad.correction is None:
        return Loaded(grad.stored, grad.stored, ones, zeros, zeros, zeros)
    offset, slope = grad.correction.unbind()
    return Loaded(grad.stored, grad.value, ones, slope, grad.mean, offset)


@functools.lru_cache(maxsize=1024)
def _constants(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels, device=device), torch.ones(channels, device=device)
