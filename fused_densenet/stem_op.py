"""BN-ReLU, and max pooling where there is any, as one functional operator of torch that keeps its input alone.

Operator by operator a stem keeps the norm's input, ReLU's output and the places of the maxima; computed again from the
input, the last two need not be kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import BACKENDS, eager
from .backends.contract import Gradient, Norm
from .higher_order import refuse_synchronised, second_order
from .ranks import sum_over_ranks
from .schedule import as_pixels, empty_channels_last, owed_by, pixels_last


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
    run = getattr(BACKENDS[backend], "norm_relu_pool", eager.norm_relu_pool)
    run(as_pixels(x), _norm(gamma, beta, moments, eps)[0], pixels_last(out))
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
    norm, rstd = _norm(gamma, beta, moments, eps)
    sums = torch.empty_like(moments)
    run = getattr(BACKENDS[backend], "norm_relu_pool_backward", eager.norm_relu_pool_backward)
    run(as_pixels(dout), source, norm, dz, sums[0], sums[1])
    dgamma, dbeta = (sums[1] * rstd).to(gamma.dtype), sums[0].to(beta.dtype)
    owed = owed_by(norm, rstd, sums, pixels) if batch_stats else torch.zeros_like(sums)
    if group is not None:
        sum_over_ranks(owed, group)
    BACKENDS[backend].place_backward(Gradient(dz, source, norm.scale, -owed[1], norm.mean, -owed[0]), dz)
    return dx, dgamma, dbeta


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.constants = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
    nothing = [None] * len(ctx.needs_input_grad)
    pool, group = ctx.constants[2], ctx.constants[4]
    if dout is None and group is None:
        return tuple(nothing)
    if dout is None:  # other ranks wait for this one's sums
        dout = _allocate(ctx.saved_tensors[0], pool).zero_()
    gradients = stem_backward(dout, *ctx.saved_tensors, *ctx.constants)
    return (*(g if wanted else None for g, wanted in zip(gradients, ctx.needs_input_grad, strict=False)), *nothing[3:])


stem.register_autograd(_backward, setup_context=_setup_context)


def _setup_double_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    _, ctx.eps, ctx.batch_stats, ctx.pool, _, ctx.group = inputs[5:]
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    refuse_synchronised(ctx.group)
    dout, x, gamma, beta, moments = ctx.saved_tensors

    def operator_by_operator(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        mean, var = (None, None) if ctx.batch_stats else moments
        a = F.relu(F.batch_norm(x, mean, var, gamma, beta, ctx.batch_stats, eps=ctx.eps))
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
        return pool(a, 3, 2, 1) if ctx.pool else a

    gradients = second_order(operator_by_operator, dout, (x, gamma, beta), second)
    return (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))


stem_backward.register_autograd(_double_backward, setup_context=_setup_double_context)


def _allocate(x: Tensor, pool: bool) -> Tensor:
    sizes = [(size + 1) // 2 for size in x.shape[2:]] if pool else x.shape[2:]
    return empty_channels_last((*x.shape[:2], *sizes), x.shape[1], x)


def _norm(gamma: Tensor, beta: Tensor, moments: Tensor, eps: float) -> tuple[Norm, Tensor]:
    mean, var = moments
    rstd = torch.rsqrt(var + eps)
    return Norm(mean, gamma.to(var.dtype) * rstd, beta.to(var.dtype).contiguous()), rstd
