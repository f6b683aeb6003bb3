"""A transition as one functional operator of torch: BN-ReLU-conv1 and average pooling, pooled before the product.

Average pooling and a 1x1 convolution commute (both are linear, one over pixels, one over channels): pooled while it is
loaded, the operand of the product has 2^d times fewer pixels. Kept for backward is the input alone.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends import BACKENDS
from ..backends.contract import Gradient, Norm, Owed, pooled
from .layout import channels_last, empty_channels_last, pixels_last, weight_5d
from .operator import Operator, Outputs, norm_act
from .program import without_autocast
from .ranks import sum_over_ranks


class Arguments(NamedTuple):
    """Of the operator; the lists of parameters have one entry each, ``biases`` perhaps none.

    Attributes:
        x: ``(N, C, *spatial)``; the result is ``(N, K, *spatial)``, each size halved where ``pool``.
        moments: mean and biased variance, ``(C,)``, to normalise by: of the batch where ``batch_stats``, over the ranks of
            ``group`` where there is one; constants otherwise.
        pixels: ``(1,)``, how many values they are of where that is not those of ``x``.
        slope: of the activation for negative numbers.
    """

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    moments: list[Tensor]
    pixels: Tensor | None
    eps: float
    slope: float
    batch_stats: bool
    pool: bool
    backend: str
    group: str | None

    @property
    def bias(self) -> Tensor | None:
        return next((bias for bias in self.biases if bias.numel()), None)


class NormReluThen(Operator):
    """An operator that begins with BN and ReLU and keeps nothing but its input."""

    keeps_input = True
    constants = ("moments", "pixels")

    def allocate_backward(self, dout: Tensor, a: Any, needed: list[bool]) -> list[Tensor]:
        weights = zip(getattr(a, "weights", ()), needed, strict=True)
        return [
            empty_channels_last(a.x.shape, a.x.shape[1], a.x),
            *[torch.empty_like(w) if wanted else dout.new_empty(0) for w, wanted in weights],
            *[torch.empty_like(t) for t in (*a.gammas, *a.betas, *getattr(a, "biases", ()))],
        ]

    def norm(self, a: Any) -> Norm:
        return Norm(a.moments[0], a.moments[1], a.gammas[0], a.betas[0], a.eps, getattr(a, "slope", 0.0))

    def settle(self, a: Any, dx: Tensor, correction: Tensor | None) -> None:
        """Takes from ``dx``, ``scale * dz``, what the statistics of ``x`` owe."""
        if correction is None:
            return
        if a.group is not None:
            sum_over_ranks(correction, a.group)
        dz = pixels_last(dx)
        grad = Gradient(dz, pixels_last(channels_last(a.x)), a.moments[0], correction)
        BACKENDS[a.backend].place_backward(grad, dz)

    def owed(self, a: Any, gradients: list[Tensor]) -> Owed:
        first = 1 + len(getattr(a, "weights", ()))
        dgamma, dbeta = gradients[first : first + 2]
        if not a.batch_stats:
            return Owed(dgamma, dbeta)
        correction = a.x.new_empty((2, a.x.shape[1]), dtype=a.moments[0].dtype)
        return Owed(dgamma, dbeta, correction, a.pixels)


class Transition(NormReluThen):
    name = "transition"
    arguments = Arguments

    def forward(self, a: Arguments) -> Outputs:
        outputs = self.allocate(a)
        with without_autocast(a.x.device):
            source, out = pixels_last(channels_last(a.x)), pixels_last(outputs.out)
            bias = a.bias
            BACKENDS[a.backend].norm_relu_conv(source, self.norm(a), weight_5d(a.weights[0]), out, None, None, bias)
        return outputs

    def allocate(self, a: Arguments) -> Outputs:
        sizes = pooled(a.x.shape[2:]) if a.pool else a.x.shape[2:]
        channels = a.weights[0].shape[0]
        return Outputs(empty_channels_last((a.x.shape[0], channels, *sizes), channels, a.x), [], [])

    def backward(
        self, dout: Tensor, a: Arguments, kept: list[Tensor], constants: list[Tensor], needed: list[bool]
    ) -> list[Tensor]:
        dx, dweight, *_ = gradients = self.allocate_backward(dout, a, needed)
        owed = self.owed(a, gradients)
        with without_autocast(a.x.device):
            BACKENDS[a.backend].norm_relu_conv_backward(
                Gradient(pixels_last(channels_last(dout))),
                pixels_last(channels_last(a.x)),
                self.norm(a),
                weight_5d(a.weights[0]),
                pixels_last(dx),
                False,
                weight_5d(dweight) if needed[0] else None,
                owed,
                None if a.bias is None else gradients[-1],
            )
            self.settle(a, dx, owed.correction)
        return gradients

    def by_operators(self, a: Arguments) -> Tensor:
        spatial = a.x.dim() - 2
        activation = norm_act(a.x, a.moments, a.gammas[0], a.betas[0], a.eps, a.batch_stats, a.slope)
        bias = None if a.bias is None else a.bias.to(activation.dtype)
        out = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1](activation, a.weights[0].to(activation.dtype), bias)
        return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1](out, 2) if a.pool else out


transition = Transition()


@register_flop_formula(torch.ops.fused_densenet.transition)
def _transition_flops(x_shape: Any, weight_shapes: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two per multiply-add of the convolution of pooled feature maps, as torch counts them."""
    out = out_shape[0]
    return 2 * math.prod(weight_shapes[0]) * out[0] * math.prod(out[2:])


@register_flop_formula(torch.ops.fused_densenet.transition_backward)
def _transition_backward_flops(
    dout_shape: Any, kept: Any, constants: Any, needed: Any, x_shape: Any, weight_shapes: Any, *_: Any, **__: Any
) -> int:
    """Data gradient, and the weight gradient where it is needed."""
    return (1 + needed[0]) * 2 * math.prod(weight_shapes[0]) * dout_shape[0] * math.prod(dout_shape[2:])
