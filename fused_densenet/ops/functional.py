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

    ``running_mean`` and ``running_var`` are needed, and read, only where ``batch_stats`` is False. ``slope`` is the
    activation's for negative numbers, from 0 to 1.
    """

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    batch_stats: bool
    bias: Tensor | None = None
    slope: float = 0.0


def dense_block(
    x: Tensor,
    convolutions: Sequence[NormReluConv],
    *,
    bottleneck: bool,
    drop_rate: float = 0.0,
    drop_inside: float = 0.0,
    drop_channels: bool = False,
    prepend: bool = False,
    memory_efficient: bool = False,
    group: str | None = None,
) -> tuple[Tensor, BatchMoments | None]:
    """A dense block: every layer reads the concatenation of ``x`` and all earlier layers' outputs.

    ``x_{l+1} = [x_l, conv(act(bn(x_l)))]`` (arXiv 1608.06993, equation 2), with a second BN-act-conv inside where
    ``bottleneck``.

    Args:
        x: ``(N, C_0, *spatial)``, 1 to 3 spatial dimensions, any strides; float32, bfloat16, float16 or float64.
        convolutions: one per layer, or two per layer where ``bottleneck`` (1x1, then the growth convolution). Their
            weights are in the dtype of ``x`` or float32.
        drop_rate: dropout of each layer's new feature maps; draws what ``F.dropout`` draws for their shape.
        drop_inside: dropout of each bottleneck.
        drop_channels: drop whole feature maps, as ``F.dropout2d`` draws them.
        prepend: new feature maps stand before those that their layer read.
        memory_efficient: compute the bottleneck again in backward instead of keeping it.
        group: name of the process group over whose ranks batch statistics are taken; None for this process alone.

    Returns:
        ``(N, C_0 + all new feature maps, *spatial)``, channels-last, in the dtype of ``x``; and the batch moments,
        float32 (float64 for float64), from which running statistics are updated, or None where no norm takes any.

    Raises:
        RuntimeError: the backend that was asked for cannot run on this device or dtype.
    """
    running = [t for c in convolutions if not c.batch_stats for t in (c.running_mean, c.running_var) if t is not None]
    parameters = Parameters(
        [c.weight for c in convolutions],
        [c.bias for c in convolutions if c.bias is not None],
        [c.gamma for c in convolutions],
        [c.beta for c in convolutions],
        running,
    )
    form = Form(
        [c.bias is not None for c in convolutions],
        [c.slope for c in convolutions],
        [c.eps for c in convolutions],
        [c.batch_stats for c in convolutions],
        2 if bottleneck else 1,
        drop_rate,
        drop_inside,
        drop_channels,
        prepend,
    )
    return run_block(x, parameters, form, memory_efficient, group)


class Parameters(NamedTuple):
    """Of norm-relu-convs in the order of execution; ``biases`` of the convolutions that have one, ``running`` (mean,
    variance) of the norms that use them."""

    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    running: list[Tensor]


class Form(NamedTuple):
    """What a block is beside its tensors; the lists have an entry for each convolution.

    Attributes:
        biased, slopes, eps, batch_stats, per_layer: as ``ops.block.Arguments`` has them.
        drop_rate, drop_inside, drop_channels, prepends: as :func:`dense_block` has them.
    """

    biased: list[bool]
    slopes: list[float]
    eps: list[float]
    batch_stats: list[bool]
    per_layer: int
    drop_rate: float = 0.0
    drop_inside: float = 0.0
    drop_channels: bool = False
    prepends: bool = False


def run_block(
    x: Tensor,
    parameters: Parameters,
    form: Form,
    memory_efficient: bool,
    group: str | None,
    drop_layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, BatchMoments | None]:
    """:func:`dense_block` of parameters and a form.

    Dropout draws in the order of memory: ``drop_layout`` is that of the feature maps that it would see.
    """
    weights, biases, gammas, betas, running = parameters
    per_layer, rates = form.per_layer, (form.drop_inside, form.drop_rate)
    inside, keep = None, None
    if any(rates):
        masks = _draw_masks(x, weights, rates[-per_layer:], form.drop_channels, drop_layout)
        inside, keep = [None, *masks][-2:]
    tensors = (x, *weights, *gammas, *betas, *biases)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dtype = accumulate_dtype(x.dtype)
    if differentiable:
        running = [t.clone() for t in running]  # a later training step may update them before this one's backward
    outputs = block(
        Arguments(
            x,
            weights,
            [t if t.is_contiguous() else t.contiguous() for t in biases],
            [t if t.is_contiguous() else t.contiguous() for t in gammas],
            [t if t.is_contiguous() else t.contiguous() for t in betas],
            [t if t.dtype == dtype else t.to(dtype) for t in running],
            keep,
            inside,
            form.biased,
            form.slopes,
            form.eps,
            form.batch_stats,
            per_layer,
            [1 / (1 - rate) if rate < 1 else 0.0 for rate in rates],
            form.prepends,
            per_layer == 2 and differentiable and not memory_efficient,
            choose(x.device, x.dtype) if x.numel() else "eager",
            group,
        )
    )
    if not any(form.batch_stats):
        return outputs.out, None
    stats, bottleneck_stats, *pixels = outputs.constants
    moments = bottleneck_stats if per_layer == 2 else None
    return outputs.out, BatchMoments(stats, moments, pixels[0] if pixels else None, group, form.prepends)


def _draw_masks(
    x: Tensor, weights: Sequence[Tensor], rates: Sequence[float], drop_channels: bool, layout: torch.memory_format
) -> list[Tensor | None]:
    """For each place in a layer the masks of all layers side by side, or None where the rate is 0; drawn layer by layer."""
    draw = torch.feature_dropout if drop_channels else F.dropout
    masks: list[list[Tensor]] = [[] for _ in rates]
    for i, weight in enumerate(weights):
        place = i % len(rates)
        if rates[place] > 0:
            sizes = (x.shape[0], weight.shape[0], *x.shape[2:])
            ones = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout).fill_(1)
            masks[place].append(draw(ones, rates[place], True) != 0)
    return [torch.cat(drawn, dim=1) if drawn else None for drawn in masks]
