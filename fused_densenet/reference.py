"""DenseNet as its paper writes it, in plain ``torch.nn``: the specification.

Densely Connected Convolutional Networks, arXiv 1608.06993. Layer ``l`` computes ``x_l = H_l([x_0, ..., x_{l-1}])``
(equation 2) where ``[...]`` concatenates channels and ``H_l`` is BN-ReLU-conv3 (section 3, "composite function"), with
a BN-ReLU-conv1 of ``bn_size * growth_rate`` channels before it in a bottleneck layer (DenseNet-B). Nothing here is
fast, and nothing here is shared with the code that is tested against it. Parameter names are torchvision's.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class DenseLayer(nn.Module):
    """BN-ReLU-conv1-BN-ReLU-conv3 (``bn_size`` given) or BN-ReLU-conv3 (``bn_size=None``), then dropout.

    With a ``bottleneck_drop_rate`` dropout follows the first convolution of a bottleneck layer, too. With a ``negative_slope`` leaky ReLU stands for ReLU; with ``bias`` the convolutions have one.

    Maps ``(N, num_input_features, *spatial)`` to the ``growth_rate`` new feature maps ``(N, growth_rate, *spatial)``.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float = 0.0,
        *,
        spatial_dims: int = 2,
        bias: bool = False,
        negative_slope: float = 0.0,
        bottleneck_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        conv, norm = _CONV[spatial_dims], _NORM[spatial_dims]
        width = num_input_features
        self.norm1 = norm(width)
        if bn_size is not None:
            width = bn_size * growth_rate
            self.conv1 = conv(num_input_features, width, kernel_size=1, bias=bias)
            self.norm2 = norm(width)
            self.conv2 = conv(width, growth_rate, kernel_size=3, padding=1, bias=bias)
        else:
            self.conv1 = conv(width, growth_rate, kernel_size=3, padding=1, bias=bias)
        self.bottleneck = bn_size is not None
        self.drop_rate, self.bottleneck_drop_rate = drop_rate, bottleneck_drop_rate
        self.negative_slope = negative_slope

    def activation(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope) if self.negative_slope else F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.activation(self.norm1(x)))
        if self.bottleneck:
            if self.bottleneck_drop_rate > 0:
                out = F.dropout(out, self.bottleneck_drop_rate, self.training)
            out = self.conv2(self.activation(self.norm2(out)))
        return F.dropout(out, self.drop_rate, self.training) if self.drop_rate > 0 else out


class DenseBlock(nn.Module):
    """``num_layers`` dense layers, each reading the concatenation of the input and all earlier layers' outputs.

    Maps ``(N, C, *spatial)`` to ``(N, C + num_layers * growth_rate, *spatial)``; with ``return_new`` to the outputs
    alone, ``(N, num_layers * growth_rate, *spatial)``, as on the way up of arXiv 1611.09326 (section 3.1).
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        *,
        spatial_dims: int = 2,
        bias: bool = False,
        negative_slope: float = 0.0,
        return_new: bool = False,
        bottleneck_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            layer = DenseLayer(
                num_input_features + i * growth_rate,
                growth_rate,
                bn_size,
                drop_rate,
                spatial_dims=spatial_dims,
                bias=bias,
                negative_slope=negative_slope,
                bottleneck_drop_rate=bottleneck_drop_rate,
            )
            self.add_module(f"denselayer{i + 1}", layer)
        self.skipped = num_input_features if return_new else 0

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for layer in self.children():
            features = torch.cat([features, layer(features)], dim=1)
        return features[:, self.skipped :]


class Transition(nn.Sequential):
    """BN-ReLU-conv1 to ``num_output_features`` channels, then 2^d average pooling (section 3, "pooling layers")."""

    def __init__(self, num_input_features: int, num_output_features: int, *, spatial_dims: int = 2) -> None:
        super().__init__(
            OrderedDict(
                norm=_NORM[spatial_dims](num_input_features),
                relu=nn.ReLU(),
                conv=_CONV[spatial_dims](num_input_features, num_output_features, kernel_size=1, bias=False),
                pool=_AVG_POOL[spatial_dims](kernel_size=2, stride=2),
            )
        )


class DenseNet(nn.Module):
    """DenseNet (``bn_size=None``, ``compression=1``) and DenseNet-BC, for ImageNet (table 1) or CIFAR (section 4.2).

    Args:
        growth_rate: k, feature maps added by each layer.
        block_config: layers of each dense block.
        num_init_features: channels of the stem.
        bn_size: width of the bottleneck in multiples of k, or None for layers without one.
        compression: theta, the share of channels that a transition keeps.
        in_channels: channels of the image.
        num_classes: outputs of the classifier.
        drop_rate: dropout after each dense layer.
        small_inputs: CIFAR's stem (one 3^d convolution) instead of ImageNet's (7^d, BN, ReLU, max pooling).
        spatial_dims: 1, 2 or 3.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        compression: float = 0.5,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        *,
        small_inputs: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        conv, norm = _CONV[spatial_dims], _NORM[spatial_dims]
        self.features = nn.Sequential()
        if small_inputs:
            self.features.add_module("conv0", conv(in_channels, num_init_features, 3, padding=1, bias=False))
        else:
            self.features.add_module("conv0", conv(in_channels, num_init_features, 7, 2, padding=3, bias=False))
            self.features.add_module("norm0", norm(num_init_features))
            self.features.add_module("relu0", nn.ReLU())
            self.features.add_module("pool0", _MAX_POOL[spatial_dims](3, stride=2, padding=1))
        width = num_init_features
        for i, num_layers in enumerate(block_config):
            block = DenseBlock(num_layers, width, bn_size, growth_rate, drop_rate, spatial_dims=spatial_dims)
            self.features.add_module(f"denseblock{i + 1}", block)
            width += num_layers * growth_rate
            if i + 1 < len(block_config):
                out = int(width * compression)
                self.features.add_module(f"transition{i + 1}", Transition(width, out, spatial_dims=spatial_dims))
                width = out
        self.features.add_module("norm5", norm(width))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x))
        return self.classifier(features.flatten(2).mean(2))


class CSPDenseBlock(nn.Module):
    """A cross stage partial dense block and its transitions (CSPNet, arXiv 1911.11929, section 3 and figure 3).

    ``x_0 = [x_0', x_0'']`` by channels, ``int(split_ratio * num_input_features)`` of them in x_0'. With B the dense
    block, T and U transitions, fusion "first" is ``U([B(x_0''), x_0'])``, "last" ``[T(B(x_0'')), x_0']`` and "both"
    ``U([T(B(x_0'')), x_0'])``. The first transition pools, and x_0' is pooled to join it.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        *,
        num_output_features: int,
        split_ratio: float = 0.5,
        fusion: str = "both",
        pool: bool = True,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.around = int(split_ratio * num_input_features)
        through = num_input_features - self.around
        self.denseblock = DenseBlock(num_layers, through, bn_size, growth_rate, drop_rate, spatial_dims=spatial_dims)
        self.pool = _AVG_POOL[spatial_dims](kernel_size=2, stride=2) if pool else nn.Identity()
        self.fusion = fusion
        width = through + num_layers * growth_rate
        if fusion == "first":
            self.transition = _transition(width + self.around, num_output_features, spatial_dims)
        elif fusion == "last":
            self.dense_transition = _transition(width, num_output_features - self.around, spatial_dims)
        else:
            half = num_output_features // 2
            self.dense_transition = _transition(width, half, spatial_dims)
            self.transition = _transition(half + self.around, num_output_features, spatial_dims)

    def forward(self, x: Tensor) -> Tensor:
        around, through = x[:, : self.around], x[:, self.around :]
        dense = self.denseblock(through)
        if self.fusion == "first":
            return self.pool(self.transition(torch.cat([dense, around], dim=1)))
        if self.around:
            joined = torch.cat([self.pool(self.dense_transition(dense)), self.pool(around)], dim=1)
        else:
            joined = self.pool(self.dense_transition(dense))
        return joined if self.fusion == "last" else self.transition(joined)


def _transition(num_input_features: int, num_output_features: int, spatial_dims: int) -> nn.Sequential:
    """A transition up to its pooling."""
    return nn.Sequential(
        OrderedDict(
            list(Transition(num_input_features, num_output_features, spatial_dims=spatial_dims).named_children())[:3]
        )
    )


class CSPDenseNet(nn.Module):
    """A DenseNet of :class:`CSPDenseBlock` stages, each as wide as DenseNet's; the last one is not pooled.

    Args:
        split_ratio, fusion: as CSPDenseBlock's; the others as DenseNet's.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        compression: float = 0.5,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        *,
        split_ratio: float = 0.5,
        fusion: str = "both",
        small_inputs: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        stem = DenseNet(
            growth_rate,
            (),
            num_init_features,
            in_channels=in_channels,
            small_inputs=small_inputs,
            spatial_dims=spatial_dims,
        )
        self.features = stem.features
        del self.features.norm5
        width = num_init_features
        for i, num_layers in enumerate(block_config):
            last = i + 1 == len(block_config)
            whole = width + num_layers * growth_rate
            out = whole if last else int(whole * compression)
            stage = CSPDenseBlock(
                num_layers,
                width,
                bn_size,
                growth_rate,
                drop_rate,
                num_output_features=out,
                split_ratio=split_ratio,
                fusion=fusion,
                pool=not last,
                spatial_dims=spatial_dims,
            )
            self.features.add_module(f"stage{i + 1}", stage)
            width = out
        self.features.add_module("norm5", _NORM[spatial_dims](width))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x))
        return self.classifier(features.flatten(2).mean(2))
