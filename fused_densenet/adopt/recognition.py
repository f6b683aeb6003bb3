"""Finds the dense blocks and transitions of a network, by class or by what they compute; no package is imported for it."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..fallback.anatomy import CONVS, NORMS, kinds_of, own_class, patches, structure_reasons, take_apart
from ..fallback.description import BlockDescription, ResidualDescription
from ..fallback.reasons import structure_and_hook_reasons
from ..nn.block import FusedDenseBlock
from ..nn.residual import FusedResidualDenseBlock
from ..nn.stem import FusedFeatures, run_at
from ..nn.transition import FusedTransition
from .interpretation import read_block, read_residual, read_transition
from .swapping import Described, described_residual, described_transition, names_in_common
from .trial import differs, observe, read

_PACKAGES = {
    "torchvision.models.densenet": {"_DenseBlock", "_DenseLayer", "_Transition"},
    "timm.models.densenet": {"DenseBlock", "DenseLayer", "DenseTransition"},
    "monai.networks.nets.densenet": {"_DenseBlock", "_DenseLayer", "_Transition"},
    "torchxrayvision.models": {"_DenseBlock", "_DenseLayer", "_Transition"},
}
"""Classes whose ``forward`` is known, by module; what any other class computes is found out on a small input."""

_CALL_PARTS = {("segmentation_models_pytorch.encoders.densenet", "DenseNetEncoder")}
"""Classes that call the parts of their stem and transitions one by one: replacing the whole would change nothing."""

_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "torch.optim.", "torch._dynamo.")
"""Modules of modules that do something else than compute."""

DENSE_BLOCKS = (FusedDenseBlock, FusedResidualDenseBlock)

_OTHER_NORMS = (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_PARTS_CALLED = ["its owner calls its parts one by one"]
_SCRIPTED = ["it is scripted; fuse the network before torch.jit.script"]


Trials = dict[type, list[tuple[Described, list[torch.Size], str]]]
"""What was tried in one survey: for a class, of which description and sizes of parameters, and how it differed."""


@dataclass
class Finding:
    """A module that is a dense block, a transition or a sequence with a stem, or looks like one.

    Attributes:
        name: in the model that was searched.
        module: the module itself.
        fused_class: what it would run as: FusedDenseBlock, FusedResidualDenseBlock, FusedTransition or FusedFeatures.
        reasons: what keeps it from being replaced; empty if nothing does.
        description: where its parts stand; None where their names tell.
    """

    name: str
    module: Any
    fused_class: type[nn.Module]
    reasons: list[str] = field(default_factory=list)
    description: Described | None = None

    @property
    def fused(self) -> bool:
        return isinstance(self.module, self.fused_class)

    @property
    def kind(self) -> str:
        return class_name(self.module)


def survey(model: nn.Module) -> list[Finding]:
    """Every dense block, transition and sequence of ``model``, fused or not, and everything that looks like one."""
    callers = [name for name, module in model.named_modules() if _calls_parts(module)]
    findings = list(_search(model, "", {}, {}))
    for finding in findings:
        if finding.fused_class is FusedTransition and any(_is_inside(finding.name, caller) for caller in callers):
            finding.reasons = _PARTS_CALLED
    parents = {f.name.rpartition(".")[0] for f in findings if f.name}
    kinds = {f.module: f.fused_class for f in findings}
    for name, module in model.named_modules():
        gains = name in parents and name not in callers and module not in kinds and _gains(module, kinds)
        if isinstance(module, FusedFeatures) or gains:
            reasons = _PARTS_CALLED if any(_is_inside(name, caller) for caller in callers) else []
            findings.append(Finding(name, module, FusedFeatures, reasons))
    return findings


def _calls_parts(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__name__) in _CALL_PARTS


def _gains(module: nn.Module, kinds: dict[nn.Module, type[nn.Module]]) -> bool:
    """Whether it is a plain ``nn.Sequential`` in which a ReLU follows a norm, or a transition a block."""
    if type(module) is not nn.Sequential or "forward" in module.__dict__:
        return False
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    follow = [(kinds.get(a), kinds.get(b)) for (_, a), (_, b) in itertools.pairwise(children)]
    return (FusedDenseBlock, FusedTransition) in follow or any(
        run_at(children, i) is not None for i in range(len(children))
    )


def _search(module: nn.Module, name: str, seen: dict[int, None], trials: Trials) -> Iterator[Finding]:
    """The findings in ``module`` and below; where it is one itself, only those that it calls around its layers."""
    if id(module) in seen:
        return
    seen[id(module)] = None
    finding = _found(module, name, trials)
    if finding is not None and not finding.reasons:
        yield finding
        inside = getattr(finding.description or _description_of(module), "around", ())
        below = [(key, module._modules[key]) for key in inside]
    else:
        below = list(module._modules.items())
    found = [
        f for key, child in below if child is not None for f in _search(child, f"{name}.{key}".strip("."), seen, trials)
    ]
    if finding is None or not finding.reasons:
        yield from found
        return
    transitions = [f for f in found if f.fused_class is FusedTransition and not f.reasons]
    if any(map(_is_whole, found)) or (transitions and finding.fused_class is FusedTransition):
        yield from found  # what it is called or looks like, a module inside it is
        return
    yield finding
    yield from transitions


def _is_whole(finding: Finding) -> bool:
    """Whether it is a dense block of several layers, or runs fused: more than a piece of a block."""
    layers = getattr(finding.description, "layers", None)
    return not finding.reasons and finding.fused_class in DENSE_BLOCKS and (layers is None or len(layers) > 1)


def _description_of(module: Any) -> Any:
    return getattr(module.__dict__.get("fused_settings"), "description", None)


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and name.startswith(f"{outer}." if outer else "")


def class_name(module: nn.Module) -> str:
    """Of a module, of one that was scripted or of one that is fused: the name that its author gave to its class."""
    scripted = getattr(module, "original_name", None)
    return scripted if isinstance(scripted, str) else own_class(module).__name__


def _found(module: nn.Module, name: str, trials: Trials) -> Finding | None:
    """What ``module`` itself is, or looks like."""
    for kind in (*DENSE_BLOCKS, FusedTransition):
        if isinstance(module, kind):
            return Finding(name, module, kind)
    called_block = re.search("dense_?block", class_name(module), re.IGNORECASE) is not None
    called_transition = "Transition" in class_name(module) and len(module._modules) > 0
    if isinstance(module, torch.jit.ScriptModule):
        kind = FusedDenseBlock if called_block else FusedTransition
        return Finding(name, module, kind, _SCRIPTED) if called_block or called_transition else None
    if _is_known(type(module)) and called_transition:
        return Finding(name, module, FusedTransition, _standing_reasons(module, FusedTransition))
    if _is_known(type(module)) and _consists_of_layers(module) and all(map(_is_known, kinds_of(module.children()))):
        return Finding(name, module, FusedDenseBlock, _standing_reasons(module, FusedDenseBlock))
    return _tried(module, name, called_block or _consists_of_layers(module), called_transition, trials)


def _consists_of_layers(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_children()]
    return bool(names) and all(re.fullmatch(r"denselayer\d+", name) for name in names)


def _is_known(cls: type) -> bool:
    """Whether ``cls`` is a package's own, with the methods that the package gave it."""
    modules = [getattr(method, "__module__", "") for method in vars(cls).values() if callable(method)]
    return cls.__name__ in _PACKAGES.get(cls.__module__, ()) and set(modules) <= {cls.__module__, ""}


def _standing_reasons(module: Any, fused_class: type[nn.Module]) -> list[str]:
    """What is wrong with the structure of a module of a known class."""
    if fused_class is FusedDenseBlock:
        layers = [take_apart(layer, name) for name, layer in module.named_children()]
        reasons = structure_reasons(layers, type(layers[0].layer))
        containers = [module, *module.children(), *(layer._modules.get("layers") for layer in module.children())]
    else:
        reasons, containers = FusedTransition.parts(module).structure_reasons(), [module]
    if any(part is not None and (part._parameters or part._buffers) for part in containers):
        reasons.append("it has parameters or buffers of its own")
    if "forward" in module.__dict__:
        reasons.append("its forward was replaced")
    return reasons


def _tried(module: nn.Module, name: str, called_block: bool, called_transition: bool, trials: Trials) -> Finding | None:
    """What a module of an unknown class computes on a small input; nothing where neither that nor its name tells."""
    kind: type[nn.Module] = FusedTransition if called_transition and not called_block else FusedDenseBlock
    growing = _input_shape_without_norms(module)
    finding = None if growing is None else _tried_without_norms(module, name, growing, called_block, trials)
    if finding is not None:
        return finding
    shape = _input_shape(module)
    if isinstance(shape, str):
        return Finding(name, module, kind, [shape]) if called_block else None
    try:
        own, traces = observe(module, *shape)
    except Exception as error:  # it is somebody else's code: whatever it raises, it cannot be fused
        return Finding(name, module, kind, [_failed(module, error)]) if called_block or called_transition else None
    reading = read(read_block, own, traces)
    if reading.description is None and not reading.reasons and not called_block:
        kind, reading = FusedTransition, read(read_transition, own, traces)
        if not called_transition and not (reading.description is not None and reading.description.pools):
            return None
    elif reading.description is not None or reading.reasons:
        kind = FusedDenseBlock
    description = reading.description
    if description is None:
        reasons = (reading.reasons or reading.hints) or [
            "it does not concatenate its input with what norms, ReLUs and convolutions make of it"
        ]
        return Finding(name, module, kind, reasons)
    return Finding(name, module, kind, _obstacles(module, own, kind, shape, description, trials), description)


def _tried_without_norms(
    module: nn.Module, name: str, shape: tuple[int, int], called_block: bool, trials: Trials
) -> Finding | None:
    """What a module without norms whose convolutions read one another's results is; nothing where it is no dense block."""
    kind: type[nn.Module] = FusedResidualDenseBlock
    try:
        own, traces = observe(module, *shape)
    except Exception as error:
        return Finding(name, module, kind, [_failed(module, error)]) if called_block else None
    reading = read(read_residual, own, traces)
    if reading.description is None:
        other = reading.hints or ["it does not concatenate its input with what convolutions and activations make of it"]
        reasons = reading.reasons or (other if called_block else [])
        return Finding(name, module, kind, reasons) if reasons else None
    description = reading.description
    return Finding(name, module, kind, _obstacles(module, own, kind, shape, description, trials), description)


def _input_shape_without_norms(module: nn.Module) -> tuple[int, int] | None:
    """Channels and dimensions of what its first convolution reads, where each of the others reads all before it beside that."""
    if not _is_callable(module) or any(map(nn.parameter.is_lazy, module.parameters())):
        return None
    parts: list[Any] = list(module.modules())
    convs = sorted((part for part in parts if isinstance(part, CONVS)), key=lambda conv: conv.in_channels)
    if len(convs) < 2 or any(isinstance(part, (*NORMS, *_OTHER_NORMS)) for part in parts):
        return None
    width = convs[0].in_channels
    for conv in convs:
        if conv.in_channels != width:
            return None
        width += conv.out_channels
    return convs[0].in_channels, len(convs[0].kernel_size)


def _is_callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not type(module).__module__.startswith(_WRAPPERS)


def _input_shape(module: nn.Module) -> tuple[int, int] | str:
    """Channels and dimensions of what the first norm and the first convolution read; or why that cannot be."""
    if not _is_callable(module):
        return "it is only a container"
    parts: list[Any] = list(module.modules())
    if any(map(nn.parameter.is_lazy, module.parameters())):
        return "it has lazy modules, which must have run once before fuse"
    norm = next((part for part in parts if isinstance(part, (*NORMS, *_OTHER_NORMS))), None)
    conv = next((part for part in parts if isinstance(part, CONVS)), None)
    if norm is None or conv is None:
        return f"it has no {'batch normalisation' if norm is None else 'convolution'}"
    channels: int = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    if channels != conv.in_channels:
        return "it does not begin with a norm and a convolution of what that norm gives"
    return channels, len(conv.kernel_size)


def _obstacles(
    module: nn.Module,
    own: nn.Module,
    kind: type[nn.Module],
    shape: tuple[int, int],
    description: Described,
    trials: Trials,
) -> list[str]:
    """Why a module that was found to be a dense block or transition cannot be fused all the same."""
    if isinstance(description, BlockDescription):
        reasons = structure_and_hook_reasons(description.parts(own.train()), None)
    elif isinstance(description, ResidualDescription):
        reasons = described_residual(module, description).structure_reasons()
    else:
        reasons = described_transition(module, description).structure_reasons()
    reasons += patches(kinds_of(module.modules()))
    if "forward" in module.__dict__:
        reasons.append("its forward was replaced")
    if hidden := names_in_common(module, kind):
        reasons.append(f"{kind.__name__} has attributes called {', '.join(hidden)}, as it has")
    if reasons:
        return reasons
    sizes = [parameter.shape for parameter in own.parameters()]
    alike = [known for known in trials.get(type(module), []) if known[:2] == (description, sizes)]
    try:
        difference = alike[0][2] if alike else differs(own, *shape, kind, description)
    except Exception as error:
        return [_failed(module, error)]
    if not alike:
        trials.setdefault(type(module), []).append((description, sizes, difference))
    what = f"the forward of {class_name(module)} computes something else than a {kind.__name__}"
    return [f"{what}: {difference}"] if difference else []


def _failed(module: nn.Module, error: Exception) -> str:
    return f"the forward of {class_name(module)} could not be tried: {type(error).__name__}: {error}"
