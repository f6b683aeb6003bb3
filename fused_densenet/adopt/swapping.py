"""A module of somebody else's class runs fused where it stands: only its class changes, to one that inherits from both.

Parameters, keys, hooks, children and whoever holds a reference to the module notice nothing; what cannot run fused runs
through the module's own ``forward``.
"""

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..fallback.anatomy import is_memory_efficient, take_apart
from ..nn.block import FusedDenseBlock


@dataclass
class _Settings:
    """What a replaced block needs beside what it has."""

    num_input_features: int
    spatial_dims: int
    memory_efficient: bool | None = None


def swap(module: Any, fused: type[nn.Module]) -> None:
    """Makes ``module`` run as ``fused``: FusedDenseBlock, FusedTransition or FusedFeatures."""
    layer_class: Any = None
    if fused is FusedDenseBlock:
        parts = take_apart(next(module.children()))
        conv = parts.stages[0].conv
        layer_class = type(parts.layer)
        module.fused_settings = _Settings(conv.in_channels, conv.weight.dim() - 2)
    classes: Any = (type(module), fused, layer_class)
    module.__class__ = _fused_class(*classes)


def is_swapped(module: nn.Module) -> bool:
    """Whether the class of ``module`` is, or inherits from, one that :func:`swap` made."""
    return hasattr(type(module), "original_class")


def swap_back(module: Any) -> None:
    """Undoes :func:`swap`."""
    module.__dict__.pop("fused_settings", None)
    module.__class__ = type(module).original_class


@functools.cache
def _fused_class(original: Any, fused: Any, layer_class: Any) -> Any:
    """A class that runs as ``fused`` and is in everything else ``original``."""
    attributes = {
        "__reduce_ex__": _reduce,
        "_operator_by_operator": lambda module, x: original.forward(module, x),  # as it is at the time of the call
        "forward": fused.forward,
        "made_of": (original, fused, layer_class),
        "original_class": original,
    }
    if fused is FusedDenseBlock:
        attributes |= {
            "layer_class": layer_class,
            "memory_efficient": property(_get_memory_efficient, _set_memory_efficient),
            "num_input_features": property(lambda block: block.fused_settings.num_input_features),
            "spatial_dims": property(lambda block: block.fused_settings.spatial_dims),
        }
    bases = (fused,) if issubclass(fused, original) else (original, fused)
    return type(fused.__name__, bases, attributes)


def _get_memory_efficient(block: Any) -> bool:
    setting = block.fused_settings.memory_efficient
    return any(map(is_memory_efficient, block.children())) if setting is None else setting


def _set_memory_efficient(block: Any, value: bool) -> None:
    block.fused_settings.memory_efficient = value


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """To copy and to pickle: the class is made again where it is needed."""
    state = object.__reduce_ex__(module, protocol)[2:]
    return (_new, module.made_of, *state)


def _new(original: Any, fused: Any, layer_class: Any) -> Any:
    made = _fused_class(original, fused, layer_class)
    return made.__new__(made)
