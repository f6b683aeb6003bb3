"""The parts of a dense layer, of whichever package, and what keeps the kernels from running it.

torchvision, timm and TorchXRayVision keep a layer's modules in the layer, MONAI in a Sequential called ``layers``; timm's
norms carry the activation; MONAI's dropout is a module, the others' a rate.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TIMMS_NORMS = ("BatchNormAct2d", "SyncBatchNormAct")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_NAMES = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2", "dropout")


class Stage(NamedTuple):
    """One norm-relu-conv of a layer. ``norm`` and ``conv`` are None where the layer has none of that name."""

    norm: Any
    activations: list[nn.Module]
    conv: Any


class LayerParts(NamedTuple):
    """A dense layer taken apart.

    Attributes:
        layer: the layer itself.
        modules: its modules by name.
        stages: its norm-relu-convs, one or two.
        drop_rate: of the dropout at its end, 0 where it does nothing.
        drops_channels: whether that dropout drops whole channels.
    """

    layer: nn.Module
    modules: Mapping[str, nn.Module]
    stages: list[Stage]
    drop_rate: float
    drops_channels: bool


def take_apart(layer: nn.Module) -> LayerParts:
    """The parts of ``layer``, as far as they are there."""
    modules: Any = layer._modules
    nested = modules.get("layers")
    if isinstance(nested, nn.Sequential):
        modules = nested._modules
    stages = [take_stage(modules, number) for number in "12" if number == "1" or "conv2" in modules]
    dropout = modules.get("dropout")
    if dropout is None:
        drop_rate, training = getattr(layer, "drop_rate", 0.0), layer.training
    else:
        drop_rate, training = getattr(dropout, "p", 0.0), dropout.training
    return LayerParts(
        layer,
        modules,
        stages,
        drop_rate if training else 0.0,
        isinstance(dropout, _CHANNEL_DROPOUTS),
    )


def is_memory_efficient(layer: nn.Module) -> bool:
    """Whether a layer is set to compute its bottleneck again in backward."""
    return any(getattr(layer, name, False) for name in ("memory_efficient", "grad_checkpointing"))


def take_stage(modules: Mapping[str, Any], number: str) -> Stage:
    """The norm-relu-conv ``norm{number}``, ``relu{number}``, ``conv{number}`` of ``modules``."""
    norm = modules.get(f"norm{number}")
    activations = [modules.get(f"relu{number}"), None if norm is None else own_activation(norm)]
    return Stage(norm, [a for a in activations if a is not None], modules.get(f"conv{number}"))


def own_activation(norm: nn.Module) -> nn.Module | None:
    """The activation that a norm applies itself. One that torch converted from timm's has the module and ignores it."""
    return norm._modules.get("act") if _is_timms_norm(norm) else None


def structure_reasons(layers: Sequence[LayerParts], layer_class: type) -> list[str]:
    """Why layers that look like this cannot run fused, whatever the input; ``layer_class`` is the class they must have."""
    reasons = []
    for number, parts in enumerate(layers, 1):
        reasons += [f"denselayer{number}{reason}" for reason in _layer_reasons(parts, layers[0], layer_class)]
    return reasons or _width_reasons(layers)


def _layer_reasons(parts: LayerParts, first: LayerParts, layer_class: type) -> list[str]:
    if type(parts.layer) is not layer_class:
        return [f" is a {type(parts.layer).__name__}"]
    reasons = [f".{name} is no part of a dense layer" for name in parts.modules if name not in _NAMES]
    for number, stage in enumerate(parts.stages, 1):
        reasons += [f".{reason}" for reason in stage_reasons(stage, str(number))]
    dropout = parts.modules.get("dropout")
    if dropout is not None and type(dropout) not in (nn.Dropout, *_CHANNEL_DROPOUTS):
        reasons.append(f".dropout is a {type(dropout).__name__}")
    if len(parts.stages) != len(first.stages):
        reasons.append(" has another number of convolutions than denselayer1")
    return reasons


def _width_reasons(layers: Sequence[LayerParts]) -> list[str]:
    """Where the channels that a layer reads are not those that the ones before it wrote."""
    reasons = []
    width, bottleneck = layers[0].stages[0].conv.in_channels, layers[0].stages[0].conv.out_channels
    for number, parts in enumerate(layers, 1):
        for stage, read in zip(parts.stages, (width, bottleneck), strict=False):
            if {stage.norm.num_features, stage.conv.in_channels} != {read}:
                reasons.append(f"denselayer{number} reads {stage.norm.num_features} channels where there are {read}")
        if len(parts.stages) == 2 and parts.stages[0].conv.out_channels != bottleneck:
            reasons.append(f"denselayer{number}.conv1 is of another width than denselayer1's")
        width += parts.stages[-1].conv.out_channels
    return reasons


def stage_reasons(stage: Stage, number: str) -> list[str]:
    """Why a norm-relu-conv cannot run fused; its modules are called ``norm{number}`` and so on."""
    reasons = norm_relu_reasons(stage.norm, stage.activations, f"norm{number}", f"relu{number}")
    if stage.conv is None:
        reasons.append(f"conv{number} is missing")
    elif type(stage.conv) not in _CONVS:
        reasons.append(f"conv{number} is a {type(stage.conv).__name__}")
    else:
        reasons += [f"conv{number} {reason}" for reason in _conv_reasons(stage.conv)]
    return reasons


def norm_relu_reasons(norm: Any, activations: Sequence[nn.Module], norm_name: str, relu_name: str) -> list[str]:
    reasons = []
    if norm is None:
        reasons.append(f"{norm_name} is missing")
    elif not is_batch_norm(norm):
        reasons.append(f"{norm_name} is a {type(norm).__name__}")
    elif type(norm._modules.get("drop", _IDENTITY)) is not nn.Identity:
        reasons.append(f"{norm_name} contains a {type(norm.drop).__name__}")
    if not activations:
        lost = type(norm) is nn.SyncBatchNorm
        hint = " (torch's convert_sync_batchnorm drops that of timm's norms, timm.layers' keeps it)" if lost else ""
        reasons.append(f"{norm_name} is followed by no activation{hint}")
    return reasons + [f"{relu_name} is a {type(a).__name__}" for a in activations if type(a) is not nn.ReLU]


_IDENTITY = nn.Identity()


def is_batch_norm(norm: nn.Module) -> bool:
    return type(norm) in _NORMS or _is_timms_norm(norm)


def _is_timms_norm(norm: nn.Module) -> bool:
    return type(norm).__name__ in _TIMMS_NORMS and type(norm).__module__.startswith("timm.")


def _conv_reasons(conv: Any) -> list[str]:
    same = tuple([size // 2 for size in conv.kernel_size])
    reasons = []
    if conv.bias is not None:
        reasons.append("has a bias")
    if conv.groups != 1 or {*conv.stride, *conv.dilation} != {1}:
        reasons.append("is grouped, strided or dilated")
    even = 0 in [size % 2 for size in conv.kernel_size]
    if conv.padding_mode != "zeros" or conv.padding not in ("same", same) or even:
        reasons.append("does not pad with zeros to the size of its input")
    return reasons


def intercepted(parts: LayerParts) -> list[str]:
    """The modules of a layer that something follows or replaces: hooks, or a ``forward`` of the instance."""
    nested = parts.layer._modules.get("layers")
    around = [("", parts.layer)] if nested is None else [("", parts.layer), (".layers", nested)]
    return interceptions(around) + interceptions(parts.modules.items(), ".")


def interceptions(named: Iterable[tuple[str, nn.Module | None]], prefix: str = "") -> list[str]:
    """Which of the modules, or of those inside a norm, something follows or replaces."""
    reasons = []
    for name, module in named:
        if module is None:
            continue
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            reasons.append(f"{prefix}{name} has hooks")
        if "forward" in module.__dict__:
            reasons.append(f"{prefix}{name} has a forward of its own")
        if module._modules and is_batch_norm(module):
            reasons += interceptions(module._modules.items(), f"{prefix}{name}.")
    return reasons
