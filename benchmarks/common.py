"""What the benchmarks share: fused copies of a network, options, JSON and plots."""

import contextlib
import copy
import json
import pathlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from fused_densenet import FusedDenseBlock, FusedTransition
from fused_densenet.nn.stem import FusedFeatures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
COLOURS = {
    "reference": "#b4413c",
    "reference, checkpointed": "#d99a3d",
    "ours": "#2a6f97",
    "ours, memory_efficient": "#4aa27a",
    "torchvision": "#7a5195",
    "torchvision, memory_efficient": "#b79ad0",
    "plain": "#8a8a8a",
    "ResNet": "#b4413c",
    "DenseNet": "#2a6f97",
    "CSPDenseNet": "#4aa27a",
}

console = Console(width=None if sys.stdout.isatty() else 140)


def fuse(network: nn.Module, *, memory_efficient: bool = False) -> nn.Module:
    """A copy of a DenseNet, torchvision's or built like it, whose blocks, transitions and stem run fused.

    They are the children of ``features`` named denseblock* and transition*, and ``norm0, relu0, pool0``; modules are
    named and hold their parameters as torchvision's do, and the weights are taken over.
    """
    network = copy.deepcopy(network)
    features = FusedFeatures(OrderedDict(network.get_submodule("features").named_children()))
    network.features = features
    for name, module in list(features.named_children()):
        if name.startswith("denseblock"):
            setattr(features, name, fused_block(module, memory_efficient=memory_efficient))
        elif name.startswith("transition"):
            setattr(features, name, fused_transition(module))
    return network


def fused_transition(transition: nn.Module) -> FusedTransition:
    """The FusedTransition with the sizes, parameters, device and dtype of ``transition``."""
    conv: Any = transition.get_submodule("conv")
    fused = FusedTransition(conv.in_channels, conv.out_channels, spatial_dims=conv.weight.dim() - 2)
    fused.load_state_dict(transition.state_dict())
    return fused.to(conv.weight.device, conv.weight.dtype).train(transition.training)


def fused_block(block: nn.Module, *, memory_efficient: bool = False) -> FusedDenseBlock:
    """The FusedDenseBlock with the sizes, parameters, device and dtype of ``block``."""
    layers = list(block.children())
    first = layers[0]
    conv1, bottleneck = first.get_submodule("conv1"), hasattr(first, "conv2")
    growth_rate = (first.get_submodule("conv2") if bottleneck else conv1).out_channels
    fused = FusedDenseBlock(
        len(layers),
        conv1.in_channels,
        conv1.out_channels // growth_rate if bottleneck else None,
        growth_rate,
        first.drop_rate,
        memory_efficient,
        spatial_dims=conv1.weight.dim() - 2,
    )
    fused.load_state_dict(block.state_dict())
    return fused.to(conv1.weight.device, conv1.weight.dtype).train(block.training)


def in_layout(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    """``network`` with its weights in a memory format."""
    return cast(Any, network).to(memory_format=layout)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; what it yields is called after each of ``total`` steps with a word about it."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def write_json(file: pathlib.Path, where: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    file.write_text(json.dumps({**where, **more, "rows": rows}, indent=1) + "\n")


def plot_axes(rows: int, columns: int, **figure: Any) -> tuple[Any, Any]:
    """A figure of ours and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    return plt.subplots(rows, columns, layout="constrained", **figure)


def save_plot(figure: Any, file: pathlib.Path) -> None:
    figure.savefig(file, dpi=150, bbox_inches="tight", facecolor="white")
