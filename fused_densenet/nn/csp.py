"""Cross stage partial dense networks (CSPNet, arXiv 1911.11929) on fused blocks.

A stage splits its input by channels, ``x_0 = [x_0', x_0'']``. The part x_0'' goes through a dense block, x_0' around
it; T and U are transitions (BN-ReLU-conv1), one of which pools (section 3, figure 3):

    fusion first:  x_U = U([x_0'', x_1, ..., x_L, x_0'])
    fusion last:   x_U = [T([x_0'', x_1, ..., x_L]), x_0']
    both:          x_T = T([x_0'', x_1, ..., x_L]),  x_U = U([x_T, x_0'])

T truncates the gradient: what reaches the dense layers through it is not what reaches x_0' around them.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arguments import check_flags, check_image, counts, number
from ..fallback.recording import exports_operators, one_call
from .block import FusedDenseBlock
from .densenet import CONFIGURATIONS, Network, stages
from .passage import Passage, alone, passes_on
from .transition import AVG_POOL, FusedTransition

Fusion = Literal["first", "last", "both"]


def _split(num_input_features: int, split_ratio: float, fusion: Fusion) -> tuple[int, int]:
    """The channels that go around a stage's dense block, and the fewest that the stage can end with."""
    if fusion not in ("first", "last", "both"):
        raise ValueError(f"fusion: expected 'first', 'last' or 'both', got {fusion!r}")
    if not 0 <= number("split_ratio", split_ratio) < 1:
        raise ValueError(f"split_ratio: expected a share of at least 0 and below 1, got {split_ratio}")
    around = int(num_input_features * split_ratio)
    return around, {"first": 1, "last": around + 1, "both": 2}[fusion]


class CSPDenseBlock(nn.Module):
    """One stage: a partial dense block and its partial transition (CSPNet, arXiv 1911.11929, section 3 and figure 3).

    With x split by channels into x' (``int(split_ratio * num_input_features)`` of them) and x'', the dense block B and the
    transitions T and U, equivalent to::

        U([B(x''), x'])        # fusion="first", U pools
        [T(B(x'')), pool(x')]  # fusion="last", T pools
        U([T(B(x'')), pool(x')])  # fusion="both", T pools

    Args:
        num_layers, num_input_features, bn_size, growth_rate, drop_rate, memory_efficient: as FusedDenseBlock's, where
            ``num_input_features`` counts the channels of both parts.
        num_output_features: channels of the result; half of what a DenseNet's stage would concatenate if None.
        split_ratio: the paper's gamma, the share of channels that goes around the block, 0 to below 1.
        fusion: where the parts are concatenated: "first", before the only transition; "last", after it; "both", between
            the two transitions. With "both" the transition T has half of ``num_output_features`` channels.
        pool: halve each spatial size, in T where there is one and in U otherwise; x_0' is pooled where it meets T's
            result.
        spatial_dims: 1, 2 or 3.

    Shape:
        ``(N, num_input_features, *spatial)`` to ``(N, num_output_features, *spatial)``, each size halved (rounded down) by
        pooling; float32, bfloat16, float16 or float64.

    Raises:
        ValueError, TypeError: a bad argument or input.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        *,
        num_output_features: int | None = None,
        split_ratio: float = 0.5,
        fusion: Fusion = "both",
        pool: bool = True,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        check_flags(pool=pool)
        num_layers, num_input_features, growth_rate = counts(
            num_layers=num_layers, num_input_features=num_input_features, growth_rate=growth_rate
        )
        if num_output_features is not None:
            (num_output_features,) = counts(num_output_features=num_output_features)
        around, least = _split(num_input_features, split_ratio, fusion)
        through = num_input_features - around
        self.denseblock = FusedDenseBlock(
            num_layers, through, bn_size, growth_rate, drop_rate, memory_efficient, spatial_dims=spatial_dims
        )
        dense = through + num_layers * growth_rate
        out = (around + dense) // 2 if num_output_features is None else num_output_features
        narrow = {"first": dense, "last": out - around, "both": out // 2}[fusion]
        if out < least:
            raise ValueError(f"num_output_features: expected at least {least} for fusion {fusion!r}, got {out}")
        if fusion != "first":
            self.dense_transition = FusedTransition(dense, narrow, pool=pool, spatial_dims=spatial_dims)
        if fusion != "last":
            pool_last = pool and fusion == "first"
            self.transition = FusedTransition(narrow + around, out, pool=pool_last, spatial_dims=spatial_dims)
        self.split = (around, through)
        self.spatial_dims = self.denseblock.spatial_dims
        self.num_input_features = num_input_features
        self.num_output_features = out
        self.fusion = fusion
        self.pool = pool

    @passes_on
    def forward(self, x: Tensor) -> Tensor:
        return alone(self, x)

    def pass_on(self, x: Tensor, passage: Passage) -> Tensor:
        """``forward(x)``, in whatever layout."""
        if isinstance(x, torch.fx.Proxy):
            return one_call(self, x)
        passage.statistics = None
        if not (isinstance(x, Tensor) and x.dim() == self.spatial_dims + 2 and x.shape[1] == self.num_input_features):
            check_image(x, "x", self.num_input_features, self.spatial_dims)
        around, through = x.split(self.split, dim=1)
        inside = Passage()
        dense = inside.through(self.denseblock, through)
        if self.fusion != "first":
            dense = inside.through(self.dense_transition, dense)
            if self.pool:
                around = _average_pool(around)
        fused = torch.cat([dense, around], dim=1)
        return fused if self.fusion == "last" else self.transition(fused)


def _average_pool(x: Tensor) -> Tensor:
    """2^d average pooling that keeps nothing for backward, where avg_pool would keep the whole stage's input."""
    if torch.compiler.is_exporting() or exports_operators():  # for sizes that may be odd
        return AVG_POOL[x.dim() - 2](2)(x)
    for dim in range(2, 2 * x.dim() - 2, 2):
        half = x.shape[dim] // 2
        x = x.narrow(dim, 0, 2 * half).unflatten(dim, (half, 2))
    return x.mean(dim=tuple(range(3, x.dim(), 2)))


class CSPDenseNet(Network):
    """A DenseNet whose stages are :class:`CSPDenseBlock`; the constructor follows :class:`DenseNet`'s.

    Stages of arXiv 1911.11929, section 3, on the stem and under the classifier of arXiv 1608.06993, table 1. Each has the
    width of DenseNet's: the compressed one between stages, the whole one, not pooled, at the end.

    Args:
        split_ratio, fusion: as CSPDenseBlock's.
        growth_rate, block_config, num_init_features, bn_size, drop_rate, num_classes, memory_efficient, compression,
            in_channels, small_inputs, spatial_dims: as DenseNet's.

    Shape:
        ``(N, in_channels, *spatial)`` to ``(N, num_classes)``; float32, bfloat16, float16 or float64.

    Raises:
        ValueError, TypeError: a bad argument, or an input that a block or a transition does not take.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        split_ratio: float = 0.5,
        fusion: Fusion = "both",
        compression: float = 0.5,
        in_channels: int = 3,
        small_inputs: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__(in_channels, num_init_features, small_inputs, spatial_dims)
        found = stages(growth_rate, block_config, num_init_features, compression)
        for i, (num_layers, width, whole, out, last) in enumerate(found, 1):
            _, least = _split(width, split_ratio, fusion)
            if out < least:
                raise ValueError(
                    f"compression: expected a share that leaves {least} of {whole} channels for fusion {fusion!r}, got {compression}"
                )
            stage = CSPDenseBlock(
                num_layers,
                width,
                bn_size,
                growth_rate,
                drop_rate,
                memory_efficient,
                num_output_features=out,
                split_ratio=split_ratio,
                fusion=fusion,
                pool=not last,
                spatial_dims=spatial_dims,
            )
            self.features.add_module(f"stage{i}", stage)
        self.finish(found[-1].out, num_classes)


def csp_densenet121(**arguments: Any) -> CSPDenseNet:
    """CSPDenseNet with DenseNet-121's layers; ``arguments`` as :class:`CSPDenseNet`'s."""
    return CSPDenseNet(**CONFIGURATIONS["121"] | arguments)


def csp_densenet169(**arguments: Any) -> CSPDenseNet:
    """CSPDenseNet with DenseNet-169's layers; ``arguments`` as :class:`CSPDenseNet`'s."""
    return CSPDenseNet(**CONFIGURATIONS["169"] | arguments)


def csp_densenet201(**arguments: Any) -> CSPDenseNet:
    """CSPDenseNet with DenseNet-201's layers; ``arguments`` as :class:`CSPDenseNet`'s."""
    return CSPDenseNet(**CONFIGURATIONS["201"] | arguments)


def csp_densenet264(**arguments: Any) -> CSPDenseNet:
    """CSPDenseNet with DenseNet-264's layers (k=32); ``arguments`` as :class:`CSPDenseNet`'s."""
    return CSPDenseNet(**CONFIGURATIONS["264"] | arguments)
