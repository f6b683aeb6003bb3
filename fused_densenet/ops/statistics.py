"""Batch statistics of feature maps: taken in one pass, or known from the dense block that wrote them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.contract import accumulate_dtype
from .layout import pixels_last
from .operator import is_plain, records
from .ranks import merge_moments


class BatchStatistics(NamedTuple):
    """Of every channel of a tensor, over the ranks of ``group`` (a process group's name) where there is one.

    Attributes:
        moments: ``(2, C)``, mean and biased variance; float32 (float64 for float64).
        pixels: ``(1,)``, how many values of a channel they are of; None where they are those of the tensor itself.
    """

    moments: Tensor
    pixels: Tensor | None
    group: str | None


class BatchMoments(NamedTuple):
    """Of what the norms of a block read.

    Attributes:
        stats: ``(2, C)``, mean and biased variance of the buffer's channels, of which a norm reads the first.
        bottleneck_stats: ``(2, layers, width)``, of the bottlenecks, which every second norm reads; None without any.
        pixels: as :class:`BatchStatistics` has them.
        group: as :class:`BatchStatistics` has it.
        from_end: whether norms read the last channels of the buffer, not the first.
    """

    stats: Tensor
    bottleneck_stats: Tensor | None
    pixels: Tensor | None
    group: str | None = None
    from_end: bool = False

    def of(self, i: int, channels: int) -> Tensor:
        """``(2, channels)``, mean and variance of what norm ``i`` in the order of execution reads."""
        if self.bottleneck_stats is not None and i % 2 == 1:
            return self.bottleneck_stats[:, i // 2, :channels]
        return self.stats[:, -channels:] if self.from_end and channels else self.stats[:, :channels]

    def result(self, first: int = 0) -> BatchStatistics:
        """The statistics of the buffer's channels from ``first`` on."""
        return BatchStatistics(self.stats[:, first:].contiguous() if first else self.stats, self.pixels, self.group)


def statistics_of(x: Tensor, backend: str, group: str | None, known: BatchStatistics | None = None) -> BatchStatistics:
    """The statistics of ``x`` ``(N, C, *spatial)``: those that are ``known``, if they are of ``group``, or taken."""
    if known is not None and known.group == group:
        return known
    moments, *pixels = (take_moments if is_plain(x) else channel_moments)(x.detach(), backend, group)
    return BatchStatistics(moments, pixels[0] if pixels else None, group)


def moments_of(
    statistics: BatchStatistics | None, running_mean: Tensor | None, running_var: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Mean and variance to normalise by, the batch's where there are such, and how many values they are of.

    Running statistics are copied where there may be a backward pass, before which a later step may change them.
    """
    if statistics is not None:
        return list(statistics.moments.unbind()), statistics.pixels
    assert running_mean is not None and running_var is not None
    running = [t.to(accumulate_dtype(t.dtype)).contiguous() for t in (running_mean, running_var)]
    return (list(torch.stack(running).unbind()) if records() else running), None


def take_moments(x: Tensor, backend: str, group: str | None) -> list[Tensor]:
    """Mean and biased variance ``(2, C)``, and with a group how many values they are of, ``(1,)``."""
    moments, *pixels = results = _allocate(x, backend, group)
    BACKENDS[backend].place(pixels_last(x), None, moments[0], moments[1])
    if group is not None:
        merge_moments(moments[0], moments[1], x.numel() // x.shape[1], pixels[0], group)
    return results


channel_moments = torch.library.custom_op("fused_densenet::channel_moments", take_moments, mutates_args=())
"""The same as an operator, for what records or counts operators."""


@channel_moments.register_fake
def _allocate(x: Tensor, backend: str, group: str | None) -> list[Tensor]:
    dtype = accumulate_dtype(x.dtype)
    moments = x.new_empty((2, x.shape[1]), dtype=dtype)
    return [moments] if group is None else [moments, x.new_empty(1, dtype=dtype)]
