"""The networks that claims.py compares, and what was published about them."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

import fused_densenet
from fused_densenet import reference
from fused_densenet.nn.densenet import Network, cifar_arguments


class Published(NamedTuple):
    """What is known of a network: parameters (exact, or as its paper rounds them), multiply-adds, ImageNet error.

    ``parameters`` is an exact count (int) or a string in millions as printed; ``macs`` are in units of 1e9 for one
    image; ``error`` is torchvision's top-1 error in %.
    """

    source: str
    build: Callable[[], nn.Module]
    size: int
    parameters: int | str | None = None
    macs: float | None = None
    error: float | None = None


class ResNet(nn.Module):
    """ResNet for ImageNet (arXiv 1512.03385, table 1; stride in the 3x3 convolution, as torchvision has it)."""

    def __init__(self, layers: Sequence[int], bottleneck: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        blocks, width = [], 64
        for stage, count in enumerate(layers):
            for i in range(count):
                out = 64 * 2**stage * (4 if bottleneck else 1)
                blocks.append(_Residual(width, 64 * 2**stage, out, 2 if stage and not i else 1, bottleneck))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self, width: int, inner: int, out: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            branch = [*_conv_norm(width, inner, 1), nn.ReLU(), *_conv_norm(inner, inner, 3, stride)]
            branch += [nn.ReLU(), *_conv_norm(inner, out, 1)]
        else:
            branch = [*_conv_norm(width, inner, 3, stride), nn.ReLU(), *_conv_norm(inner, out, 3)]
        self.branch = nn.Sequential(*branch)
        project = stride > 1 or width != out
        self.shortcut = nn.Sequential(*_conv_norm(width, out, 1, stride)) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.branch(x))


def _conv_norm(width: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(width, out, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(out)]


def _imagenet(name: str) -> Callable[[], nn.Module]:
    return lambda: reference.DenseNet(**fused_densenet.nn.densenet.CONFIGURATIONS[name])


def _cifar(depth: int, growth_rate: int, bottleneck: bool) -> Callable[[], nn.Module]:
    return lambda: reference.DenseNet(**cifar_arguments(depth, growth_rate, bottleneck))


PUBLISHED: dict[str, Published] = {
    "DenseNet-121": Published("torchvision", _imagenet("121"), 224, 7_978_856, 2.834, 25.566),
    "DenseNet-169": Published("torchvision", _imagenet("169"), 224, 14_149_480, 3.360, 24.400),
    "DenseNet-201": Published("torchvision", _imagenet("201"), 224, 20_013_928, 4.291, 23.104),
    "DenseNet-161 (k=48)": Published("torchvision", _imagenet("161"), 224, 28_681_000, 7.728, 22.862),
    "DenseNet-264": Published("arXiv 1608.06993, no count printed", _imagenet("264"), 224),
    "ResNet-18": Published("torchvision", lambda: ResNet((2, 2, 2, 2), False), 224, 11_689_512, 1.814, 30.242),
    "ResNet-34": Published("torchvision", lambda: ResNet((3, 4, 6, 3), False), 224, 21_797_672, 3.664, 26.686),
    "ResNet-50": Published("torchvision", lambda: ResNet((3, 4, 6, 3), True), 224, 25_557_032, 4.089, 23.870),
    "ResNet-101": Published("torchvision", lambda: ResNet((3, 4, 23, 3), True), 224, 44_549_160, 7.801, 22.626),
    "ResNet-152": Published("torchvision", lambda: ResNet((3, 8, 36, 3), True), 224, 60_192_808, 11.514, 21.688),
    "DenseNet L=40 k=12": Published("arXiv 1608.06993, table 2", _cifar(40, 12, False), 32, "1.0"),
    "DenseNet L=100 k=12": Published("arXiv 1608.06993, table 2", _cifar(100, 12, False), 32, "7.0"),
    "DenseNet L=100 k=24": Published("arXiv 1608.06993, table 2", _cifar(100, 24, False), 32, "27.2"),
    "DenseNet-BC L=100 k=12": Published("arXiv 1608.06993, table 2", _cifar(100, 12, True), 32, "0.8"),
    "DenseNet-BC L=250 k=24": Published("arXiv 1608.06993, table 2", _cifar(250, 24, True), 32, "15.3"),
    "DenseNet-BC L=190 k=40": Published("arXiv 1608.06993 and 1711.09224", _cifar(190, 40, True), 32, "25.6", 9.388),
}


class Chain(Network):
    """The DenseNet of the same depth without its concatenations: the same layers, transitions, stem and classifier.

    Layer l is ``x_l = H(x_{l-1})``, or with ``residual`` ``x_{l+2} = x_l + H(H(x_l))`` (arXiv 1603.05027), H being
    BN-ReLU-conv3 of constant width in each of three stages: ``width``, twice and four times that.
    """

    def __init__(self, depth: int, width: int, residual: bool) -> None:
        super().__init__(1, width, True, 2)
        for i in range(3):
            stage = OrderedDict[str, nn.Module](
                (f"layer{j + 1}", Pair(width, residual)) for j in range((depth - 4) // 6)
            )
            self.features.add_module(f"stage{i + 1}", nn.Sequential(stage))
            if i < 2:
                self.features.add_module(f"transition{i + 1}", reference.Transition(width, 2 * width))
                width *= 2
        self.finish(width, 10)


class Pair(nn.Module):
    """Two layers, each BN-ReLU-conv3."""

    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(2):
            parts += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.branch = nn.Sequential(*parts)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)


def digits_network(name: str, depth: int, growth_rate: int) -> nn.Module:
    """A network for the digits: "plain", "ResNet", "DenseNet" or "CSPDenseNet".

    The chains' width 7k/4 gives them about the parameters of a DenseNet of depth 40.
    """
    if name in ("plain", "ResNet"):
        return Chain(depth, 7 * growth_rate // 4, name == "ResNet")
    arguments = cifar_arguments(depth, growth_rate, False) | {"in_channels": 1}
    return fused_densenet.DenseNet(**arguments) if name == "DenseNet" else fused_densenet.CSPDenseNet(**arguments)


def plain_twin(name: str, network: nn.Module, depth: int, growth_rate: int) -> nn.Module:
    """A copy of :func:`digits_network`'s in plain torch.nn, every layer of which can be observed."""
    if name in ("plain", "ResNet"):
        twin: nn.Module = Chain(depth, 7 * growth_rate // 4, name == "ResNet")
    else:
        arguments = cifar_arguments(depth, growth_rate, False) | {"in_channels": 1}
        twin = reference.DenseNet(**arguments) if name == "DenseNet" else reference.CSPDenseNet(**arguments)
    twin.load_state_dict(network.state_dict())
    return twin.train(network.training)
