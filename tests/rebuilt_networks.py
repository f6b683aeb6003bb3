"""Dense networks of public code, small and in our own words: each has the names, containers and order of the one it stands for."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROWTH = 4
WIDTH = 8


def conv(inputs: int, outputs: int, size: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **{"bias": False} | options)


class Whole(nn.Module):
    """A network around stages: a convolution before them, a norm and a classifier behind them."""

    def __init__(self, stages: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.first, self.stages = conv(3, WIDTH, 3), nn.ModuleList(stages)
        self.bn, self.fc = nn.BatchNorm2d(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


def chain(layer: Callable[[int], nn.Module], count: int, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(*(layer(width + i * GROWTH) for i in range(count)))


# pytorchcv: a stage is a transition, except the first, and units of two blocks of norm, activation and convolution.
class PreConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.bn, self.activ, self.conv = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, outputs, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.activ(self.bn(x)))


class Unit(nn.Module):
    def __init__(self, width: int, rate: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.conv2 = PreConv(width, 2 * GROWTH, 1), PreConv(2 * GROWTH, GROWTH, 3)
        self.dropout = nn.Dropout(rate) if rate else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x = self.conv2(self.conv1(x))
        if self.dropout is not None:
            x = self.dropout(x)
        return torch.cat((identity, x), dim=1)


class PooledPreConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.pool = PreConv(inputs, outputs, 1), nn.AvgPool2d(2, 2, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))


def pytorchcv(rate: float = 0.0) -> nn.Module:
    first, second = nn.Sequential(), nn.Sequential()
    for i in range(2):
        first.add_module(f"unit{i + 1}", Unit(WIDTH + i * GROWTH, rate))
    second.add_module("trans2", PooledPreConv(16, 8))
    for i in range(3):
        second.add_module(f"unit{i + 1}", Unit(8 + i * GROWTH, rate))
    return Whole([first, second], 20)


# kuangliu, weiaicunzai, bamos, bearpaw, hysts, andreasveit: layers in a Sequential; activations are functions or one module.
class Functional(nn.Module):
    """A bottleneck layer whose activations are functions; new features behind or before the others."""

    def __init__(self, width: int, before: bool = False) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, 2 * GROWTH, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(2 * GROWTH), conv(2 * GROWTH, GROWTH, 3)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat((out, x) if self.before else (x, out), 1)


class FunctionalPlain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, GROWTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv1(F.relu(self.bn1(x)))), 1)


class FunctionalTransition(nn.Module):
    def __init__(self, inputs: int, outputs: int, rate: float = 0.0) -> None:
        super().__init__()
        self.bn1, self.conv1, self.rate = nn.BatchNorm2d(inputs), conv(inputs, outputs, 1), rate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        if self.rate > 0:
            out = F.dropout(out, p=self.rate, training=self.training)
        return F.avg_pool2d(out, 2)


def bamos(layer: Callable[[int], nn.Module] = Functional) -> nn.Module:
    return Whole([chain(layer, 3), FunctionalTransition(20, 10), chain(layer, 2, 10)], 18)


def kuangliu() -> nn.Module:
    return bamos(lambda width: Functional(width, before=True))


class InSequence(nn.Module):
    def __init__(self, width: int, before: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            conv(width, 2 * GROWTH, 1),
            nn.Dropout(0.0),
            nn.BatchNorm2d(2 * GROWTH),
            nn.ReLU(inplace=True),
            conv(2 * GROWTH, GROWTH, 3),
        )
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), x] if self.before else [x, self.net(x)], dim=1)


def weiaicunzai() -> nn.Module:
    """Its transitions have no activation."""
    features = nn.Sequential()
    features.add_module("dense_block_layer_0", chain(InSequence, 3))
    features.add_module("transition_layer_0", _NoActivation(20, 10))
    features.add_module("dense_block1", chain(InSequence, 2, 10))
    features.add_module("bn", nn.BatchNorm2d(18))
    features.add_module("relu", nn.ReLU(inplace=True))
    return Whole([features], 18)


class _NoActivation(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down_sample = nn.Sequential(nn.BatchNorm2d(inputs), conv(inputs, outputs, 1), nn.AvgPool2d(2, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_sample(x)


class OneActivation(nn.Module):
    """One ReLU for both norms, and dropout of some rate behind one convolution or both."""

    def __init__(self, width: int, rate: float = 0.0, twice: bool = False) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, 2 * GROWTH, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(2 * GROWTH), conv(2 * GROWTH, GROWTH, 3)
        self.relu, self.dropRate, self.twice = nn.ReLU(inplace=True), rate, twice

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.twice and self.dropRate > 0:
            out = F.dropout(out, p=self.dropRate, training=self.training)
        out = self.conv2(self.relu(self.bn2(out)))
        if self.dropRate > 0:
            out = F.dropout(out, p=self.dropRate, inplace=False, training=self.training)
        return torch.cat((x, out), 1)


def bearpaw() -> nn.Module:
    return bamos(lambda width: OneActivation(width, 0.3))


def hysts(rate: float = 0.0) -> nn.Module:
    """A stage ends in its transition."""
    stages = []
    for width, count, after in ((8, 2, 8), (8, 3, 0)):
        stage = nn.Sequential()
        for i in range(count):
            stage.add_module(f"block{i + 1}", OneActivation(width + i * GROWTH, rate, twice=True))
        if after:
            stage.add_module("transition", FunctionalTransition(width + count * GROWTH, after, rate))
        stages.append(stage)
    return Whole(stages, 20)


class LayersInside(nn.Module):
    def __init__(self, layer: Callable[[int], nn.Module], count: int, width: int = WIDTH) -> None:
        super().__init__()
        self.layer = chain(layer, count, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def andreasveit(twice: bool) -> nn.Module:
    """Where no dropout is asked for it drops out one value in ten million; OpenOOD's is the same."""

    def layer(width: int) -> nn.Module:
        return OneActivation(width, 1e-7, twice)

    return Whole([LayersInside(layer, 3), FunctionalTransition(20, 10, 1e-7), LayersInside(layer, 2, 10)], 18)


def phlippe() -> nn.Module:
    def layer(width: int) -> nn.Module:
        return InSequence(width, before=True)

    transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), conv(20, 10, 1), nn.AvgPool2d(2, 2))
    return Whole([nn.Sequential(LayersInside(layer, 3), transition, LayersInside(layer, 2, 10))], 18)


# KernelBench, level 3, problems 14 to 16: plain layers in a ModuleList, a dropout of rate 0, the block concatenates.
class ListedBlock(nn.Module):
    def __init__(self, count: int, width: int = WIDTH, bias: bool = False, last: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + i * GROWTH),
                nn.ReLU(inplace=True),
                conv(width + i * GROWTH, GROWTH, 3, bias=bias),
                nn.Dropout(last),
            )
            for i in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(x))
            x = torch.cat(features, 1)
        return x


class InnerSequence(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.transition = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, outputs, 1), nn.AvgPool2d(2, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.transition(x)


def kernelbench(*config: int) -> nn.Module:
    stages: list[nn.Module] = []
    width = WIDTH
    for count in config:
        stages += [InnerSequence(width, width // 2)] if stages else []
        width = width // 2 if len(stages) > 1 else width
        stages.append(ListedBlock(count, width))
        width += count * GROWTH
    return Whole(stages, width)


# mmpretrain: layers in a ModuleList take a list of tensors, and one activation each.
class ListTaking(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), conv(width, 2 * GROWTH, 1)
        self.act = nn.ReLU(inplace=True)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * GROWTH), conv(2 * GROWTH, GROWTH, 3)
        self.drop_rate, self.memory_efficient = 0.0, False

    def forward(self, x: list[Tensor]) -> Tensor:
        if self.memory_efficient and any(tensor.requires_grad for tensor in x):
            out = torch.utils.checkpoint.checkpoint(self.bottleneck, *x, use_reentrant=False)
        else:
            out = self.bottleneck(*x)
        new = self.conv2(self.act(self.norm2(out)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new

    def bottleneck(self, *features: Tensor) -> Tensor:
        return self.conv1(self.act(self.norm1(torch.cat(features, 1))))


class OfListTaking(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ListTaking(width + i * GROWTH) for i in range(count))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.block:
            features.append(layer(features))
        return torch.cat(features, 1)


def mmpretrain() -> nn.Module:
    transition = nn.Sequential()
    for name, module in (("norm", nn.BatchNorm2d(20)), ("act", nn.ReLU()), ("conv", conv(20, 10, 1))):
        transition.add_module(name, module)
    transition.add_module("pool", nn.AvgPool2d(2, 2))
    return Whole([OfListTaking(3, 8), transition, OfListTaking(2, 10)], 18)


def gpleiss(efficient: bool) -> nn.Module:
    """torchvision's names, and ``efficient`` for its checkpointing, of the reentrant kind."""
    network = mmpretrain()
    for module in network.modules():
        if isinstance(module, ListTaking):
            module.__class__ = Efficient
            module.efficient = efficient
    return network


class Efficient(ListTaking):
    efficient: bool

    def forward(self, x: list[Tensor]) -> Tensor:
        if self.efficient and any(feature.requires_grad for feature in x):
            out = torch.utils.checkpoint.checkpoint(self.bottleneck, *x, use_reentrant=True)
        else:
            out = self.bottleneck(*x)
        return self.conv2(self.act(self.norm2(out)))


# d2l.ai: convolutions with a bias.
class Growing(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(
                nn.Sequential(
                    nn.BatchNorm2d(width + i * GROWTH), nn.ReLU(), conv(width + i * GROWTH, GROWTH, 3, bias=True)
                )
                for i in range(count)
            )
        )

    def forward(self, X: Tensor) -> Tensor:
        for layer in self.net:
            X = torch.cat((X, layer(X)), dim=1)
        return X


def d2l() -> nn.Module:
    transition = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8, 1, bias=True), nn.AvgPool2d(2, 2))
    return Whole([Growing(2, 8), transition, Growing(2, 8)], 16)


# Tiramisu: plain layers with whole feature maps dropped out; on the way up the new features alone.
class UpAndDown(nn.Module):
    def __init__(self, count: int, width: int, upsample: bool, bias: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + i * GROWTH),
                nn.ReLU(True),
                conv(width + i * GROWTH, GROWTH, 3, bias=bias),
                nn.Dropout2d(0.2),
            )
            for i in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample:
            new = []
            for layer in self.layers:
                out = layer(x)
                x = torch.cat([x, out], 1)
                new.append(out)
            return torch.cat(new, 1)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def tiramisu(bias: bool = False) -> nn.Module:
    return Whole([UpAndDown(3, 8, upsample=False, bias=bias), UpAndDown(2, 20, upsample=True, bias=bias)], 8)


# Nobody's: all modules are attributes of the block, one ReLU serves all, and some modules do nothing.
class Flat(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        for i in range(count):
            setattr(self, f"normalise_{i}", nn.BatchNorm2d(width + i * GROWTH))
            setattr(self, f"convolve_{i}", conv(width + i * GROWTH, GROWTH, 3))
        self.activate, self.nothing, self.none = nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.0)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            new = self.activate(getattr(self, f"normalise_{i}")(x))
            new = self.none(self.nothing(getattr(self, f"convolve_{i}")(self.nothing(new))))
            x = torch.cat([x, self.nothing(new)], dim=-3)
        return self.nothing(x)


def flat() -> nn.Module:
    return Whole([Flat(3, 8), FunctionalTransition(20, 10), Flat(1, 10)], 14)


class Rebuilt(NamedTuple):
    """How to build it; how many of its dense blocks and transitions run fused; why the others do not."""

    build: Callable[[], nn.Module]
    blocks: int
    transitions: int
    reasons: tuple[str, ...] = ()


NETWORKS: dict[str, Rebuilt] = {
    "pytorchcv": Rebuilt(pytorchcv, 2, 1),
    "pytorchcv with dropout": Rebuilt(lambda: pytorchcv(0.3), 2, 1),
    "kuangliu": Rebuilt(kuangliu, 2, 1),
    "weiaicunzai": Rebuilt(weiaicunzai, 2, 0),
    "bamos": Rebuilt(bamos, 2, 1),
    "bamos without bottleneck": Rebuilt(lambda: bamos(FunctionalPlain), 2, 1),
    "bearpaw": Rebuilt(bearpaw, 2, 1),
    "hysts": Rebuilt(hysts, 2, 1),
    "hysts with dropout": Rebuilt(lambda: hysts(0.3), 2, 1),
    "andreasveit": Rebuilt(lambda: andreasveit(False), 2, 1),
    "andreasveit's bottlenecks": Rebuilt(lambda: andreasveit(True), 2, 1),
    "phlippe": Rebuilt(phlippe, 2, 1),
    "KernelBench 14": Rebuilt(lambda: ListedBlock(4, 3), 1, 0),
    "KernelBench 15": Rebuilt(lambda: kernelbench(2, 3, 2), 3, 2),
    "KernelBench 16": Rebuilt(lambda: kernelbench(2, 2, 4, 3), 4, 3),
    "mmpretrain": Rebuilt(mmpretrain, 2, 1),
    "gpleiss": Rebuilt(lambda: gpleiss(False), 2, 1),
    "d2l": Rebuilt(d2l, 2, 1),
    "attributes": Rebuilt(flat, 2, 1),
    "Tiramisu": Rebuilt(tiramisu, 2, 0),
    "Tiramisu with biases": Rebuilt(lambda: tiramisu(True), 2, 0),
}


def built(name: str) -> nn.Module:
    """In float64, norms not at their initial ones and zeros."""
    network = NETWORKS[name].build().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    return network
