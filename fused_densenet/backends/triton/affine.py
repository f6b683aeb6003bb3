"""A gradient as Triton's kernels take it: a finished affine map."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Gradient
from .constants import constant


class Loaded(NamedTuple):
    """``g = scale * stored + (slope * (value - mean) + offset)``, or by the sign of ``value``, which a launch knows."""

    stored: Tensor
    value: Tensor
    scale: Tensor
    slope: Tensor
    mean: Tensor
    offset: Tensor


def loaded(grad: Gradient) -> Loaded:
    zeros, ones = _constants(grad.stored.shape[-1], grad.stored.device)
    if grad.value is None or grad.mean is None or grad.correction is None:
        value = grad.stored if grad.value is None else grad.value
        return Loaded(grad.stored, value, ones, zeros, zeros, zeros)
    offset, slope = grad.correction.unbind()
    return Loaded(grad.stored, grad.value, ones, slope, grad.mean, offset)


@functools.cache
def _constants(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    zeros, ones = (constant([number] * channels, torch.float32, device) for number in (0.0, 1.0))
    return zeros, ones
