"""A small network, and what two of them produce in one step, compared where batch norms make gradients cancel."""

from collections.abc import Mapping
from typing import Any

import peers
import torch
from tolerances import assert_same, tolerance
from torch import Tensor, nn

from fused_densenet import FusedDenseBlock, FusedFeatures, FusedTransition


def assert_same_step(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Results of ``blocks.step`` in float64; a gradient's error is measured by the largest gradient of all.

    The loss does not depend on the scale of what a batch norm reads, so the gradient of a norm just before it is a sum
    of large terms that is zero but for rounding.
    """
    assert actual.keys() == expected.keys()
    gradients = [name for name in expected if name.endswith("gradient")]
    limit = tolerance("float64 whole block") * max(expected[name].abs().max().item() for name in gradients)
    for name in gradients:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
    rest = expected.keys() - set(gradients)
    assert_same({n: actual[n] for n in rest}, {n: expected[n] for n in rest}, "float64 whole block")


def torchvisions(**options: Any) -> nn.Module:
    """A small torchvision DenseNet in float64 for 32x32 images, its norms not at their initial ones and zeros."""
    network = peers.DenseNet(8, (2, 2), 16, bn_size=2, num_classes=5, **options).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


def sequence() -> FusedFeatures:
    """A stem's norm, ReLU and pooling, a block, a transition that pools and a block: what runs as one. 8 channels."""
    modules = nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), FusedDenseBlock(2, 8, 2, 8)
    features = FusedFeatures(*modules, FusedTransition(24, 16), FusedDenseBlock(2, 16, None, 8))
    for module in features.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return features


def pooled(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output, and all gradients as one: some of them are nearly zero, and nothing but rounding."""
    gradients = [t.flatten() for name, t in sorted(results.items()) if name.endswith("gradient")]
    return {"output": results["output"]} | ({"whole gradient": torch.cat(gradients)} if gradients else {})


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)
