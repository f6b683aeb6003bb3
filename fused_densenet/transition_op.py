"""A transition as one functional operator of torch: BN-ReLU-conv1 and average pooling, pooled before the product.

Average pooling and a 1x1 convolution commute (both are linear, one over pixels, one over channels): pooled while it is
loaded, the operand of the product has 2^d times fewer pixels. Kept for backward is the input alone.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backends import BACKENDS
from .backends.contract import Gradient, pooled
from .higher_order import refuse_synchronised, second_order
from .ranks import sum_over_ranks
from .schedule import (
    NormReluConv,
    as_pixels,
    convolution_backward,
    empty_channels_last,
    norm_of,
    pixels_last,
    weight_5d,
)


@torch.library.custom_op("fused_densenet::transition", mutates_args=())
def transition(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Tensor,
    pixels: Tensor,
    eps: float,
    batch_stats: bool,
    pool: bool,
    backend: str,
    group: str | None,
) -> Tensor:
    """Returns ``(N, K, *spatial)``, each size halved where ``pool``.

    ``moments`` ``(2, C)`` are the mean and biased variance to normalise by, of ``pixels`` values over the ranks of
    ``group`` where ``batch_stats``, constants otherwise.
    """
    out = _allocate(x, weight, pool)
    norm = norm_of(_convolution(weight, gamma, beta, moments, eps, batch_stats), *moments)
    source = as_pixels(x)
    with torch.autocast(x.device.type, enabled=False):
        BACKENDS[backend].norm_relu_conv(source, norm, weight_5d(weight), pixels_last(out), None, None)
    return out


@transition.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Tensor,
    pixels: Tensor,
    eps: float,
    batch_stats: bool,
    pool: bool,
    backend: str,
    group: str | None,
) -> Tensor:
    return _allocate(x, weight, pool)


@torch.library.custom_op("fused_densenet::transition_backward", mutates_args=())
def transition_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Tensor,
    pixels: Tensor,
    eps: float,
    batch_stats: bool,
    pool: bool,
    backend: str,
    group: str | None,
    weight_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight (empty where not needed), gamma and beta."""
    kernels = BACKENDS[backend]
    convolution = _convolution(weight, gamma, beta, moments, eps, batch_stats)
    mean, var = moments
    source, stored = as_pixels(x), as_pixels(dout)
    dx = empty_channels_last(x.shape, x.shape[1], x)
    dz = pixels_last(dx)
    zeros = torch.zeros(weight.shape[0], dtype=moments.dtype, device=moments.device)
    grad = Gradient(stored, stored, zeros + 1, zeros, zeros, zeros)
    with torch.autocast(x.device.type, enabled=False):
        norm = norm_of(convolution, mean, var)
        (dweight, dgamma, dbeta), owed = convolution_backward(
            grad, source, norm, var, convolution, dz, False, weight_needed, pixels, kernels
        )
        if group is not None:
            sum_over_ranks(owed, group)
        kernels.place_backward(Gradient(dz, source, norm.scale, -owed[1], mean, -owed[0]), dz)
    return dx, dout.new_empty(0) if dweight is None else dweight, dgamma, dbeta


@transition_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Tensor,
    pixels: Tensor,
    eps: float,
    batch_stats: bool,
    pool: bool,
    backend: str,
    group: str | None,
    weight_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = empty_channels_last(x.shape, x.shape[1], x)
    dweight = weight.new_empty(weight.shape) if weight_needed else dout.new_empty(0)
    return dx, dweight, gamma.new_empty(gamma.shape), beta.new_empty(beta.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.constants = inputs[6:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
    nothing = [None] * len(ctx.needs_input_grad)
    pool, group = ctx.constants[2], ctx.constants[4]
    if dout is None and group is None:
        return tuple(nothing)
    if dout is None:  # other ranks wait for this one's sums
        x, weight = ctx.saved_tensors[:2]
        dout = _allocate(x, weight, pool).zero_()
    needed = ctx.needs_input_grad[:4]
    gradients = transition_backward(dout, *ctx.saved_tensors, *ctx.constants, bool(needed[1]))
    return (*(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), *nothing[4:])


transition.register_autograd(_backward, setup_context=_setup_context)


def _setup_double_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    _, ctx.eps, ctx.batch_stats, ctx.pool, _, ctx.group, _ = inputs[6:]
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    refuse_synchronised(ctx.group)
    dout, *sources, moments = ctx.saved_tensors

    def operator_by_operator(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        mean, var = (None, None) if ctx.batch_stats else moments
        a = F.relu(F.batch_norm(x, mean, var, gamma, beta, ctx.batch_stats, eps=ctx.eps))
        spatial = x.dim() - 2
        out = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1](a, weight.to(a.dtype))
        return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1](out, 2) if ctx.pool else out

    gradients = second_order(operator_by_operator, dout, sources, second)
    return (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))


transition_backward.register_autograd(_double_backward, setup_context=_setup_double_context)


def _allocate(x: Tensor, weight: Tensor, pool: bool) -> Tensor:
    sizes = pooled(x.shape[2:]) if pool else x.shape[2:]
    return empty_channels_last((x.shape[0], weight.shape[0], *sizes), weight.shape[0], x)


def _convolution(
    weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, eps: float, batch_stats: bool
) -> NormReluConv:
    return NormReluConv(weight, gamma, beta, moments[0], moments[1], eps, batch_stats)


@register_flop_formula(torch.ops.fused_densenet.transition)
def _transition_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two per multiply-add of the convolution of pooled feature maps, as torch counts them."""
    return 2 * math.prod(weight_shape) * out_shape[0] * math.prod(out_shape[2:])


@register_flop_formula(torch.ops.fused_densenet.transition_backward)
def _transition_backward_flops(dout_shape: Any, x_shape: Any, weight_shape: Any, *rest: Any, **__: Any) -> int:
    """Data gradient, and the weight gradient where it is needed."""
    return (1 + rest[-1]) * 2 * math.prod(weight_shape) * dout_shape[0] * math.prod(dout_shape[2:])
