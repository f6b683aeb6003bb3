"""Small networks, and what it takes for a snapshot of one to be right."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tolerances import assert_largest
from torch import Tensor, nn

from fused_densenet import (
    DenseNet,
    FusedDenseBlock,
    optimize_for_inference,
)
from fused_densenet.nn.serving import Segment


def randomised(model: nn.Module) -> Any:
    """In evaluation, with norms that do something."""
    for module in model.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.track_running_stats:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def small(dims: int = 2, **options: Any) -> Any:
    """In float64."""
    torch.manual_seed(0)
    arguments: Any = {"bn_size": 2, "num_classes": 5, "spatial_dims": dims} | options
    return randomised(DenseNet(4, (2, 2), 8, **arguments)).double()


def segments(model: nn.Module) -> list[Segment]:
    return [module for module in model.modules() if isinstance(module, Segment)]


def leaves(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


@torch.no_grad()
def assert_served(model: nn.Module, x: Tensor) -> Any:
    """A snapshot of ``model``, which is in float64 and gives the same."""
    served = optimize_for_inference(model)
    ours, theirs = leaves(served(x)), leaves(model(x))
    for mine, expected in zip(ours, theirs, strict=True):
        assert_largest(mine, expected, "float64 whole block", "output")
    return served


class Heads(nn.Module):
    """A block behind a stem with everything that a program can have there, and one of several heads."""

    def __init__(self, head: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, 2, bias=True), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block, self.norm = FusedDenseBlock(2, 8, 2, 4, bias=True, negative_slope=0.2), nn.BatchNorm2d(16)
        self.pool, self.fc, self.out = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 6), nn.Linear(6, 5)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.second(self.act(self.bn(self.conv(x)))))
        return self.head(self, torch.relu(self.norm(x)))


HEADS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "mean": (lambda m, x: m.fc(x.mean((-1, -2))), 0),
    "mean of flat": (lambda m, x: m.fc(x.flatten(2).mean(-1)), 0),
    "kept": (lambda m, x: m.fc(torch.flatten(F.dropout(m.pool(x), training=False), 1)), 0),
    "layers": (lambda m, x: m.out(F.relu(m.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)))), 0),
    "pool alone": (lambda m, x: m.pool(x), 0),
    "mean alone": (lambda m, x: x.mean((2, 3)), 0),
    "view": (lambda m, x: m.fc(m.pool(x).view(x.size(0), -1)), 0),
    "view of shape": (lambda m, x: m.fc(m.pool(x).reshape((x.shape[0], -1))), 0),
    "view of more": (lambda m, x: m.pool(x).view(x.size(0) * 2, -1), 4),
    "maxima": (lambda m, x: m.fc(x.amax((2, 3))), 2),
    "mean of rows": (lambda m, x: x.mean(2), 1),
    "mean of all": (lambda m, x: x.mean((1, 2, 3)), 1),
    "channels": (lambda m, x: x.flatten(1, 2).mean(2), 2),
    "half the image": (lambda m, x: F.adaptive_avg_pool2d(x, 2), 1),
    "square": (lambda m, x: m.fc(m.pool(x).flatten(1).square()), 2),
    "twice": (lambda m, x: m.pool(x) + x, 2),
}
