"""``DenseNet`` on fused blocks: torchvision's constructor and keys, in 1, 2 or 3 dimensions, for ImageNet or CIFAR."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_flags, counts, dimensions, number, sequence
from .block import CONV, NORM, FusedDenseBlock
from .stem import FusedFeatures
from .transition import FusedTransition
from .weights import Weights, load_weights

MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class NetworkStage(NamedTuple):
    """Of a network: ``num_layers`` dense layers that read ``width`` channels and end with ``whole``, of which ``out`` are kept."""

    num_layers: int
    width: int
    whole: int
    out: int
    last: bool


def stages(
    growth_rate: int, block_config: Sequence[int], num_init_features: int, compression: float
) -> list[NetworkStage]:
    """Those of a network, each of which keeps the share ``compression``; the last one keeps all.

    Raises:
        ValueError, TypeError: a bad argument.
    """
    growth_rate, width = counts(growth_rate=growth_rate, num_init_features=num_init_features)
    if not 0 < number("compression", compression) <= 1:
        raise ValueError(f"compression: expected a share above 0 and at most 1, got {compression}")
    block_config = sequence("block_config", block_config)
    found: list[NetworkStage] = []
    for i, num_layers in enumerate(block_config, 1):
        whole, last = width + num_layers * growth_rate, i == len(block_config)
        out = whole if last else int(whole * compression)
        if out < 1:
            raise ValueError(f"compression: expected a share that leaves one of {whole} channels, got {compression}")
        found.append(NetworkStage(num_layers, width, whole, out, last))
        width = out
    return found


class Network(nn.Module):
    """What DenseNets have in common: the stem, then stages that a subclass adds, ``norm5`` and the classifier."""

    def __init__(self, in_channels: int, num_init_features: int, small_inputs: bool, spatial_dims: int) -> None:
        super().__init__()
        in_channels, num_init_features = counts(in_channels=in_channels, num_init_features=num_init_features)
        check_flags(small_inputs=small_inputs)
        spatial_dims = dimensions(spatial_dims)
        conv, norm = CONV[spatial_dims], NORM[spatial_dims]
        stem: OrderedDict[str, nn.Module] = OrderedDict()
        if small_inputs:
            stem["conv0"] = conv(in_channels, num_init_features, kernel_size=3, padding=1, bias=False)
        else:
            stem["conv0"] = conv(in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=False)
            stem["norm0"] = norm(num_init_features)
            stem["relu0"] = nn.ReLU(inplace=True)
            stem["pool0"] = MAX_POOL[spatial_dims](kernel_size=3, stride=2, padding=1)
        self.features = FusedFeatures(stem)
        self.spatial_dims = spatial_dims

    def finish(self, num_features: int, num_classes: int) -> None:
        """Adds what follows the stages and draws the initial weights, as torchvision does."""
        (num_classes,) = counts(num_classes=num_classes)
        self.features.add_module("norm5", NORM[self.spatial_dims](num_features))
        self.classifier = nn.Linear(num_features, num_classes)
        for module in self.modules():
            if isinstance(module, CONV[self.spatial_dims]):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x))
        return self.classifier(features.flatten(2).mean(2))


class DenseNet(Network):
    """DenseNet and DenseNet-BC (arXiv 1608.06993, table 1 and section 4.2) on :class:`FusedDenseBlock` and :class:`FusedTransition`.

    The positional arguments and the state_dict are torchvision's; the defaults are DenseNet-121.

    Args:
        growth_rate: k, feature maps added by each layer.
        block_config: layers of each dense block.
        num_init_features: channels of the stem.
        bn_size: width of the bottleneck in multiples of k; None for layers without one.
        drop_rate: dropout after each dense layer.
        num_classes: outputs of the classifier.
        memory_efficient: compute the bottlenecks again in backward instead of keeping them.
        compression: theta, the share of channels that a transition keeps, above 0 to 1.
        in_channels: channels of the image.
        small_inputs: CIFAR's stem (one 3^d convolution) instead of ImageNet's (7^d, BN, ReLU, max pooling).
        spatial_dims: 1, 2 or 3.

    Shape:
        ``(N, in_channels, *spatial)`` to ``(N, num_classes)``; float32, bfloat16, float16 or float64.

    Raises:
        ValueError, TypeError: a bad argument, or an input that a block or a transition does not take.

    Example:
        >>> network = DenseNet(growth_rate=12, block_config=(2, 3), num_init_features=24, num_classes=10)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
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
        compression: float = 0.5,
        in_channels: int = 3,
        small_inputs: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__(in_channels, num_init_features, small_inputs, spatial_dims)
        found = stages(growth_rate, block_config, num_init_features, compression)
        for i, stage in enumerate(found, 1):
            block = FusedDenseBlock(
                stage.num_layers,
                stage.width,
                bn_size,
                growth_rate,
                drop_rate,
                memory_efficient,
                spatial_dims=spatial_dims,
            )
            self.features.add_module(f"denseblock{i}", block)
            if not stage.last:
                transition = FusedTransition(stage.whole, stage.out, spatial_dims=spatial_dims)
                self.features.add_module(f"transition{i}", transition)
        self.finish(found[-1].out, num_classes)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "121": {"growth_rate": 32, "block_config": (6, 12, 24, 16), "num_init_features": 64},
    "161": {"growth_rate": 48, "block_config": (6, 12, 36, 24), "num_init_features": 96},
    "169": {"growth_rate": 32, "block_config": (6, 12, 32, 32), "num_init_features": 64},
    "201": {"growth_rate": 32, "block_config": (6, 12, 48, 32), "num_init_features": 64},
    "264": {"growth_rate": 32, "block_config": (6, 12, 64, 48), "num_init_features": 64},
}


def densenet121(*, weights: Weights = None, progress: bool = True, **arguments: Any) -> DenseNet:
    """DenseNet-121 of arXiv 1608.06993, table 1.

    Args:
        weights: None; the path of a file that ``torch.save`` wrote, of a state dict or of a checkpoint that holds one; or a
            member of torchvision's ``DenseNet121_Weights``.
        progress: show the download of a member's file.
        arguments: as :class:`DenseNet`'s; ``num_classes`` is that of the weights.

    Raises:
        ValueError, TypeError: a bad argument, or weights of something else.
    """
    return _build("121", weights, progress, arguments)


def densenet161(*, weights: Weights = None, progress: bool = True, **arguments: Any) -> DenseNet:
    """DenseNet-161 (k=48), as torchvision has it; arguments as :func:`densenet121`'s."""
    return _build("161", weights, progress, arguments)


def densenet169(*, weights: Weights = None, progress: bool = True, **arguments: Any) -> DenseNet:
    """DenseNet-169 of arXiv 1608.06993, table 1; arguments as :func:`densenet121`'s."""
    return _build("169", weights, progress, arguments)


def densenet201(*, weights: Weights = None, progress: bool = True, **arguments: Any) -> DenseNet:
    """DenseNet-201 of arXiv 1608.06993, table 1; arguments as :func:`densenet121`'s."""
    return _build("201", weights, progress, arguments)


def densenet264(*, weights: Weights = None, progress: bool = True, **arguments: Any) -> DenseNet:
    """DenseNet-264 of arXiv 1608.06993, table 1 (k=32); arguments as :func:`densenet121`'s."""
    return _build("264", weights, progress, arguments)


def densenet_cifar(depth: int, growth_rate: int, **arguments: Any) -> DenseNet:
    """DenseNet for 32x32 images (arXiv 1608.06993, section 3): (40, 12), (100, 12) and (100, 24) in table 2.

    Three blocks of ``(depth - 4) / 3`` layers without bottleneck, 16 channels from the stem, no compression, 10 classes.

    Raises:
        ValueError: ``depth`` is not 4 and a multiple of 3.
    """
    return DenseNet(**cifar_arguments(depth, growth_rate, bottleneck=False) | arguments)


def densenet_bc(depth: int, growth_rate: int, **arguments: Any) -> DenseNet:
    """DenseNet-BC for 32x32 images (arXiv 1608.06993, section 3): (100, 12), (250, 24) and (190, 40) in table 2.

    Three blocks of ``(depth - 4) / 6`` bottleneck layers, ``2 * growth_rate`` channels from the stem, compression 0.5,
    10 classes.

    Raises:
        ValueError: ``depth`` is not 4 and a multiple of 6.
    """
    return DenseNet(**cifar_arguments(depth, growth_rate, bottleneck=True) | arguments)


def cifar_arguments(depth: int, growth_rate: int, bottleneck: bool) -> dict[str, Any]:
    """What :func:`densenet_bc` or :func:`densenet_cifar` give to :class:`DenseNet`."""
    depth, growth_rate = counts(depth=depth, growth_rate=growth_rate)
    per_layer = 6 if bottleneck else 3
    if depth <= 4 or (depth - 4) % per_layer:
        raise ValueError(f"depth: expected 4 and a multiple of {per_layer}, got {depth}")
    return {
        "growth_rate": growth_rate,
        "block_config": ((depth - 4) // per_layer,) * 3,
        "num_init_features": 2 * growth_rate if bottleneck else 16,
        "bn_size": 4 if bottleneck else None,
        "compression": 0.5 if bottleneck else 1.0,
        "num_classes": 10,
        "small_inputs": True,
    }


def _build(name: str, weights: Weights, progress: bool, arguments: dict[str, Any]) -> DenseNet:
    if weights is None:
        return DenseNet(**CONFIGURATIONS[name] | arguments)
    state = load_weights(weights, f"DenseNet{name}_Weights", progress)
    classes = state["classifier.weight"].shape[0]
    if arguments.setdefault("num_classes", classes) != classes:
        raise ValueError(f"num_classes: expected {classes}, as the weights have, got {arguments['num_classes']}")
    network = DenseNet(**CONFIGURATIONS[name] | arguments)
    network.load_state_dict(state)
    return network
