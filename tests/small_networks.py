"""A small DenseNet of torchvision's to be fused, and what one step of it gives."""

from typing import Any

import peers
import torch
from blocks import step
from torch import Tensor, nn

from fused_densenet import FusedDenseBlock

SIZE = (3, 8, 2, 4, 0.0)
"""Arguments of a block of torchvision's."""


def network(**options: Any) -> Any:
    return peers.DenseNet(4, (2, 3), 8, 2, num_classes=5, **options).double()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def blocks(model: nn.Module) -> list[FusedDenseBlock]:
    """The fused blocks of ``model``."""
    return [m for m in model.modules() if isinstance(m, FusedDenseBlock)]


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``blocks.step`` with the same random numbers every time."""
    torch.manual_seed(1)
    return step(model, x)
