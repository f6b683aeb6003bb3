"""``fuse``: the dense blocks of a network that somebody else built, run fused where they stand.

A block keeps its identity: only its class changes, to one that inherits from its own class and from
:class:`FusedDenseBlock`. Parameters, keys, hooks, children and whoever holds a reference to it notice nothing; what
cannot run fused runs through the block's own ``forward``.
"""

import copy
import functools
import logging
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from .backends import use_backend
from .fallback import FallbackError
from .fallback import strict as strict_mode
from .layers import structure_reasons, take_apart
from .modules import FusedDenseBlock

Module = TypeVar("Module", bound=nn.Module)
_logger = logging.getLogger("fused_densenet")

KNOWN_BLOCKS = [
    [("torchvision.models.densenet", "_DenseBlock"), ("torchvision.models.densenet", "_DenseLayer")],
    [("timm.models.densenet", "DenseBlock"), ("timm.models.densenet", "DenseLayer")],
    [("monai.networks.nets.densenet", "_DenseBlock"), ("monai.networks.nets.densenet", "_DenseLayer")],
    [("torchxrayvision.models", "_DenseBlock"), ("torchxrayvision.models", "_DenseLayer")],
]
"""Blocks and their layers by module and class, whose ``forward`` is known; others are tried on a small input."""


@dataclass
class Finding:
    """A module that is a dense block or looks like one.

    Attributes:
        name: in the model that was searched.
        module: the module itself.
        reasons: what keeps it from being replaced; empty if nothing does.
    """

    name: str
    module: nn.Module
    reasons: list[str] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        return isinstance(self.module, FusedDenseBlock)


def fuse(model: Module, *, memory_efficient: bool | None = None, strict: bool = False) -> Module:
    """Lets every dense block that it recognises in ``model`` run fused, in place.

    Recognised are the blocks of torchvision, timm, MONAI (1, 2 and 3 dimensions), TorchXRayVision and
    segmentation_models_pytorch, and any other module of ``denselayer1, denselayer2, ...`` with ``norm1, relu1, conv1``
    (and ``norm2, relu2, conv2``) that computes the same on a small random input. None of these packages is imported.
    Parameters stay the same objects, state_dict keys and hooks as they are. What was found is logged at level INFO by the
    logger ``fused_densenet``, and ``print(fused_densenet.explain(model))`` shows it.

    Args:
        model: the network, or a block itself.
        memory_efficient: compute the bottlenecks again in backward instead of keeping them; None keeps each block's own
            setting (``memory_efficient`` of torchvision's layers, ``grad_checkpointing`` of timm's).
        strict: raise where a module looks like a dense block and cannot be fused.

    Returns:
        ``model``.

    Raises:
        TypeError: a bad argument.
        FallbackError: with ``strict``, naming each module and the reasons; nothing is replaced then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(memory_efficient, bool | None):
        raise TypeError(f"memory_efficient: expected True, False or None, got {type(memory_efficient).__name__}")
    findings = survey(model)
    left = [f"{f.name or 'the model itself'}: {'; '.join(f.reasons)}" for f in findings if f.reasons]
    if strict and left:
        raise FallbackError("not every dense block can be fused: " + "\n".join(left))
    for finding in findings:
        block: Any = finding.module
        if not finding.reasons and not finding.fused:
            _swap(block)
        if finding.fused and memory_efficient is not None:
            block.memory_efficient = memory_efficient
    _logger.info("%d dense blocks of %s run fused", sum(f.fused for f in findings), type(model).__name__)
    for line in left:
        _logger.info("not fused: %s", line)
    return model


def unfuse(model: Module) -> Module:
    """Undoes :func:`fuse`, in place: every block that it replaced is of its own class again. Returns ``model``.

    Raises:
        RuntimeError: the class of a fused block was changed afterwards (by ``fully_shard``, say).
    """
    fused = [(name, module) for name, module in model.named_modules() if hasattr(type(module), "original_class")]
    for name, module in fused:
        if "original_class" not in type(module).__dict__:
            raise RuntimeError(f"{name}: expected the class that fuse gave it, got {type(module).__name__}")
    for _, module in fused:
        del module.fused_settings
        module.__class__ = type(module).original_class
    return model


def survey(model: nn.Module) -> list[Finding]:
    """Every dense block of ``model``, fused or not, and everything that looks like one."""
    findings: list[Finding] = []
    for name, module in model.named_modules():
        if isinstance(module, FusedDenseBlock):
            findings.append(Finding(name, module))
        elif _consists_of_layers(module):
            findings.append(Finding(name, module, _obstacles(module)))
        elif re.search("dense_?block", _class_name(module), re.IGNORECASE):
            findings.append(Finding(name, module, ["it does not consist of denselayer1, denselayer2, ..."]))
    return [f for f in findings if not any(_is_inside(other.name, f.name) for other in findings)]


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and name.startswith(f"{outer}." if outer else "")


def _class_name(module: nn.Module) -> str:
    scripted = getattr(module, "original_name", None)
    return scripted if isinstance(scripted, str) else type(module).__name__


def _consists_of_layers(module: nn.Module) -> bool:
    names = module._modules.keys()
    return bool(names) and all(re.fullmatch(r"denselayer\d+", name) for name in names)


def _obstacles(block: nn.Module) -> list[str]:
    """Why a module that consists of denselayers cannot be fused."""
    if isinstance(block, torch.jit.ScriptModule):
        return ["it is scripted; fuse the network before torch.jit.script"]
    layers = [take_apart(layer) for layer in block.children()]
    layer_class = type(layers[0].layer)
    reasons = structure_reasons(layers, layer_class)
    if block._parameters or block._buffers:
        reasons.append("it has parameters or buffers of its own")
    if "forward" in block.__dict__:
        reasons.append("its forward was replaced")
    names = [(cls.__module__, cls.__name__) for cls in (type(block), layer_class)]
    if not reasons and names not in KNOWN_BLOCKS:
        reasons += _trial(block)
    return reasons


def _trial(block: nn.Module) -> list[str]:
    """Compares a copy's own ``forward`` with the fused one in float64, in training and in eval mode."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            own = copy.deepcopy(block).to("cpu", torch.float64)
            for module in own.modules():
                for hooks in (module._forward_hooks, module._forward_pre_hooks):
                    hooks.clear()
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                        if tensor is not None:
                            tensor.uniform_(0.5, 1.5)
            fused: Any = copy.deepcopy(own)
            _swap(fused)
            x = torch.randn(2, fused.num_input_features, *[4] * fused.spatial_dims, dtype=torch.float64, device="cpu")
            for training in (True, False):
                results = []
                for module in (own, fused):
                    torch.manual_seed(0)
                    with use_backend("eager"), strict_mode():
                        results.append([module.train(training)(x), *module.buffers()])
                if not all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(*results, strict=True)):
                    return [f"the forward of {type(block).__name__} computes something else than a dense block"]
    except Exception as error:  # it is somebody else's code: whatever it raises, it cannot be fused
        return [f"the forward of {type(block).__name__} could not be tried: {type(error).__name__}: {error}"]
    return []


@dataclass
class _Settings:
    """What a replaced block needs beside what it has."""

    num_input_features: int
    spatial_dims: int
    memory_efficient: bool | None = None


def _swap(block: Any) -> None:
    parts = take_apart(next(block.children()))
    conv = parts.stages[0].conv
    classes: Any = (type(block), type(parts.layer))
    block.__class__ = _fused_class(*classes)
    block.fused_settings = _Settings(conv.in_channels, conv.weight.dim() - 2)


@functools.cache
def _fused_class(original: Any, layer_class: Any) -> Any:
    """A class that runs as FusedDenseBlock and is in everything else ``original``."""
    attributes = {
        "__reduce_ex__": _reduce,
        "_operator_by_operator": original.forward,
        "forward": FusedDenseBlock.forward,
        "layer_class": layer_class,
        "memory_efficient": property(_get_memory_efficient, _set_memory_efficient),
        "num_input_features": property(lambda block: block.fused_settings.num_input_features),
        "original_class": original,
        "spatial_dims": property(lambda block: block.fused_settings.spatial_dims),
    }
    return type(FusedDenseBlock.__name__, (original, FusedDenseBlock), attributes)


def _get_memory_efficient(block: Any) -> bool:
    setting = block.fused_settings.memory_efficient
    return any(parts.memory_efficient for parts in block.parts()) if setting is None else setting


def _set_memory_efficient(block: Any, value: bool) -> None:
    block.fused_settings.memory_efficient = value


def _reduce(block: Any, protocol: Any) -> tuple[Any, ...]:
    """To copy and to pickle: the class is made again where it is needed."""
    state = object.__reduce_ex__(block, protocol)[2:]
    return (_new, (block.original_class, block.layer_class), *state)


def _new(original: Any, layer_class: Any) -> Any:
    fused = _fused_class(original, layer_class)
    return fused.__new__(fused)
