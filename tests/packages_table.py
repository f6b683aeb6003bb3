"""What ``fuse`` makes of dense networks of packages and of public code: the rows of docs/packages.md.

    python tests/packages_table.py

Each network takes a training step and an inference in float64 before and after ``fuse``; results, gradients and buffers
must agree. Packages that are not installed are left out and named at the end.
"""

import copy
import importlib
import importlib.metadata
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import residual_networks
import torch
from networks import assert_same_step
from rebuilt_networks import NETWORKS, built
from small_networks import results
from torch import nn

from fused_densenet import FusedDenseBlock, FusedFeatures, FusedResidualDenseBlock, FusedTransition, explain, fuse

# basicsr imports a module that torchvision has no more. Its networks need nothing of it.
_gone = types.ModuleType("torchvision.transforms.functional_tensor")
_gone.rgb_to_grayscale = None  # type: ignore[attr-defined]
sys.modules.setdefault(_gone.__name__, _gone)


class Network(NamedTuple):
    """A network of a package: the function that builds it, its arguments, and an image's shape; none to build it only."""

    package: str
    function: str
    arguments: tuple[Any, ...] = ()
    shape: tuple[int, ...] | None = (2, 3, 64, 64)


PACKAGES = [
    Network("torchvision", "peers.densenet121"),
    Network("timm", "timm.create_model", ("densenet121",)),
    Network("timm", "timm.create_model", ("densenetblur121d",)),
    Network("timm", "timm.create_model", ("rdnet_tiny",)),
    Network("timm", "timm.create_model", ("dpn68",), None),
    Network("monai", "monai.networks.nets.DenseNet121", (2, 1, 10), (2, 1, 64, 64)),
    Network("monai", "monai.networks.nets.HoVerNet", (), None),
    Network("monai", "monai.networks.nets.AHNet", (), None),
    Network("torchxrayvision", "torchxrayvision.models.DenseNet", (), (2, 1, 64, 64)),
    Network("segmentation_models_pytorch", "segmentation_models_pytorch.Unet", ("densenet121", 5, None), None),
    Network("pytorchcv", "pytorchcv.models.densenet.densenet121", (), (2, 3, 224, 224)),
    Network("pytorchcv", "pytorchcv.models.densenet_cifar.densenet40_k12_cifar10", (), (2, 3, 32, 32)),
    Network("pytorchcv", "pytorchcv.models.densenet_cifar.densenet40_k12_bc_cifar10", (), (2, 3, 32, 32)),
    Network("pytorchcv", "pytorchcv.models.ibndensenet.ibn_densenet121", (), None),
    Network("pytorchcv", "pytorchcv.models.condensenet.condensenet74_c4_g4", (), None),
    Network("pytorchcv", "pytorchcv.models.peleenet.peleenet", (), None),
    Network("timm_3d", "timm_3d.create_model", ("densenet121",), None),
    Network("basicsr", "basicsr.archs.rrdbnet_arch.RRDBNet", (3, 3), (1, 3, 8, 8)),
    Network("spandrel", "spandrel.architectures.ESRGAN.__arch.RRDB.RRDBNet", (), (1, 3, 8, 8)),
    Network("torchsr", "torchsr.models.rdn", (2,), (1, 3, 8, 8)),
    Network("mmpretrain", "mmpretrain.models.backbones.densenet.DenseNet", ("121",), None),
]


def fused_row(label: str, name: str, model: nn.Module, shape: tuple[int, ...] | None) -> str:
    """A row of the table for a network, after its fused copy was compared with it."""
    theirs = model.double()
    ours = copy.deepcopy(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuse(ours)
        if shape is not None:
            x = torch.randn(shape, dtype=torch.float64)
            for training in (True, False):
                assert_same_step(results(ours.train(training), x), results(theirs.train(training), x))
        report = explain(ours)
    counts = [
        f"{sum(isinstance(m, kind) for m in ours.modules())} of {len(reports)}" if reports else "–"
        for kind, reports in (
            ((FusedDenseBlock, FusedResidualDenseBlock), report.blocks),
            (FusedTransition, report.transitions),
            (FusedFeatures, report.stems),
        )
    ]
    left = [r.reasons[0] for r in (*report.blocks, *report.transitions, *report.stems) if not r.fused]
    return f"| {label} | {name} | {' | '.join(counts)} | {'; '.join(dict.fromkeys(left))} |"


def build(network: Network) -> nn.Module:
    module, _, function = network.function.rpartition(".")
    torch.manual_seed(0)
    made: nn.Module = getattr(importlib.import_module(module), function)(*network.arguments)
    return made


def package_row(network: Network) -> str:
    model, name = build(network), str(network.arguments[0] if network.function.endswith("create_model") else "")
    version = importlib.metadata.version(network.package)
    return fused_row(f"{network.package} {version}", name or network.function.rpartition(".")[2], model, network.shape)


def rebuilt_row(name: str) -> str:
    torch.manual_seed(0)
    model = built(name) if name in NETWORKS else residual_networks.NETWORKS[name][0]()
    return fused_row("rebuilt", name, model, (3, 3, 12, 14))


def rows() -> Iterator[str]:
    missing = []
    for network in PACKAGES:
        try:
            yield package_row(network)
        except ModuleNotFoundError:
            missing.append(network.package)
    for name in (*NETWORKS, *residual_networks.NETWORKS):
        yield rebuilt_row(name)
    if missing:
        yield f"not installed: {', '.join(dict.fromkeys(missing))}"


if __name__ == "__main__":
    for line in rows():
        print(line, flush=True)
