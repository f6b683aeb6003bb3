"""BN-ReLU, and max pooling where there is any, as one functional operator of torch that keeps its input alone.

Operator by operator a stem keeps the norm's input, ReLU's output and the places of the maxima; computed again from the
input, the last two need not be kept.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..backends import BACKENDS
from .layout import channels_last, empty_channels_last, pixels_last
from .operator import Outputs, norm_act
from .transition import NormReluThen


class Arguments(NamedTuple):
    """Of the operator, as those of a transition, without weights."""

    x: Tensor
    gammas: list[Tensor]
    betas: list[Tensor]
    moments: list[Tensor]
    pixels: Tensor | None
    eps: float
    batch_stats: bool
    pool: bool
    backend: str
    group: str | None


class Stem(NormReluThen):
    """``relu(bn(x))``, or where ``pool`` its maxima over windows of 3, stride 2, padding 1."""

    name = "stem"
    arguments = Arguments

    def forward(self, a: Arguments) -> Outputs:
        outputs = self.allocate(a)
        source = pixels_last(channels_last(a.x))
        BACKENDS[a.backend].norm_relu_pool(source, self.norm(a), pixels_last(outputs.out))
        return outputs

    def allocate(self, a: Arguments) -> Outputs:
        sizes = [(size + 1) // 2 for size in a.x.shape[2:]] if a.pool else a.x.shape[2:]
        return Outputs(empty_channels_last((*a.x.shape[:2], *sizes), a.x.shape[1], a.x), [], [])

    def backward(
        self, dout: Tensor, a: Arguments, kept: list[Tensor], constants: list[Tensor], needed: list[bool]
    ) -> list[Tensor]:
        dx, *_ = gradients = self.allocate_backward(dout, a, needed)
        owed = self.owed(a, gradients)
        grad, source = pixels_last(channels_last(dout)), pixels_last(channels_last(a.x))
        BACKENDS[a.backend].norm_relu_pool_backward(grad, source, self.norm(a), pixels_last(dx), owed)
        self.settle(a, dx, owed.correction)
        return gradients

    def by_operators(self, a: Arguments) -> Tensor:
        activation = norm_act(a.x, a.moments, a.gammas[0], a.betas[0], a.eps, a.batch_stats)
        max_pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[a.x.dim() - 3]
        return max_pool(activation, 3, 2, 1) if a.pool else activation


stem = Stem()
