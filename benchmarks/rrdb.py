"""ESRGAN's generator (arXiv 1809.00219, section 3.1) as Real-ESRGAN trains it: residual-in-residual dense blocks, four times up."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, GROWTH, LAYERS, BLOCKS = 64, 32, 4, 23


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResidualDenseBlock(nn.Module):
    """Concatenating."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(FEATURES + i * GROWTH, GROWTH) for i in range(LAYERS))
        self.last, self.activation = _conv(FEATURES + LAYERS * GROWTH, FEATURES), nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv in self.convs:
            features.append(self.activation(conv(torch.cat(features, 1))))
        return self.last(torch.cat(features, 1)) * 0.2 + x


class ResidualInResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualDenseBlock() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x) * 0.2 + x
        return out


class RRDBNet(nn.Module):
    """``(N, 3, H, W)`` to ``(N, 3, 4 H, 4 W)``."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.first = _conv(3, FEATURES)
        self.body = nn.Sequential(*(ResidualInResidual() for _ in range(blocks)), _conv(FEATURES, FEATURES))
        self.up = nn.ModuleList(_conv(FEATURES, FEATURES) for _ in range(2))
        self.high, self.last = _conv(FEATURES, FEATURES), _conv(FEATURES, 3)
        self.activation = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.body(x)
        for conv in self.up:
            x = self.activation(conv(F.interpolate(x, scale_factor=2, mode="nearest")))
        return self.last(self.activation(self.high(x)))


def floor_bytes(pixels: int, dtype: torch.dtype) -> int:
    """The dense blocks' concatenations alone, for so many pixels of the input."""
    return 3 * BLOCKS * (FEATURES + LAYERS * GROWTH) * pixels * dtype.itemsize
