"""Super-resolution networks of residual dense blocks, small and in our own words, each with the names of the one it stands for."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


# basicsr, and realesrgan and gfpgan on it: five convolutions by name, one activation, a scale of 0.2.
class Five(nn.Module):
    def __init__(self, features: int = 64, growth: int = 32) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i + 1}", conv3(features + i * growth, growth))
        self.conv5 = conv3(features + 4 * growth, features)
        self.lrelu = nn.LeakyReLU(negative_slope=0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        a = self.lrelu(self.conv1(x))
        b = self.lrelu(self.conv2(torch.cat((x, a), 1)))
        c = self.lrelu(self.conv3(torch.cat((x, a, b), 1)))
        d = self.lrelu(self.conv4(torch.cat((x, a, b, c), 1)))
        return self.conv5(torch.cat((x, a, b, c, d), 1)) * 0.2 + x


class Three(nn.Module):
    """Residual in residual."""

    def __init__(self, block: Any, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (block(features, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x
        return out


class RRDBNet(nn.Module):
    def __init__(self, blocks: int = 2, features: int = 64, growth: int = 32, block: Any = Five) -> None:
        super().__init__()
        self.conv_first = conv3(3, features)
        self.body = nn.Sequential(*(Three(block, features, growth) for _ in range(blocks)))
        self.conv_body, self.conv_up1, self.conv_hr = (conv3(features, features) for _ in range(3))
        self.conv_last, self.lrelu = conv3(features, 3), nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_first(x)
        x = x + self.conv_body(self.body(x))
        x = self.lrelu(self.conv_up1(F.interpolate(x, scale_factor=2, mode="nearest")))
        return self.conv_last(self.lrelu(self.conv_hr(x)))


# spandrel and the first ESRGAN: a convolution and its activation are a Sequential, which the last one has without any.
class InSequences(nn.Module):
    def __init__(self, features: int = 64, growth: int = 32) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i + 1}", nn.Sequential(conv3(features + i * growth, growth), nn.LeakyReLU(0.2, True)))
        self.conv5 = nn.Sequential(conv3(features + 4 * growth, features))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for i in range(4):
            features.append(getattr(self, f"conv{i + 1}")(torch.cat(features, 1)))
        return self.conv5(torch.cat(features, 1)) * 0.2 + x


# torchsr's, yjn870's and Yulun Zhang's RDN: layers in a Sequential, ReLU, a 1x1 convolution of all, no scale.
class Appending(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv3(inputs, growth), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(x)), 1)


class LocalFusion(nn.Module):
    def __init__(self, features: int = 64, growth: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(Appending(features + i * growth, growth) for i in range(layers)))
        self.LFF = nn.Conv2d(features + layers * growth, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.LFF(self.convs(x)) + x


class RDN(nn.Module):
    def __init__(self, features: int = 8, growth: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.SFE1, self.SFE2 = conv3(3, features), conv3(features, features)
        self.RDBs = nn.ModuleList(LocalFusion(features, growth) for _ in range(blocks))
        self.GFF = nn.Sequential(nn.Conv2d(blocks * features, features, 1), conv3(features, features))
        self.UPNet = nn.Sequential(conv3(features, 12), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        first = self.SFE1(x)
        x = self.SFE2(first)
        outs = []
        for block in self.RDBs:
            x = block(x)
            outs.append(x)
        return self.UPNet(self.GFF(torch.cat(outs, 1)) + first)


# SRDenseNet: the concatenation is the result.
class Concatenating(nn.Module):
    def __init__(self, features: int = 8, growth: int = 4) -> None:
        super().__init__()
        self.block = nn.Sequential(*(Appending(features + i * growth, growth) for i in range(3)))
        self.first, self.last = conv3(3, features), nn.Conv2d(features + 3 * growth, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


NETWORKS = {
    "RRDB": (lambda: RRDBNet(1, 8, 4), 3),
    "RRDB of sequences": (lambda: RRDBNet(1, 8, 4, InSequences), 3),
    "RDN": (RDN, 2),
    "SRDenseNet": (Concatenating, 1),
}
"""How to build each, and how many dense blocks run fused."""
