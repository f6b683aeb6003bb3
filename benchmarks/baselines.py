"""What is measured beside the package: torchvision's DenseNet, imported, never copied, and checkpointed references."""

import functools
import sys
import types
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_densenet.reference import DenseBlock, DenseLayer, DenseNet


def torchvision_densenets() -> Any:
    """The module ``torchvision.models.densenet``.

    torchvision's wheel for another build of torch (CUDA beside CPU, say) does not load its C++ operators, and then fails
    to describe them to the compiler. DenseNet uses none of them, so that registration is left out.

    Raises:
        SystemExit: torchvision is not installed; the message says how to install it.
    """
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    try:
        from torchvision.models import densenet
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error}: this benchmark measures against torchvision; pip install --no-deps torchvision pillow"
        ) from error
    return densenet


class Architecture(NamedTuple):
    growth_rate: int
    block_config: tuple[int, ...]
    num_init_features: int


NETWORKS = {
    "densenet121": Architecture(32, (6, 12, 24, 16), 64),
    "densenet169": Architecture(32, (6, 12, 32, 32), 64),
    "densenet201": Architecture(32, (6, 12, 48, 32), 64),
    "densenet161": Architecture(48, (6, 12, 36, 24), 96),
}


class CheckpointedBlock(DenseBlock):
    """The reference's block with torchvision's ``memory_efficient`` recipe."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in cast(Iterable[DenseLayer], self.children()):
            bottleneck = checkpoint(functools.partial(_concatenated_bottleneck, layer), *features, use_reentrant=False)
            features.append(layer.conv2(F.relu(layer.norm2(bottleneck))))
        return torch.cat(features, dim=1)


def _concatenated_bottleneck(layer: DenseLayer, *features: Tensor) -> Tensor:
    return layer.conv1(F.relu(layer.norm1(torch.cat(features, dim=1))))


def checkpointed(network: DenseNet) -> DenseNet:
    for module in network.modules():
        if type(module) is DenseBlock:
            module.__class__ = CheckpointedBlock
    return network
