"""``dense_block``: the fused block on plain tensors; picks the backend and the mode, and draws dropout's masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose
from ..backends.contract import accumulate_dtype
from .block import Arguments, block
from .statistics import BatchMoments


@dataclass
class NormReluConv:
    """One norm-relu-conv: parameters and constants, as ``nn.BatchNorm`` and ``nn.Conv`` hold them.

    ``running_mean`` and ``running_var`` are needed, and read, only where ``batch_stats`` is False.
    """

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    batch_stats: bool


def dense_block(
    x: Tensor,
    convolutions: Sequence[NormReluConv],
    *,
    bottleneck: bool,
    drop_rate: float = 0.0,
    drop_channels: bool = False,
    memory_efficient: bool = False,
    group: str | None = None,
) -> tuple[Tensor, BatchMoments | None]:
    """A dense block: every layer reads the concatenation of ``x`` and all earlier layers' outputs.

    ``x_{l+1} = [x_l, conv(relu(bn(x_l)))]`` (arXiv 1608.06993, equation 2), with a second BN-ReLU-conv inside where
    ``bottleneck``.

    Args:
        x: ``(N, C_0, *spatial)``, 1 to 3 spatial dimensions, any strides; float32, bfloat16, float16 or float64.
        convolutions: one per layer, or two per layer where ``bottleneck`` (1x1, then the growth convolution). Their
            weights are in the dtype of ``x`` or float32.
        drop_rate: dropout of each layer's new feature maps; draws what ``F.dropout`` draws for their shape.
        drop_channels: drop whole feature maps, as ``F.dropout2d`` draws them.
        memory_efficient: compute the bottleneck again in backward instead of keeping it.
        group: name of the process group over whose ranks batch statistics are taken; None for this process alone.

    Returns:
        ``(N, C_0 + layers * growth_rate, *spatial)``, channels-last, in the dtype of ``x``; and the batch moments,
        float32 (float64 for float64), from which running statistics are updated, or None where no norm takes any.

    Raises:
        RuntimeError: the backend that was asked for cannot run on this device or dtype.
    """
    running = [t for c in convolutions if not c.batch_stats for t in (c.running_mean, c.running_var) if t is not None]
    parameters = Parameters(
        [c.weight for c in convolutions], [c.gamma for c in convolutions], [c.beta for c in convolutions], running
    )
    constants = [c.eps for c in convolutions], [c.batch_stats for c in convolutions]
    return run_block(
        x, parameters, *constants, 2 if bottleneck else 1, drop_rate, drop_channels, memory_efficient, group
    )


class Parameters(NamedTuple):
    """Of norm-relu-convs in the order of execution; ``running`` is (mean, variance) of the norms that use them."""

    weights: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    running: list[Tensor]


def run_block(
    x: Tensor,
    parameters: Parameters,
    eps: list[float],
    batch_stats: list[bool],
    per_layer: int,
    drop_rate: float,
    drop_channels: bool,
    memory_efficient: bool,
    group: str | None,
    drop_layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, BatchMoments | None]:
    """:func:`dense_block` of lists with an entry for each norm-relu-conv.

    Dropout draws in the order of memory: ``drop_layout`` is that of the feature maps that it would see.
    """
    weights, gammas, betas, running = parameters
    keep = None
    if drop_rate > 0:
        keep = _draw_masks(x, weights[per_layer - 1 :: per_layer], drop_rate, drop_channels, drop_layout)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *gammas, *betas))
    dtype = accumulate_dtype(x.dtype)
    if differentiable:
        running = [t.clone() for t in running]  # a later training step may update them before this one's backward
    outputs = block(
        Arguments(
            x,
            weights,
            [t if t.is_contiguous() else t.contiguous() for t in gammas],
            [t if t.is_contiguous() else t.contiguous() for t in betas],
            [t if t.dtype == dtype else t.to(dtype) for t in running],
            keep,
            eps,
            batch_stats,
            per_layer,
            1 / (1 - drop_rate) if drop_rate < 1 else 0.0,
            per_layer == 2 and differentiable and not memory_efficient,
            choose(x.device, x.dtype) if x.numel() else "eager",
            group,
        )
    )
    if not any(batch_stats):
        return outputs.out, None
    stats, bottleneck_stats, *pixels = outputs.constants
    inside = bottleneck_stats if per_layer == 2 else None
    return outputs.out, BatchMoments(stats, inside, pixels[0] if pixels else None, group)


def _draw_masks(
    x: Tensor, growth_weights: Sequence[Tensor], drop_rate: float, drop_channels: bool, layout: torch.memory_format
) -> Tensor:
    draw = torch.feature_dropout if drop_channels else F.dropout
    masks = []
    for weight in growth_weights:
        sizes = (x.shape[0], weight.shape[0], *x.shape[2:])
        ones = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout).fill_(1)
        masks.append(draw(ones, drop_rate, True) != 0)
    return torch.cat(masks, dim=1)
