"""The dense block's algorithm: two loops, over layers forward and backward, above any backend's primitives.

Write X for the block's buffer; layer l reads its first C_l channels. In training a channel's mean and variance are the
same for every layer that reads it, so they are taken once, where the channel is written. One reader's batch
normalisation sends back to x (arXiv 1502.03167, section 3)

    dx = s (dz - sum(dz) / M - (x - mean) rstd^2 sum(dz (x - mean)) / M),    s = gamma rstd

with dz the gradient by ReLU's input and M the pixels. The first term goes into the gradient buffer at once; the other
two are the same functions of x for all readers, so only their coefficients are summed, and they are subtracted where
the channel's own producer loads its gradient. Where a norm is frozen, its statistics are constants and owe nothing.

Where statistics are taken over the ranks of a group, M counts the pixels of all, the moments of what a convolution
wrote are merged as soon as it is done, and the coefficients are summed over the ranks just before the producer loads
them: each way one small message for each convolution, whatever the number of its readers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..backends.contract import Gradient, Norm, accumulate_dtype
from .ranks import merge_moments, sum_over_ranks


@dataclass
class NormReluConv:
    """One norm-relu-conv of a layer: parameters and constants, as ``nn.BatchNorm`` and ``nn.Conv`` hold them.

    ``running_mean`` and ``running_var`` are needed, and read, only where ``batch_stats`` is False.
    """

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    batch_stats: bool


@dataclass
class Layer:
    """The one (plain) or two (bottleneck) norm-relu-convs of a dense layer, and its dropout.

    ``keep`` is dropout's mask, boolean ``(N, growth_rate, *spatial)``, or None; kept values are times ``keep_scale``.
    """

    convolutions: Sequence[NormReluConv]
    keep: Tensor | None
    keep_scale: float


@dataclass
class Saved:
    """What forward leaves for backward.

    Attributes:
        buffer: ``(N, C, *spatial)``, channels-last; the block's output.
        stats: ``(2, C)``, mean and biased variance of each channel of the buffer.
        bottleneck: ``(layers, N, D, H, W, width)``, every layer's 1x1 output; empty if there is none to keep.
        bottleneck_stats: ``(2, layers, width)``, mean and biased variance of it.
        pixels: ``(1,)``, how many values of a channel the statistics are of.
    """

    buffer: Tensor
    stats: Tensor
    bottleneck: Tensor
    bottleneck_stats: Tensor
    pixels: Tensor


def forward(
    x: Tensor, layers: Sequence[Layer], keep_bottleneck: bool, backend: ModuleType, group: str | None = None
) -> Saved:
    """Runs the block on ``x`` ``(N, C_0, *spatial)``; batch statistics are over the ranks of ``group`` if it is given."""
    saved = allocate(x, layers, keep_bottleneck)
    data = pixels_last(saved.buffer)
    local = data.numel() // data.shape[-1]
    saved.pixels.fill_(local)

    def synchronise(mean: Tensor, var: Tensor) -> None:
        if group is not None:
            merge_moments(mean, var, local, saved.pixels, group)

    mean, var = saved.stats
    width = x.shape[1]
    backend.place(pixels_last(x), data[..., :width], mean[:width], var[:width])
    synchronise(mean[:width], var[:width])
    bottleneck = _scratch(data, layers) if not keep_bottleneck else None
    for i, layer in enumerate(layers):
        end = width + _growth(layer)
        source, source_mean, source_var = data[..., :width], mean[:width], var[:width]
        if len(layer.convolutions) == 2:
            y = saved.bottleneck[i] if bottleneck is None else bottleneck
            y_mean, y_var = saved.bottleneck_stats[:, i]
            first = layer.convolutions[0]
            norm = norm_of(first, source_mean, source_var, backend)
            backend.norm_relu_conv(source, norm, weight_5d(first.weight), y, y_mean, y_var)
            synchronise(y_mean, y_var)
            source, source_mean, source_var = y, y_mean, y_var
        last = layer.convolutions[-1]
        norm = norm_of(last, source_mean, source_var, backend)
        new, new_mean, new_var = data[..., width:end], mean[width:end], var[width:end]
        if layer.keep is None:
            backend.norm_relu_conv(source, norm, weight_5d(last.weight), new, new_mean, new_var)
        else:
            backend.norm_relu_conv(source, norm, weight_5d(last.weight), new, None, None)
            backend.place(new * _noise(layer, new), new, new_mean, new_var)
        synchronise(new_mean, new_var)
        width = end
    return saved


@dataclass
class Gradients:
    """``dx`` ``(N, C_0, *spatial)``, and per layer and convolution the gradients of (weight, gamma, beta)."""

    dx: Tensor
    parameters: list[list[tuple[Tensor | None, Tensor, Tensor]]]


def backward(
    dout: Tensor,
    saved: Saved,
    layers: Sequence[Layer],
    weight_needed: Sequence[Sequence[bool]],
    backend: ModuleType,
    group: str | None = None,
) -> Gradients:
    """The gradients of the block, given ``dout`` ``(N, C, *spatial)``; ``weight_needed`` per layer and convolution.

    Those of the parameters are this rank's own; ``group`` as it was in :func:`forward`.
    """
    buffer = saved.buffer
    data = as_pixels(buffer)  # a saved-tensor hook may have brought it back in another layout
    mean, var = saved.stats
    if not any(c.batch_stats for layer in layers for c in layer.convolutions):
        mean = torch.zeros_like(mean)  # nothing is corrected, and one image's NaN must not reach the others
    stored = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=data.device)
    backend.place(pixels_last(dout), stored, None, None)
    ones = torch.ones_like(mean)
    corrections = torch.zeros_like(saved.stats)  # by readers' statistics, of each channel: per 1, per (x - mean)

    def load(channels: slice) -> Gradient:
        own = corrections[:, channels]
        if group is not None and channels.stop < data.shape[-1]:  # nobody reads the last layer's
            own = own.contiguous()
            sum_over_ranks(own, group)
        return Gradient(stored[..., channels], data[..., channels], ones[channels], own[1], mean[channels], own[0])

    recompute = saved.bottleneck.numel() == 0
    y_scratch = _scratch(data, layers) if recompute else None
    dy = _scratch(data, layers)
    parameters: list[list[tuple[Tensor | None, Tensor, Tensor]]] = [[] for _ in layers]
    end = data.shape[-1]
    for i in reversed(range(len(layers))):
        layer = layers[i]
        width = end - _growth(layer)
        grad = load(slice(width, end))
        if layer.keep is not None:
            grad = _dropout_backward(grad, layer, backend)
        source, source_mean, source_var = data[..., :width], mean[:width], var[:width]
        first = layer.convolutions[0]
        first_norm = norm_of(first, source_mean, source_var, backend)
        if len(layer.convolutions) == 2:
            last = layer.convolutions[1]
            y_mean, y_var = saved.bottleneck_stats[:, i]
            if y_scratch is None:
                y = saved.bottleneck[i]
            else:
                y = y_scratch
                backend.norm_relu_conv(source, first_norm, weight_5d(first.weight), y, None, None)
            norm = norm_of(last, y_mean, y_var, backend)
            own = torch.empty(2, y.shape[-1], dtype=mean.dtype, device=mean.device)
            gradients = convolution_backward(
                grad, y, norm, y_var, last, dy, own, False, weight_needed[i][1], saved.pixels, backend
            )
            if group is not None:
                sum_over_ranks(own, group)
            parameters[i].append(gradients)
            grad = Gradient(dy, y, norm.scale, own[1], norm.mean, own[0])
        gradients = convolution_backward(
            grad,
            source,
            first_norm,
            source_var,
            first,
            stored[..., :width],
            corrections[:, :width],
            True,
            weight_needed[i][0],
            saved.pixels,
            backend,
        )
        parameters[i].insert(0, gradients)
        end = width
    dx = empty_channels_last((dout.shape[0], end, *dout.shape[2:]), end, saved.buffer)
    backend.place_backward(load(slice(0, end)), pixels_last(dx))
    return Gradients(dx, parameters)


def convolution_backward(
    grad: Gradient,
    x: Tensor,
    norm: Norm,
    var: Tensor,
    convolution: NormReluConv,
    dx: Tensor,
    correction: Tensor,
    accumulate: bool,
    weight_needed: bool,
    pixels: Tensor,
    backend: ModuleType,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """One convolution's parameter gradients; ``dx``, and ``correction`` for this rank, are stored or added to."""
    weight = convolution.weight
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if weight_needed else None
    sums = torch.empty(2, x.shape[-1], dtype=accumulate_dtype(x.dtype), device=x.device)
    backend.norm_relu_conv_backward(
        grad,
        x,
        norm,
        weight_5d(weight),
        dx,
        accumulate,
        None if dweight is None else weight_5d(dweight),
        sums[0],
        sums[1],
    )
    batch_stats, eps = convolution.batch_stats, convolution.eps
    var, count = (var, pixels) if batch_stats else (_running(convolution)[1], None)
    dgamma = backend.norm_backward(sums, norm.scale, var, eps, count, correction, accumulate)
    return dweight, dgamma.to(convolution.gamma.dtype), sums[0].to(convolution.beta.dtype)


def _dropout_backward(grad: Gradient, layer: Layer, backend: ModuleType) -> Gradient:
    loaded = torch.empty(grad.stored.shape, dtype=grad.stored.dtype, device=grad.stored.device)
    backend.place_backward(grad, loaded)
    loaded *= _noise(layer, loaded)
    zeros = torch.zeros_like(grad.scale)
    return Gradient(loaded, loaded, torch.ones_like(grad.scale), zeros, zeros, zeros)


def _noise(layer: Layer, like: Tensor) -> Tensor:
    assert layer.keep is not None
    return pixels_last(layer.keep).to(like.dtype) * layer.keep_scale


def norm_of(convolution: NormReluConv, mean: Tensor, var: Tensor, backend: ModuleType) -> Norm:
    if not convolution.batch_stats:
        mean, var = _running(convolution)
    return norm_by(convolution.gamma, convolution.beta, convolution.eps, mean, var, backend)


def norm_by(gamma: Tensor, beta: Tensor, eps: float, mean: Tensor, var: Tensor, backend: ModuleType) -> Norm:
    return Norm(mean, backend.norm_scale(var, gamma, eps), beta.to(var.dtype).contiguous())


def _running(convolution: NormReluConv) -> tuple[Tensor, Tensor]:
    assert convolution.running_mean is not None and convolution.running_var is not None
    dtype = accumulate_dtype(convolution.running_mean.dtype)
    return convolution.running_mean.to(dtype).contiguous(), convolution.running_var.to(dtype).contiguous()


def allocate(x: Tensor, layers: Sequence[Layer], keep_bottleneck: bool) -> Saved:
    """The block's uninitialised outputs for input ``x``."""
    channels = x.shape[1] + sum(_growth(layer) for layer in layers)
    padded = -(-channels // 8) * 8  # 16-byte aligned pixels in every dtype
    buffer = empty_channels_last((x.shape[0], channels, *x.shape[2:]), padded, x)
    dtype, device = accumulate_dtype(x.dtype), x.device
    width = _bottleneck_width(layers)
    kept = len(layers) if keep_bottleneck and width else 0
    bottleneck = torch.empty(kept, *pixels_last(buffer).shape[:-1], width, dtype=x.dtype, device=x.device)
    stats = torch.empty(2, channels, dtype=dtype, device=device)
    bottleneck_stats = torch.empty(2, len(layers), width, dtype=dtype, device=device)
    pixels = torch.empty(1, dtype=dtype, device=device)
    return Saved(buffer, stats, bottleneck, bottleneck_stats, pixels)


def empty_channels_last(shape: Sequence[int], pixel_stride: int, like: Tensor) -> Tensor:
    strides = [0, 1, *[0] * (len(shape) - 2)]
    step = pixel_stride
    for dim in reversed(range(2, len(shape))):
        strides[dim] = step
        step = step * shape[dim]
    strides[0] = step
    return torch.empty_strided(tuple(shape), strides, dtype=like.dtype, device=like.device)


def _scratch(data: Tensor, layers: Sequence[Layer]) -> Tensor:
    return torch.empty(*data.shape[:-1], _bottleneck_width(layers), dtype=data.dtype, device=data.device)


def _bottleneck_width(layers: Sequence[Layer]) -> int:
    return layers[0].convolutions[0].weight.shape[0] if len(layers[0].convolutions) == 2 else 0


def _growth(layer: Layer) -> int:
    return layer.convolutions[-1].weight.shape[0]


def pixels_last(x: Tensor) -> Tensor:
    """``(N, C, *spatial)`` seen as ``(N, D, H, W, C)``, missing sizes equal to 1."""
    while x.dim() < 5:
        x = x.unsqueeze(2)
    return x.permute(0, 2, 3, 4, 1)


def as_pixels(x: Tensor) -> Tensor:
    """:func:`pixels_last`, of a copy where ``x`` is not laid out as the backends' contract wants it."""
    data = pixels_last(x)
    longer = [(size, stride) for size, stride in zip(data.shape[:4], data.stride()[:4], strict=True) if size > 1]
    one_stride = all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(longer))
    if one_stride and (data.stride(4) == 1 or data.shape[4] == 1) and all(step >= data.shape[4] for _, step in longer):
        return data
    return pixels_last(empty_channels_last(x.shape, x.shape[1], x).copy_(x))


def weight_5d(weight: Tensor) -> Tensor:
    """``(K, C, *kernel)`` seen as ``(K, C, kd, kh, kw)``, missing sizes equal to 1."""
    while weight.dim() < 5:
        weight = weight.unsqueeze(2)
    return weight
