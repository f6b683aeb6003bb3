"""A module of somebody else's class runs fused where it stands: only its class changes, to one that inherits from both.

Parameters, keys, hooks, children and whoever holds a reference to the module notice nothing; what cannot run fused runs
through the module's own ``forward``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..fallback.anatomy import LayerParts, attribute_names, is_memory_efficient, own_methods, patches, remember_methods
from ..fallback.description import BlockDescription, ResidualDescription, TransitionDescription
from ..fallback.reasons import announce
from ..fallback.recording import warn_of_foreign_modes
from ..fallback.standing import Known
from ..nn.block import FusedDenseBlock
from ..nn.chain import Link
from ..nn.passage import Passage, alone, layout_of, passes_on
from ..nn.residual import FusedResidualDenseBlock, ResidualParts
from ..nn.stem import FusedFeatures
from ..nn.transition import FusedTransition, TransitionParts

Described = BlockDescription | TransitionDescription | ResidualDescription


@dataclass(frozen=True)
class _Settings:
    """What a replaced module needs beside what it has, seen when it is another; ``description`` is None where the names of its parts tell all."""

    memory_efficient: bool | None = None
    description: Any = None


def swap(module: Any, fused: type[nn.Module], description: Described | None = None) -> None:
    """Makes ``module`` run as ``fused``: FusedDenseBlock, FusedResidualDenseBlock, FusedTransition or FusedFeatures."""
    for part in module.modules():
        if not type(part).__module__.startswith("torch."):
            remember_methods(type(part))
    settings = _Settings(description=description)
    layer_class: Any = None
    if fused is FusedDenseBlock and not isinstance(description, BlockDescription):
        layer_class = type(next(module.children()))
    module.fused_settings = settings
    classes: Any = (type(module), fused, layer_class)
    module.__class__ = _fused_class(*classes)


def is_swapped(module: nn.Module) -> bool:
    """Whether the class of ``module`` is, or inherits from, one that :func:`swap` made."""
    return hasattr(type(module), "original_class")


def swap_back(module: Any) -> None:
    """Undoes :func:`swap`."""
    module.__dict__.pop("fused_settings", None)
    module.__class__ = type(module).original_class


def names_in_common(module: nn.Module, fused: type[nn.Module]) -> list[str]:
    """What a module could not be asked for any more, or what would be asked for in vain, if it were of a class ``fused``."""
    inside = {*module._modules, *module._parameters, *module._buffers}
    attributes = {*attribute_names(type(module)), *vars(module)}
    attributes -= {"memory_efficient", "num_input_features", "spatial_dims"}  # which mean the same there
    ours = {"made_of", "original_class", "fused_settings"}
    return sorted(n for n in inside | attributes if n in ours or (hasattr(fused, n) and not hasattr(nn.Module, n)))


@functools.cache
def _fused_class(original: Any, fused: Any, layer_class: Any) -> Any:
    """A class that runs as ``fused`` and is in everything else ``original``."""
    attributes: dict[str, Any] = {
        "__reduce_ex__": _reduce,
        "made_of": (original, fused, layer_class),
        "original_class": original,
    }
    if not issubclass(fused, FusedFeatures):  # a part of whose modules is one as well
        attributes |= {"__new__": _maker(original), "forward": _forward(original, fused)}
        attributes |= {"pass_on": _pass_on(original, fused), "link": _link(fused)}
    if fused is FusedDenseBlock:
        attributes |= {
            "_operator_by_operator": _operator_by_operator,
            "layer_class": layer_class,
            "memory_efficient": property(_get_memory_efficient, _set_memory_efficient),
            "prepends": property(functools.partial(_described, name="prepends")),
            "return_new": property(functools.partial(_described, name="returns_new")),
            "parts": _block_parts,
        }
    elif fused is FusedTransition:
        attributes |= {"_operator_by_operator": _operator_by_operator, "parts": _transition_parts}
    elif fused is FusedResidualDenseBlock:
        attributes |= {"_operator_by_operator": _operator_by_operator, "parts": _residual_parts}
    bases = (fused,) if issubclass(fused, original) else (original, fused)
    return type(fused.__name__, bases, attributes)


def _maker(original: Any) -> Callable[..., Any]:
    """What is built through the class of a fused module, as a slice of a ``nn.Sequential`` is, is not fused itself."""

    def make(cls: Any, *args: Any, **options: Any) -> Any:
        return original(*args, **options) if args or options else object.__new__(cls)

    return make


def _forward(original: Any, fused: Any) -> Callable[..., Any]:
    """Fused for a tensor alone; arguments that ``fused`` does not know go to the ``forward`` of ``original``."""

    @functools.wraps(original.forward)
    def forward(module: Any, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            warn_of_foreign_modes()
        x = args[0] if len(args) == 1 and not options else only_argument(original, args, options)
        if not isinstance(x, (Tensor, torch.fx.Proxy)):
            announce(OTHER_ARGUMENTS, fused.__name__)
            return original.forward(module, *args, **options)
        return alone(module, x)

    return passes_on(forward)


def _pass_on(original: Any, fused: Any) -> Callable[..., Tensor]:
    """``fused.pass_on`` between what its description says comes before and after."""

    def pass_on(module: Any, x: Tensor, passage: Passage, known: Known | None = None) -> Tensor:
        if not _has_units(module):
            return fused.pass_on(module, x, passage, known)
        around = around_layers(module)
        if around is None:
            announce(["it has other modules inside than when fuse was called"], fused.__name__)
            return passage.through_operators(functools.partial(original.forward, module), x)
        before, after = around
        if passage.layout is None and after and not torch.compiler.is_compiling():
            passage.layout = layout_of(x)  # what comes after may draw random numbers in the order of memory
        for name in before:
            x = passage.through(module._modules[name], x)
        x = fused.pass_on(module, x, passage)
        for name in after:
            x = passage.through(module._modules[name], x)
        return x

    return pass_on


def _link(fused: Any) -> Callable[..., Link | None]:
    return lambda module, plan: None if _has_units(module) else fused.link(module, plan)


def around_layers(module: Any) -> tuple[list[str], list[str]] | None:
    """The children that a block's module calls before and behind its layers; None where there are none, or not those that were."""
    if not is_swapped(module) or not _has_units(module):
        return None
    description = module.fused_settings.description
    before, after = list(description.before), list(description.after)
    children = [name for name, child in module._modules.items() if child is not None]
    return (before, after) if children == [*before, *description.units, *after] else None


def _has_units(module: Any) -> bool:
    """Whether a block's layers are not all that its module calls."""
    description = module.fused_settings.description
    return type(description) is BlockDescription and bool(description.units)


OTHER_ARGUMENTS = ["it was called with other arguments than a tensor"]


def only_argument(original: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The first argument of a call of ``original``; None where there are others that are not at their defaults.

    Raises:
        TypeError: the arguments are not those of its ``forward``.
    """
    signature = inspect.signature(original.forward)
    (_, first), *others = list(signature.bind(None, *args, **options).arguments.items())[1:] or [("", None)]
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    given = [name for name, value in others if value is not defaults[name] and not _is_default(value, defaults[name])]
    return None if given else first


def _is_default(value: Any, default: Any) -> bool:
    """Of plain values; whatever else compares equal, a tensor of ones for one, is another argument."""
    return isinstance(value, bool | int | float | str | tuple) and type(value) is type(default) and value == default


def _operator_by_operator(module: Any, x: Tensor) -> Tensor:
    """By the modules' own ``forward``, as it is at the time of the call."""
    if _has_units(module):
        for name in module.fused_settings.description.units:
            x = module._modules[name](x)
        return x
    return module.original_class.forward(module, x)


def _block_parts(block: Any) -> list[LayerParts]:
    description = block.fused_settings.description
    parts = FusedDenseBlock.parts(block) if description is None else description.parts(block)
    changes = _patched(block)
    return [parts[0]._replace(changes=[*changes, *parts[0].changes]), *parts[1:]] if changes else parts


def _transition_parts(transition: Any) -> TransitionParts:
    description = transition.fused_settings.description
    parts = FusedTransition.parts(transition) if description is None else described_transition(transition, description)
    return parts._replace(changes=[*_patched(transition), *parts.changes])


def _residual_parts(block: Any) -> ResidualParts:
    parts = described_residual(block, block.fused_settings.description)
    return parts._replace(changes=[*_patched(block), *parts.changes])


def described_residual(block: nn.Module, description: ResidualDescription) -> ResidualParts:
    """A dense block without norms, taken apart by its description."""
    return ResidualParts(*description.parts(block), seen=True)


def described_transition(transition: nn.Module, description: TransitionDescription) -> TransitionParts:
    """A transition, taken apart by its description."""
    return TransitionParts(*description.parts(transition))


def _patched(module: Any) -> list[str]:
    """Of the methods of its class; ``forward`` of the module itself is what is called in any case."""
    replaced = [f"its {name} was replaced" for name in own_methods(module) if name != "forward"]
    return patches([module.original_class]) + replaced


def _described(block: Any, name: str) -> bool:
    return bool(getattr(block.fused_settings.description, name, False))


def _get_memory_efficient(block: Any) -> bool:
    settings = block.fused_settings
    if settings.memory_efficient is None:
        if settings.description is None:
            return any(map(is_memory_efficient, block.children()))
        return settings.description.is_memory_efficient(block)
    return settings.memory_efficient


def _set_memory_efficient(block: Any, value: bool) -> None:
    block.fused_settings = dataclasses.replace(block.fused_settings, memory_efficient=value)


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """To copy and to pickle: the class is made again where it is needed."""
    state = object.__reduce_ex__(module, protocol)[2:]
    return (_new, module.made_of, *state)


def _new(original: Any, fused: Any, layer_class: Any) -> Any:
    """Under ``torch.load(weights_only=True)`` a class made of such that are allowed is allowed."""
    made = _fused_class(original, fused, layer_class)
    allowed = torch.serialization.get_safe_globals()
    if all(cls is None or cls in allowed for cls in made.made_of):
        torch.serialization.add_safe_globals([made])
    return object.__new__(made)
