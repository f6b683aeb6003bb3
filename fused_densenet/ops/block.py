"""The dense block as one functional operator of torch: schema, shapes for tracing, autograd, FLOPs.

``fused_densenet::dense_block`` allocates its buffer, writes every layer into it and returns it; nothing that it is
given is modified, so autograd, ``torch.compile`` and ``torch.export`` see an ordinary function. Norms' parameters and
convolution weights come as flat lists, one entry per norm-relu-conv in the order of execution: ``per_layer`` is 2 for
bottleneck layers, 1 for plain ones. ``running`` holds (running_mean, running_var) of the norms that use them, those
with ``batch_stats`` False, in order. ``keep`` is dropout's mask for the new feature maps of all layers,
``(N, layers * growth_rate, *spatial)``. ``group`` names the process group whose ranks share their batch statistics.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends import BACKENDS
from . import schedule
from .derivatives import norm_relu, refuse_synchronised, second_order
from .schedule import Layer, NormReluConv, Saved


@torch.library.custom_op("fused_densenet::dense_block", mutates_args=())
def dense_block(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: list[Tensor],
    keep: Tensor | None,
    eps: list[float],
    batch_stats: list[bool],
    per_layer: int,
    keep_scale: float,
    keep_bottleneck: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of :class:`fused_densenet.schedule.Saved`; the first is the block's output."""
    layers = _layers(weights, gammas, betas, running, keep, eps, batch_stats, per_layer, keep_scale)
    with torch.autocast(x.device.type, enabled=False):
        saved = schedule.forward(x, layers, keep_bottleneck, BACKENDS[backend], group)
    return saved.buffer, saved.stats, saved.bottleneck, saved.bottleneck_stats, saved.pixels


@dense_block.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: list[Tensor],
    keep: Tensor | None,
    eps: list[float],
    batch_stats: list[bool],
    per_layer: int,
    keep_scale: float,
    keep_bottleneck: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layers = _layers(weights, gammas, betas, running, keep, eps, batch_stats, per_layer, keep_scale)
    saved = schedule.allocate(x, layers, keep_bottleneck)
    return saved.buffer, saved.stats, saved.bottleneck, saved.bottleneck_stats, saved.pixels


@torch.library.custom_op("fused_densenet::dense_block_backward", mutates_args=())
def dense_block_backward(
    dout: Tensor,
    buffer: Tensor,
    stats: Tensor,
    bottleneck: Tensor,
    bottleneck_stats: Tensor,
    pixels: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: list[Tensor],
    keep: Tensor | None,
    eps: list[float],
    batch_stats: list[bool],
    per_layer: int,
    keep_scale: float,
    backend: str,
    group: str | None,
    weight_needed: list[bool],
) -> list[Tensor]:
    """Returns dx, then for each norm-relu-conv the gradients of weight (empty where not needed), gamma and beta."""
    layers = _layers(weights, gammas, betas, running, keep, eps, batch_stats, per_layer, keep_scale)
    needed = [weight_needed[i : i + per_layer] for i in range(0, len(weight_needed), per_layer)]
    saved = Saved(buffer, stats, bottleneck, bottleneck_stats, pixels)
    with torch.autocast(dout.device.type, enabled=False):
        gradients = schedule.backward(dout, saved, layers, needed, BACKENDS[backend], group)
    flat = [dout.new_empty(0) if g is None else g for layer in gradients.parameters for gs in layer for g in gs]
    return [gradients.dx, *flat]


@dense_block_backward.register_fake
def _(
    dout: Tensor,
    buffer: Tensor,
    stats: Tensor,
    bottleneck: Tensor,
    bottleneck_stats: Tensor,
    pixels: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: list[Tensor],
    keep: Tensor | None,
    eps: list[float],
    batch_stats: list[bool],
    per_layer: int,
    keep_scale: float,
    backend: str,
    group: str | None,
    weight_needed: list[bool],
) -> list[Tensor]:
    channels = gammas[0].shape[0]
    gradients = [schedule.empty_channels_last((buffer.shape[0], channels, *buffer.shape[2:]), channels, buffer)]
    for weight, gamma, beta, needed in zip(weights, gammas, betas, weight_needed, strict=True):
        dweight = weight.new_empty(weight.shape) if needed else dout.new_empty(0)
        gradients += [dweight, gamma.new_empty(gamma.shape), beta.new_empty(beta.shape)]
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weights, gammas, betas, running, keep, *ctx.constants, _, ctx.backend, ctx.group = inputs
    ctx.lengths = [len(tensors) for tensors in (weights, gammas, betas, running)]
    ctx.save_for_backward(*output, *weights, *gammas, *betas, *running, keep)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Any, ...]:
    nothing: list[Any] = [[None] * length for length in ctx.lengths]
    constants = [None] * (len(ctx.needs_input_grad) - 5)
    if dout is None and ctx.group is None:
        return (None, *nothing, *constants)
    tensors = ctx.saved_tensors  # read once: hooks unpack at every reading
    if dout is None:  # as torch's SyncBatchNorm sends back for an empty batch; other ranks wait for this one's sums
        dout = torch.zeros_like(tensors[0])
    saved, lists, keep = tensors[:5], _split(tensors[5:-1], ctx.lengths), tensors[-1]
    x_needed, weight_needed, gamma_needed, beta_needed = ctx.needs_input_grad[:4]
    gradients = dense_block_backward(
        dout, *saved, *lists, keep, *ctx.constants, ctx.backend, ctx.group, [bool(needed) for needed in weight_needed]
    )
    dx, parameters = gradients[0], gradients[1:]
    return (
        dx if x_needed else None,
        [g if needed else None for g, needed in zip(parameters[0::3], weight_needed, strict=True)],
        [g if needed else None for g, needed in zip(parameters[1::3], gamma_needed, strict=True)],
        [g if needed else None for g, needed in zip(parameters[2::3], beta_needed, strict=True)],
        *nothing[3:],
        *constants,
    )


dense_block.register_autograd(_backward, setup_context=_setup_context)


def _setup_double_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    dout, buffer, _, _, _, _, weights, gammas, betas, running, keep, *ctx.constants, _, ctx.group, _ = inputs
    ctx.lengths = [len(tensors) for tensors in (weights, gammas, betas, running)]
    ctx.save_for_backward(dout, buffer, *weights, *gammas, *betas, *running, keep)
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, second: list[Tensor | None]) -> tuple[Any, ...]:
    """The gradient of a gradient, by autograd through the block written operator by operator.

    The first-order gradients depend on the buffer through its first channels only, the block's input: the gradient by
    the buffer is zero elsewhere.
    """
    refuse_synchronised(ctx.group)
    dout, buffer, *rest, keep = ctx.saved_tensors
    weights, gammas, betas, running = _split(rest, ctx.lengths)
    channels = gammas[0].shape[0]
    lengths = ctx.lengths[:3]

    def block(x: Tensor, *parameters: Tensor) -> Tensor:
        lists = [*_split(parameters, lengths), running, keep, *ctx.constants]
        return _operator_by_operator(x, _layers(*lists))

    by_kind = [second[1:][kind::3] for kind in range(3)]
    sources = (buffer[:, :channels], *weights, *gammas, *betas)
    gradients = second_order(block, dout, sources, [second[0], *(s for kind in by_kind for s in kind)])
    by_dout, by_x, *by_parameters = gradients
    by_buffer = None
    if by_x is not None:
        by_buffer = F.pad(by_x, [0, 0] * (by_x.dim() - 2) + [0, buffer.shape[1] - channels])
    lists_out = _split(by_parameters, lengths)
    return (
        by_dout,
        by_buffer,
        *[None] * 4,
        *lists_out,
        [None] * ctx.lengths[3],
        *[None] * (len(ctx.needs_input_grad) - 10),
    )


dense_block_backward.register_autograd(_double_backward, setup_context=_setup_double_context)


def _operator_by_operator(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    for layer in layers:
        new = x
        for c in layer.convolutions:
            a = norm_relu(new, (c.running_mean, c.running_var), c.gamma, c.beta, c.eps, c.batch_stats)
            spatial = c.weight.dim() - 2
            convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
            new = convolve(a, c.weight.to(a.dtype), padding=[size // 2 for size in c.weight.shape[2:]])
        if layer.keep is not None:
            new = new * layer.keep * layer.keep_scale
        x = torch.cat([x, new], dim=1)
    return x


def _layers(
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running: Sequence[Tensor],
    keep: Tensor | None,
    eps: Sequence[float],
    batch_stats: Sequence[bool],
    per_layer: int,
    keep_scale: float,
) -> list[Layer]:
    frozen = iter(zip(running[0::2], running[1::2], strict=True))
    convolutions = []
    for i, weight in enumerate(weights):
        mean, var = (None, None) if batch_stats[i] else next(frozen)
        convolutions.append(NormReluConv(weight, gammas[i], betas[i], mean, var, eps[i], batch_stats[i]))
    by_layer = [convolutions[i : i + per_layer] for i in range(0, len(convolutions), per_layer)]
    growth = [layer[-1].weight.shape[0] for layer in by_layer]
    masks = [None] * len(growth) if keep is None else keep.split(growth, dim=1)
    return [Layer(layer, mask, keep_scale) for layer, mask in zip(by_layer, masks, strict=True)]


def _split(tensors: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    rest = iter(tensors)
    return [[next(rest) for _ in range(length)] for length in lengths]


def _flops(x_shape: Sequence[int], weight_shapes: Sequence[Sequence[int]]) -> list[int]:
    pixels = x_shape[0] * math.prod(x_shape[2:])
    return [2 * pixels * math.prod(shape) for shape in weight_shapes]


@register_flop_formula(torch.ops.fused_densenet.dense_block)
def _dense_block_flops(x_shape: Any, weight_shapes: Any, *_: Any, **__: Any) -> int:
    """Two per multiply-add of the convolutions, as torch counts them."""
    return sum(_flops(x_shape, weight_shapes))


@register_flop_formula(torch.ops.fused_densenet.dense_block_backward)
def _dense_block_backward_flops(
    dout_shape: Any,
    buffer_shape: Any,
    stats: Any,
    bottleneck_shape: Any,
    bottleneck_stats: Any,
    pixels: Any,
    weight_shapes: Any,
    *rest: Any,
    **_: Any,
) -> int:
    """Data gradient, the weight gradients that are needed, and the recomputed bottleneck where it was not kept."""
    flops = _flops(buffer_shape, weight_shapes)
    per_layer, weight_needed = rest[6], rest[10]
    recomputed = sum(flops[0::2]) if per_layer == 2 and 0 in bottleneck_shape else 0
    return sum(flops) + sum(f for f, needed in zip(flops, weight_needed, strict=True) if needed) + recomputed
