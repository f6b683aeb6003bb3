"""torch's own SyncBatchNorm on the CPU: the five kernels that it has for GPUs only, in plain operators."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fused_densenet.fallback.anatomy import remember_methods

_PIXELS = (0, 2, 3)


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, _PIXELS, correction=0)
    return mean, torch.rsqrt(var + eps)


def _gather(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    share = (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    var = (share * (1 / invstds**2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
    return mean, torch.rsqrt(var + eps)


def _elementwise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    return (x - _by_channel(mean)) * _by_channel(invstd * weight) + _by_channel(bias)


def _backward_reduce(g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *_: bool) -> tuple[Any, ...]:
    sum_dy, sum_dy_xmu = g.sum(_PIXELS), (g * (x - _by_channel(mean))).sum(_PIXELS)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def _backward_elementwise(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    centered = (x - _by_channel(mean)) * _by_channel(invstd**2 * sum_dy_xmu / counts.sum())
    return (g - _by_channel(sum_dy / counts.sum()) - centered) * _by_channel(invstd * weight)


_whole_forward = nn.SyncBatchNorm.forward


def _forward(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    with mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu"):
        return _whole_forward(norm, x)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, ``torch.nn.SyncBatchNorm`` accepts images on the CPU; what it sends, and when, is its own code."""
    kernels = {
        "batch_norm_stats": _stats,
        "batch_norm_gather_stats_with_counts": _gather,
        "batch_norm_elemt": _elementwise,
        "batch_norm_backward_reduce": _backward_reduce,
        "batch_norm_backward_elemt": _backward_elementwise,
    }
    with contextlib.ExitStack() as stack:
        for name, kernel in kernels.items():
            stack.enter_context(mock.patch.object(torch, name, kernel))
        stack.callback(remember_methods, nn.SyncBatchNorm)
        stack.enter_context(mock.patch.object(nn.SyncBatchNorm, "forward", _forward))
        remember_methods(nn.SyncBatchNorm)
        yield
