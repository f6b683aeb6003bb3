"""For kernels that take a norm as one affine map and return raw sums: what the contract asks for around them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Gradient, Norm, Owed


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
    dtype = norm.var.dtype
    return Affine(norm.mean, norm.weight.to(dtype) * torch.rsqrt(norm.var + norm.eps), norm.bias.to(dtype))


def loaded(grad: Gradient) -> Loaded:
    channels, device = grad.stored.shape[-1], grad.stored.device
    ones = torch.ones(channels, device=device)
    if grad.value is None or grad.mean is None or grad.correction is None:
        zeros = torch.zeros(channels, device=device)
        return Loaded(grad.stored, grad.stored, ones, zeros, zeros, zeros)
    return Loaded(grad.stored, grad.value, ones, grad.correction[1], grad.mean, grad.correction[0])


def settle(sums: Tensor, x: Tensor, norm: Norm, dx: Tensor, accumulate: bool, owed: Owed) -> None:
    """``sums`` ``(2, C)`` of ``dz`` and ``dz * (x - mean)`` to what the norm is owed; ``dx`` holds ``dz`` unless accumulated."""
    rstd = torch.rsqrt(norm.var + norm.eps)
    scale = affine(norm).scale
    if not accumulate:
        dx *= scale.to(dx.dtype) if dx.dtype == torch.float64 else scale
    owed.dbias.copy_(sums[0])
    owed.dweight.copy_(sums[1] * rstd)
    if owed.correction is not None:
        pixels = x.numel() // x.shape[-1] if owed.pixels is None else owed.pixels
        both = torch.stack([sums[0], sums[1] * rstd * rstd]) * (scale / -pixels)
        owed.correction.copy_(owed.correction + both if accumulate else both)
