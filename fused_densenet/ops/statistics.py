"""Batch statistics of feature maps: taken in one pass, or left by the dense block that wrote the feature maps."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..backends import BACKENDS
from ..backends.contract import accumulate_dtype
from .ranks import merge_moments
from .schedule import pixels_last


class BatchStatistics(NamedTuple):
    """Of every channel of a tensor, over the ranks of ``group`` (a process group's name) where there is one.

    Attributes:
        moments: ``(2, C)``, mean and biased variance; float32 (float64 for float64).
        pixels: ``(1,)``, how many values of a channel they are of.
    """

    moments: Tensor
    pixels: Tensor
    group: str | None


# What is known of a tensor, and the version at which it was; forgotten with the tensor. The tensor itself carries
# nothing, so that saving or copying it takes nothing along.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember(x: Tensor, statistics: BatchStatistics) -> None:
    """Leaves ``x``'s statistics for the module that reads it next."""
    if not torch.compiler.is_compiling() and not x.is_inference():
        _known[x] = (x._version, statistics)


def statistics_of(x: Tensor, backend: str, group: str | None) -> BatchStatistics:
    """The statistics of ``x`` ``(N, C, *spatial)``, known or taken."""
    if not torch.compiler.is_compiling() and x in _known:
        version, statistics = _known[x]
        if version == x._version and statistics.group == group:
            return statistics
    moments, pixels = channel_moments(x.detach(), backend, group)
    return BatchStatistics(moments, pixels, group)


def frozen_statistics(mean: Tensor | None, var: Tensor | None) -> BatchStatistics:
    """Running statistics, copied: a later training step may change them before this one's backward pass."""
    assert mean is not None and var is not None
    moments = torch.stack([mean, var]).to(accumulate_dtype(mean.dtype))
    return BatchStatistics(moments, moments.new_ones(1), None)


@torch.library.custom_op("fused_densenet::channel_moments", mutates_args=())
def channel_moments(x: Tensor, backend: str, group: str | None) -> tuple[Tensor, Tensor]:
    """Returns the first two fields of :class:`BatchStatistics`."""
    moments, pixels = _allocate(x)
    local = x.numel() // x.shape[1]
    pixels.fill_(local)
    BACKENDS[backend].place(pixels_last(x), None, moments[0], moments[1])
    if group is not None:
        merge_moments(moments[0], moments[1], local, pixels, group)
    return moments, pixels


@channel_moments.register_fake
def _allocate(x: Tensor, backend: str = "", group: str | None = None) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    return x.new_empty((2, x.shape[1]), dtype=dtype), x.new_empty(1, dtype=dtype)
