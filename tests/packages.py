"""DenseNet-121 as each package builds it, with what its users feed it."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor, nn

with warnings.catch_warnings():  # of what the packages use themselves
    warnings.simplefilter("ignore")
    import segmentation_models_pytorch
    import timm
    import torchxrayvision
    from monai.networks.nets import densenet as monai_densenet


class Pooled(nn.Module):
    """A segmentation encoder with the mean of each of its feature maps, so that it has one output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: Any = segmentation_models_pytorch.encoders.get_encoder("densenet121", weights=None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([features.mean((2, 3)) for features in self.encoder(x)[1:]], dim=1)


class Package(NamedTuple):
    """How to build its DenseNet-121, an input's shape, and what stands before the names of its dense blocks.

    The last block sees two by two pixels. Batch statistics of fewer nearly divide by zero, and training amplifies
    rounding without limit; the volume's last stage, which sees one voxel, has its statistics frozen.
    """

    build: Callable[..., Any]
    shape: tuple[int, ...]
    prefix: str = "features."


PACKAGES: dict[str, Package] = {
    "torchvision": Package(lambda **o: peers.densenet121(num_classes=10, **o), (2, 3, 64, 64)),
    "timm": Package(lambda **o: timm.create_model("densenet121", num_classes=10, **o), (2, 3, 64, 64)),
    "monai": Package(lambda **o: monai_densenet.DenseNet121(2, 1, 10, **o), (2, 1, 64, 64)),
    "monai 3d": Package(lambda **o: monai_densenet.DenseNet121(3, 1, 2, **o), (2, 1, 32, 32, 32)),
    "torchxrayvision": Package(lambda **o: torchxrayvision.models.DenseNet(**o), (2, 1, 64, 64)),
    "segmentation_models_pytorch": Package(lambda: Pooled(), (2, 3, 64, 64), "encoder.features."),
}


def build(name: str, **options: Any) -> Any:
    """The package's network from the same seed every time, in float64."""
    torch.manual_seed(0)
    model = PACKAGES[name].build(**options).double()
    if len(PACKAGES[name].shape) == 5:
        for part in (model.features.denseblock4, model.features.norm5):
            part.eval()
    return model


def images(name: str) -> Tensor:
    return torch.randn(PACKAGES[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense_blocks(model: nn.Module, name: str) -> list[nn.Module]:
    return [model.get_submodule(f"{PACKAGES[name].prefix}denseblock{i}") for i in (1, 2, 3, 4)]
