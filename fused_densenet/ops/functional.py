"""``dense_block``: the fused block on plain tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .block import Form, Parameters, run_block
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
