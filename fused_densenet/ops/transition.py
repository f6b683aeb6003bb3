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

from ..backends import BACKENDS
from ..backends.contract import Gradient, pooled
from .derivatives import register_derivatives
from .ranks import sum_over_ranks
from .schedule import (
    NormReluConv,
    as_pixels,
    convolution_backward,
    empty_channels_last,
    norm_by,
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
    mean, var = moments
    norm, source = norm_by(gamma, beta, eps, mean, var, BACKENDS[backend]), as_pixels(x)
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
    mean, var = moments
    convolution = NormReluConv(weight, gamma, beta, mean, var, eps, batch_stats)
    source, stored = as_pixels(x), as_pixels(dout)
    dx = empty_channels_last(x.shape, x.shape[1], x)
    dz = pixels_last(dx)
    zeros = torch.zeros(weight.shape[0], dtype=moments.dtype, device=moments.device)
    grad = Gradient(stored, stored, zeros + 1, zeros, zeros, zeros)
    with torch.autocast(x.device.type, enabled=False):
        norm = norm_by(gamma, beta, eps, mean, var, kernels)
        correction = torch.empty_like(moments)
        dweight, dgamma, dbeta = convolution_backward(
            grad, source, norm, var, convolution, dz, correction, False, weight_needed, pixels, kernels
        )
        if group is not None:
            sum_over_ranks(correction, group)
        kernels.place_backward(Gradient(dz, source, norm.scale, correction[1], mean, correction[0]), dz)
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


def _after_relu(a: Tensor, weight: Tensor, pool: bool) -> Tensor:
    spatial = a.dim() - 2
    out = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1](a, weight.to(a.dtype))
    return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1](out, 2) if pool else out


register_derivatives(transition, transition_backward, _after_relu)


def _allocate(x: Tensor, weight: Tensor, pool: bool) -> Tensor:
    sizes = pooled(x.shape[2:]) if pool else x.shape[2:]
    return empty_channels_last((x.shape[0], weight.shape[0], *sizes), weight.shape[0], x)


@register_flop_formula(torch.ops.fused_densenet.transition)
def _transition_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two per multiply-add of the convolution of pooled feature maps, as torch counts them."""
    return 2 * math.prod(weight_shape) * out_shape[0] * math.prod(out_shape[2:])


@register_flop_formula(torch.ops.fused_densenet.transition_backward)
def _transition_backward_flops(dout_shape: Any, x_shape: Any, weight_shape: Any, *rest: Any, **__: Any) -> int:
    """Data gradient, and the weight gradient where it is needed."""
    return (1 + rest[-1]) * 2 * math.prod(weight_shape) * dout_shape[0] * math.prod(dout_shape[2:])
