"""A gradient as Triton's kernels take it: a finished affine map."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Gradient


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


@functools.lru_cache(maxsize=1024)
def _constants(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels, device=device), torch.ones(channels, device=device)
