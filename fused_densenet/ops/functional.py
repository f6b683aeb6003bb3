"""``dense_block``: the fused block on plain tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_flags, check_image, number, rate
from ..backends.contract import accumulate_dtype
from .block import Form, Parameters, run_block
from .statistics import BatchMoments


@dataclass
class NormReluConv:
    """One norm-relu-conv: parameters and constants, as ``nn.BatchNorm`` and ``nn.Conv`` hold them.

    ``out = conv(act((x - mean) * gamma / sqrt(var + eps) + beta), weight) + bias`` (arXiv 1502.03167, algorithm 1, and
    1608.06993, section 3, "composite function"), zero padding after the activation to the size of ``x``.

    Attributes:
        weight: ``(K, C, *kernel)`` of odd sizes, in any strides.
        gamma, beta: ``(C,)``.
        running_mean, running_var: ``(C,)``; needed, and read, only where ``batch_stats`` is False.
        eps: above 0.
        batch_stats: mean and biased variance are those of the batch.
        bias: ``(K,)``, or None.
        slope: of the activation for negative numbers, 0 (ReLU) to 1.
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
            tensors are in the dtype of ``x`` or, unless that is float64, in float32.
        drop_rate: dropout of each layer's new feature maps; draws what ``F.dropout`` draws for their shape.
        drop_inside: dropout of each bottleneck.
        drop_channels: drop whole feature maps, as ``F.dropout2d`` draws them.
        prepend: new feature maps stand before those that their layer read.
        memory_efficient: compute the bottleneck again in backward instead of keeping it.
        group: name of the process group over whose ranks batch statistics are taken; None for this process alone.

    Returns:
        ``(N, C_0 + all new feature maps, *spatial)``, channels-last, in the dtype of ``x``; and the batch moments,
        float32 (float64 for float64), from which running statistics are updated: ``moments.of(i, C)`` is mean and
        biased variance of what ``convolutions[i]`` reads, ``(2, C)``. None where no norm takes any.

    Raises:
        ValueError, TypeError: an argument that does not fit the others, by its name.
        RuntimeError: the backend that was asked for cannot run on this device or dtype.

    Example:
        A layer without a bottleneck, its norm and convolution held by ``nn.BatchNorm2d`` and ``nn.Conv2d``:

        >>> norm, conv = torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3, padding=1, bias=False)
        >>> layer = NormReluConv(conv.weight, norm.weight, norm.bias, None, None, norm.eps, batch_stats=True)
        >>> out, moments = dense_block(torch.randn(2, 8, 5, 5), [layer], bottleneck=False)
        >>> out.shape
        torch.Size([2, 12, 5, 5])
        >>> moments.of(0, 8).shape
        torch.Size([2, 8])
    """
    check_flags(bottleneck=bottleneck, drop_channels=drop_channels, prepend=prepend, memory_efficient=memory_efficient)
    per_layer = 2 if bottleneck else 1
    _check(x, convolutions, per_layer, group)
    rate("drop_rate", drop_rate)
    if rate("drop_inside", drop_inside) and not bottleneck:
        raise ValueError(f"drop_inside: expected 0 where there is no bottleneck, got {drop_inside}")
    frozen = [c for c in convolutions if not c.batch_stats]
    running = [t.contiguous() for c in frozen for t in (c.running_mean, c.running_var) if t is not None]
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
        per_layer,
        drop_rate,
        drop_inside,
        drop_channels,
        prepend,
    )
    return run_block(x, parameters, form, memory_efficient, group)


def _check(x: Tensor, convolutions: Sequence[NormReluConv], per_layer: int, group: str | None) -> None:
    """That every convolution reads what is there, and that all tensors are of one device and of dtypes that meet."""
    if not isinstance(convolutions, Sequence):
        raise TypeError(f"convolutions: expected a sequence, got {type(convolutions).__name__}")
    if not convolutions or len(convolutions) % per_layer:
        raise ValueError(f"convolutions: expected {per_layer} for each of the layers, got {len(convolutions)}")
    for i, c in enumerate(convolutions):
        if not isinstance(c, NormReluConv):
            raise TypeError(f"convolutions[{i}]: expected a NormReluConv, got {type(c).__name__}")
    first = convolutions[0].weight
    if not isinstance(first, Tensor) or first.dim() not in (3, 4, 5):
        raise ValueError("convolutions[0].weight: expected a Tensor (K, C, *kernel) of 1 to 3 spatial dimensions")
    width = first.shape[1]
    check_image(x, "x", width, first.dim() - 2)
    like = _Like(x.dim(), x.device, (x.dtype, accumulate_dtype(x.dtype)))
    for i in range(0, len(convolutions), per_layer):
        there = width
        for j in range(i, i + per_layer):
            there = like.check(j, convolutions[j], there)
        width += there
    if group is None and x.numel() == x.shape[1] and any(c.batch_stats for c in convolutions):
        raise ValueError(
            f"x: expected more than one value per channel for batch statistics, got shape {tuple(x.shape)}"
        )


class _Like(NamedTuple):
    """Of the feature maps that convolutions read. The first of the dtypes is theirs."""

    dims: int
    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]

    def check(self, i: int, c: NormReluConv, channels: int) -> int:
        """That convolution ``i`` reads ``channels``; those that it makes."""
        shape = self._check_tensor(i, "weight", c.weight)
        if len(shape) != self.dims or shape[1] != channels or 0 in shape or 0 in [size % 2 for size in shape[2:]]:
            expected = f"(K, {channels}, *kernel) of {self.dims - 2} odd sizes"
            raise ValueError(f"convolutions[{i}].weight: expected {expected}, got shape {tuple(shape)}")
        self._check_vector(i, "gamma", c.gamma, channels)
        self._check_vector(i, "beta", c.beta, channels)
        if c.bias is not None:
            self._check_vector(i, "bias", c.bias, shape[0])
        if not c.batch_stats:
            self._check_vector(i, "running_mean", c.running_mean, channels)
            self._check_vector(i, "running_var", c.running_var, channels)
        if not (type(c.slope) is float and 0 <= c.slope <= 1):
            rate(f"convolutions[{i}].slope", c.slope, "a number")
        if not (type(c.eps) is float and c.eps > 0) and not number(f"convolutions[{i}].eps", c.eps) > 0:
            raise ValueError(f"convolutions[{i}].eps: expected a number above 0, got {c.eps}")
        return shape[0]

    def _check_vector(self, i: int, name: str, vector: Tensor | None, entries: int) -> None:
        if (shape := self._check_tensor(i, name, vector)) != (entries,):
            raise ValueError(f"convolutions[{i}].{name}: expected shape ({entries},), got {tuple(shape)}")

    def _check_tensor(self, i: int, name: str, tensor: Tensor | None) -> torch.Size:
        """Its shape."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"convolutions[{i}].{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.device != self.device:
            raise ValueError(
                f"convolutions[{i}].{name}: expected device {self.device}, where x is, got {tensor.device}"
            )
        if tensor.dtype not in self.dtypes:
            expected = " or ".join(map(str, dict.fromkeys(self.dtypes)))
            raise TypeError(
                f"convolutions[{i}].{name}: expected {expected}, for x in {self.dtypes[0]}, got {tensor.dtype}"
            )
        return tensor.shape
