"""The parts of a dense layer, of whichever package, and what keeps the kernels from running it.

torchvision, timm and TorchXRayVision keep a layer's modules in the layer, MONAI in a Sequential called ``layers``; timm's
norms carry the activation; MONAI's dropout is a module, the others' a rate.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from types import FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..compilers import constant

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TIMMS_NORMS = ("BatchNormAct2d", "SyncBatchNormAct")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
SWITCHES = ("memory_efficient", "grad_checkpointing", "efficient")
"""Attributes of layers, of whichever package, that ask for bottlenecks to be computed again in backward."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where modules keep theirs."""
MODULES_OWN = frozenset(nn.Module().__dict__) | {"_is_init"}
"""Attributes that torch gives to every module."""
_NAMES = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2", "dropout")


class Stage(NamedTuple):
    """One norm-relu-conv, whose activation may be a leaky ReLU.

    Attributes:
        norm, conv: None where there is none of the names that messages call them by.
        activations: what is called between them, one after the other.
        names: what messages call the norm, its activation and the convolution.
        seen: whether their classes were seen to compute what torch's do, so that a subclass will do.
    """

    norm: Any
    activations: list[nn.Module]
    conv: Any
    names: tuple[str, str, str]
    seen: bool = False

    @property
    def slope(self) -> float:
        """Of its activation for negative numbers."""
        slope = 1.0
        for activation in self.activations:
            slope *= getattr(activation, "negative_slope", 0.0)
        return slope


class LayerParts(NamedTuple):
    """A dense layer taken apart.

    Attributes:
        name: what messages call the layer.
        layer: the module that is called for it, where there is one.
        modules: its modules by the name that messages call them by.
        stages: its norm-relu-convs, one or two.
        drop_rate: of the dropout at its end, 0 where it does nothing.
        drops_channels: whether its dropouts drop whole channels.
        changes: what is not as ``fuse`` found it; no reason against a block that was built fused.
    """

    name: str
    layer: nn.Module | None
    modules: Mapping[str, nn.Module]
    stages: list[Stage]
    drop_rate: float
    drops_channels: bool
    changes: Sequence[str] = ()
    drop_inside: float = 0.0
    """Of the dropout of its bottleneck."""


def take_apart(layer: nn.Module, name: str) -> LayerParts:
    """The parts of ``layer``, which messages call ``name``, as far as they are there."""
    modules: Any = layer._modules
    nested = modules.get("layers")
    in_turn = isinstance(nested, nn.Sequential)
    if in_turn:
        modules = nested._modules
    stages = [take_stage(modules, f"{name}.", number) for number in "12" if number == "1" or "conv2" in modules]
    names = _NAMES if in_turn else _NAMES[:-1]  # a forward of their own calls these, and drops by a rate
    dropout = modules.get("dropout") if in_turn else None
    if dropout is None:
        drop_rate, training = getattr(layer, "drop_rate", 0.0), layer.training
    else:
        drop_rate, training = getattr(dropout, "p", 0.0), dropout.training
    return LayerParts(
        name,
        layer,
        {f"{name}.{key}": module for key, module in modules.items()},
        stages,
        drop_rate if training else 0.0,
        isinstance(dropout, CHANNEL_DROPOUTS),
        unfit_keys(modules, names, name, "a dense layer", in_turn),
        getattr(layer, "bottleneck_drop_rate", 0.0) if layer.training and "conv2" in modules else 0.0,
    )


def unfit_keys(keys: Iterable[str], expected: Sequence[str], name: str, of: str, in_turn: bool) -> list[str]:
    """Why ``keys`` are not the ``expected`` ones, some of which may be missing; in that order where they are called ``in_turn``."""
    found = [key for key in keys if key in expected]
    unknown = [f"{name}.{key}".strip(".") for key in keys if key not in expected]
    reasons = [f"{key} is no part of {of}" for key in unknown]
    if in_turn and found != [key for key in expected if key in found]:
        reasons.append(f"{name or 'it'} calls {', '.join(found)} in this order")
    return reasons


def is_memory_efficient(layer: nn.Module) -> bool:
    """Whether a layer is set to compute its bottleneck again in backward."""
    return any(layer.__dict__.get(name, getattr(type(layer), name, False)) for name in SWITCHES)


def take_stage(modules: Mapping[str, Any], prefix: str = "", number: str = "") -> Stage:
    """The norm-relu-conv ``norm{number}``, ``relu{number}``, ``conv{number}`` of ``modules``."""
    norm, relu, conv = f"norm{number}", f"relu{number}", f"conv{number}"
    found = modules.get(norm)
    activations = [modules.get(relu), None if found is None else own_activation(found)]
    names = (prefix + norm, prefix + relu, prefix + conv)
    return Stage(found, [a for a in activations if a is not None], modules.get(conv), names)


def own_activation(norm: nn.Module) -> nn.Module | None:
    """The activation that a norm applies itself. One that torch converted from timm's has the module and ignores it."""
    return norm._modules.get("act") if _is_timms_norm(norm) else None


def structure_reasons(layers: Sequence[LayerParts], layer_class: type | None) -> list[str]:
    """Why layers that look like this cannot run fused, whatever the input; ``layer_class`` is the class they must have."""
    reasons = [reason for parts in layers for reason in _layer_reasons(parts, layers[0], layer_class)]
    return reasons or _width_reasons(layers)


def _layer_reasons(parts: LayerParts, first: LayerParts, layer_class: type | None) -> list[str]:
    if layer_class is not None and type(parts.layer) is not layer_class:
        return [f"{parts.name} is a {type(parts.layer).__name__}"]
    reasons = list(parts.changes)
    for stage in parts.stages:
        reasons += stage_reasons(stage)
    dropout = parts.modules.get(f"{parts.name}.dropout")
    if dropout is not None and type(dropout) not in (nn.Dropout, *CHANNEL_DROPOUTS):
        reasons.append(f"{parts.name}.dropout is a {type(dropout).__name__}")
    if len(parts.stages) != len(first.stages):
        reasons.append(f"{parts.name} has another number of convolutions than {first.name}")
    return reasons


def _width_reasons(layers: Sequence[LayerParts]) -> list[str]:
    """Where the channels that a layer reads are not those that the ones before it wrote."""
    reasons = []
    width = layers[0].stages[0].conv.weight.shape[1]
    for parts in layers:
        there = width
        for stage in parts.stages:
            made, read = stage.conv.weight.shape[:2]
            if widths_of(stage.norm) | {read} != {there}:
                reasons.append(f"{parts.name} reads {read} channels where there are {there}")
            there = made
        width += there
    return reasons


def widths_of(norm: Any) -> set[int]:
    """The channels that a norm's tensors are for, whatever it says of itself; none where it has no tensors."""
    return {t.shape[0] for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None}


def stage_reasons(stage: Stage) -> list[str]:
    """Why a norm-relu-conv cannot run fused."""
    norm, relu, conv = stage.names
    reasons = norm_relu_reasons(stage.norm, stage.activations, norm, relu, stage.seen)
    return reasons + convolution_reasons(stage.conv, conv, stage.seen)


def convolution_reasons(conv: Any, name: str, seen: bool = False) -> list[str]:
    """Why a convolution that messages call ``name`` cannot run fused."""
    if conv is None:
        return [f"{name} is missing"]
    if type(conv) not in CONVS and not (seen and isinstance(conv, CONVS)):
        return [f"{name} is a {type(conv).__name__}"]
    return [f"{name} {reason}" for reason in _conv_reasons(conv)]


def norm_relu_reasons(
    norm: Any, activations: Sequence[nn.Module], norm_name: str, relu_name: str, seen: bool = False, leaky: bool = True
) -> list[str]:
    """Why a norm and its activation cannot run fused; ``leaky`` tells whether one that is no ReLU can."""
    reasons = []
    if norm is None:
        reasons.append(f"{norm_name} is missing")
    elif not is_batch_norm(norm) and not (seen and isinstance(norm, NORMS)):
        reasons.append(f"{norm_name} is a {type(norm).__name__}")
    elif (norm.running_mean is None) != (norm.running_var is None):
        reasons.append(f"{norm_name} has only one of running_mean and running_var")
    elif not norm.eps > 0:  # torch's own take none in training
        reasons.append(f"{norm_name} has an eps of {norm.eps}")
    elif type(norm._modules.get("drop", _IDENTITY)) is not nn.Identity:
        reasons.append(f"{norm_name} contains a {type(norm.drop).__name__}")
    if not activations:
        lost = type(norm) is nn.SyncBatchNorm
        hint = " (torch's convert_sync_batchnorm drops that of timm's norms, timm.layers' keeps it)" if lost else ""
        reasons.append(f"{norm_name} is followed by no activation{hint}")
    for a in activations:
        if type(a) is nn.LeakyReLU and leaky:
            if not 0 <= a.negative_slope <= 1:
                reasons.append(f"{relu_name} has a slope of {a.negative_slope} for negative numbers")
        elif type(a) is not nn.ReLU:
            reasons.append(f"{relu_name} is a {type(a).__name__}")
    return reasons


_IDENTITY = nn.Identity()


def is_batch_norm(norm: nn.Module) -> bool:
    return type(norm) in NORMS or _is_timms_norm(norm)


def _is_timms_norm(norm: nn.Module) -> bool:
    return type(norm).__name__ in _TIMMS_NORMS and type(norm).__module__.startswith("timm.")


def _conv_reasons(conv: Any) -> list[str]:
    same = tuple([size // 2 for size in conv.kernel_size])
    reasons = []
    if conv.weight.dim() != len(conv.kernel_size) + 2:
        reasons.append("has a weight of another shape than its own")
    if conv.groups != 1 or {*conv.stride, *conv.dilation} != {1}:
        reasons.append("is grouped, strided or dilated")
    even = 0 in [size % 2 for size in conv.kernel_size]
    if conv.padding_mode != "zeros" or conv.padding not in ("same", same) or even:
        reasons.append("does not pad with zeros to the size of its input")
    return reasons


def intercepted(parts: LayerParts) -> list[str]:
    """The modules of a layer that something follows or replaces: hooks, or a ``forward`` of the instance."""
    around = []
    if parts.layer is not None:
        around = [(parts.name, parts.layer), (f"{parts.name}.layers", parts.layer._modules.get("layers"))]
    return interceptions(around) + interceptions(parts.modules.items())


def interceptions(named: Iterable[tuple[str, nn.Module | None]]) -> list[str]:
    """Which of the modules, or of those inside a norm, something follows or replaces."""
    reasons = []
    for name, module in named:
        if module is None:
            continue
        if has_hooks(module):
            reasons.append(f"{name} has hooks")
        if own_methods(module):
            reasons.append(f"{name} has a forward of its own")
        reasons += [f"{name}.{key} is a {type(t).__name__}" for key, t in foreign_tensors(module)]
        if module._modules and is_batch_norm(module):
            reasons += interceptions((f"{name}.{key}", inner) for key, inner in module._modules.items())
    return reasons


def foreign_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those of a module's own parameters and buffers whose class says itself what torch's functions make of them."""
    if torch.compiler.is_compiling():
        return []
    named = (*module._parameters.items(), *module._buffers.items())
    return [(key, t) for key, t in named if t is not None and _is_foreign(type(t))]


@functools.cache
def _is_foreign(kind: Any) -> bool:
    """Not torch's own classes: a parameter, those that compilers use, those that are sharded while nobody calls them."""
    asked, usual = (getattr(of.__torch_function__, "__func__", None) for of in (kind, torch.Tensor))
    asks = kind.__torch_function__ is not torch._C._disabled_torch_function_impl and asked is not usual
    dispatches = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return (asks or dispatches) and not kind.__module__.startswith("torch.")


def own_methods(module: nn.Module) -> list[str]:
    """The methods of its class that were assigned to the module itself."""
    return [name for name in method_names(own_class(module)) if name in module.__dict__]


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def replacements(named: Iterable[tuple[str, nn.Module | None]]) -> list[str]:
    """:func:`interceptions`, and :func:`patches` of the modules' classes."""
    listed = list(named)
    return interceptions(listed) + patches(kinds_of(module for _, module in listed))


_METHODS = ("forward", "_conv_forward", "_check_input_dim")
"""What a ``forward`` is made of, in torch's modules; any of them can be assigned to a module or to its class."""


@constant
def method_names(kind: type) -> tuple[str, ...]:
    """What a class's ``forward`` is made of, or may be: the methods of somebody else's class are not known."""
    return tuple(name for name, is_method in _attributes(kind).items() if is_method)


def attribute_names(kind: type) -> tuple[str, ...]:
    """:func:`method_names`, and the other attributes of somebody else's class."""
    return tuple(_attributes(kind))


def _attributes(kind: type) -> dict[str, bool]:
    """By name, whether it is a method."""
    if kind in _known_attributes:
        return _known_attributes[kind]
    theirs = [
        base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "fused_densenet.", "builtins"))
    ]
    found = dict.fromkeys(_METHODS, True)
    for base in theirs:
        for name, value in vars(base).items():
            if not name.startswith("__"):
                found.setdefault(name, isinstance(value, _FUNCTIONS))
    _known_attributes[kind] = found
    return found


def contents_of(value: Any) -> dict[Any, Any] | None:
    """What a dict, a sequence, a partial call or an object of somebody else's class holds; None of anything else."""
    if type(value) is dict:
        return value
    if type(value) in (list, tuple):
        return dict(enumerate(value))
    if type(value) is functools.partial:
        return {"func": value.func, **dict(enumerate(value.args)), **value.keywords}
    if isinstance(value, (nn.Module, torch.Tensor, type, FunctionType, ModuleType, Enum)):
        return None
    if type(value).__module__.startswith(("torch.", "fused_densenet.", "builtins", "functools")):
        return None
    held: dict[Any, Any] | None = getattr(value, "__dict__", None)
    return held if type(held) is dict else None


DEPTH = 4
"""Of dicts, sequences and objects in one another, how many are looked into."""


def dicts_within(value: Any, depth: int = DEPTH) -> Iterable[dict[Any, Any]]:
    """The dicts that say what is in it, and in what it holds; a sequence has none that a change of it would show in."""
    said = contents_of(value) if depth else None
    if said is not None:
        if type(value) not in (list, tuple, functools.partial):
            yield said
        for inner in list(said.values()):
            yield from dicts_within(inner, depth - 1)


_FUNCTIONS = (FunctionType, staticmethod, classmethod, property)
_known_attributes: WeakKeyDictionary[type, dict[str, bool]] = WeakKeyDictionary()


_seen: dict[type, list[Any]] = {}


def remember_methods(kind: type) -> None:
    """From here on :func:`patches` tells of another ``forward`` that is assigned to the class ``kind``."""
    _seen[kind] = methods_of(kind)


def patches(kinds: Iterable[type]) -> list[str]:
    """The classes whose ``forward`` was replaced since :func:`remember_methods`."""
    reasons = []
    for kind in kinds:
        if kind in _seen and _seen[kind] != methods_of(kind):
            reasons.append(f"the forward of {kind.__name__} was replaced")
    return reasons


def kinds_of(modules: Iterable[nn.Module | None]) -> Iterable[type]:
    return dict.fromkeys(type(module) for module in modules)


def own_class(module: nn.Module) -> type:
    """The class of a module; where ``fuse`` gave it another, the one that it had."""
    kind: type = getattr(type(module), "original_class", type(module))
    return kind


def is_everywhere(size: Any, number: int) -> bool:
    """Whether a window's size, stride or padding, a number or one for each dimension, is ``number``."""
    return set(size if isinstance(size, tuple | list) else (size,)) == {number}


def methods_of(kind: Any) -> list[Any]:
    """What a class's ``forward`` is made of."""
    return [getattr(kind, name, None) for name in method_names(kind)]


for _kind in (
    *NORMS,
    *CONVS,
    *CHANNEL_DROPOUTS,
    *(nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
):
    remember_methods(_kind)
