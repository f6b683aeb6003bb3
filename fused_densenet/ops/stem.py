"""BN-ReLU, and max pooling where there is any, as one functional operator of torch that keeps its input alone.

Operator by operator a stem keeps the norm's input, ReLU's output and the places of the maxima; computed again from the
input, the last two need not be kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import BACKENDS
from ..backends.contract import Gradient
from .derivatives import register_derivatives
from .ranks import sum_over_ranks
from .schedule import as_pixels, empty_channels_last, norm_by, pixels_last


@torch.library.custom_op("fused_densenet::stem", mutates_args=())
def stem(
    x: Tensor,
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
    """``relu(bn(x))``, or where ``pool`` its maxima over windows of 3, stride 2, padding 1; ``moments`` as transition's."""
    out = _allocate(x, pool)
    kernels = BACKENDS[backend]
    mean, var = moments
    kernels.norm_relu_pool(as_pixels(x), norm_by(gamma, beta, eps, mean, var, kernels), pixels_last(out))
    return out


@stem.register_fake
def _(
    x: Tensor,
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
    return _allocate(x, pool)


@torch.library.custom_op("fused_densenet::stem_backward", mutates_args=())
def stem_backward(
    dout: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Tensor,
    pixels: Tensor,
    eps: float,
    batch_stats: bool,
    pool: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, gamma and beta."""
    dx = empty_channels_last(x.shape, x.shape[1], x)
    source, dz = as_pixels(x), pixels_last(dx)
    kernels = BACKENDS[backend]
    mean, var = moments
    norm = norm_by(gamma, beta, eps, mean, var, kernels)
    sums, correction = torch.empty_like(moments), torch.empty_like(moments)
    kernels.norm_relu_pool_backward(as_pixels(dout), source, norm, dz, sums[0], sums[1])
    count = pixels if batch_stats else None
    dgamma = kernels.norm_backward(sums, norm.scale, var, eps, count, correction, False)
    if group is not None:
        sum_over_ranks(correction, group)
    kernels.place_backward(Gradient(dz, source, norm.scale, correction[1], mean, correction[0]), dz)
    return dx, dgamma.to(gamma.dtype), sums[0].to(beta.dtype)


@stem_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Tensor,
    pixels: Tensor,
    eps: float,
    batch_stats: bool,
    pool: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_channels_last(x.shape, x.shape[1], x), gamma.new_empty(gamma.shape), beta.new_empty(beta.shape)


def _after_relu(a: Tensor, pool: bool) -> Tensor:
    max_pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[a.dim() - 3]
    return max_pool(a, 3, 2, 1) if pool else a


register_derivatives(stem, stem_backward, _after_relu)


def _allocate(x: Tensor, pool: bool) -> Tensor:
    sizes = [(size + 1) // 2 for size in x.shape[2:]] if pool else x.shape[2:]
    return empty_channels_last((*x.shape[:2], *sizes), x.shape[1], x)
