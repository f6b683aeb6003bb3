"""Finds the dense blocks and transitions of a network, by structure and by class; no package is imported for it."""

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backends import use_backend
from ..fallback.anatomy import structure_reasons, take_apart
from ..fallback.reasons import strict
from ..nn.block import FusedDenseBlock
from ..nn.stem import FusedFeatures, run_at
from ..nn.transition import FusedTransition
from .swapping import swap

_PACKAGES = {
    "torchvision.models.densenet": {"_DenseBlock", "_DenseLayer", "_Transition"},
    "timm.models.densenet": {"DenseBlock", "DenseLayer", "DenseTransition"},
    "monai.networks.nets.densenet": {"_DenseBlock", "_DenseLayer", "_Transition"},
    "torchxrayvision.models": {"_DenseBlock", "_DenseLayer", "_Transition"},
}
"""Classes whose ``forward`` is known, by module; a module of any other class is tried on a small input."""

_CALL_PARTS = {("segmentation_models_pytorch.encoders.densenet", "DenseNetEncoder")}
"""Classes that call the parts of their stem and transitions one by one: replacing the whole would change nothing."""

_PARTS_CALLED = ["its owner calls its parts one by one"]


@dataclass
class Finding:
    """A module that is a dense block, a transition or a sequence with a stem, or looks like one.

    Attributes:
        name: in the model that was searched.
        module: the module itself.
        fused_class: what it would run as: FusedDenseBlock, FusedTransition or FusedFeatures.
        reasons: what keeps it from being replaced; empty if nothing does.
    """

    name: str
    module: Any
    fused_class: type[nn.Module]
    reasons: list[str] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        return isinstance(self.module, self.fused_class)


def survey(model: nn.Module) -> list[Finding]:
    """Every dense block, transition and sequence of ``model``, fused or not, and everything that looks like one."""
    callers = [name for name, module in model.named_modules() if _calls_parts(module)]
    findings = list(_candidates(model, callers))
    findings = [f for f in findings if not any(_is_inside(other.name, f.name) for other in findings)]
    parents = {f.name.rpartition(".")[0] for f in findings if f.name}
    kinds = {f.module: f.fused_class for f in findings}
    for name, module in model.named_modules():
        gains = name in parents and name not in callers and _gains(module, kinds)
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


def _candidates(model: nn.Module, callers: list[str]) -> Iterator[Finding]:
    for name, module in model.named_modules():
        if isinstance(module, FusedDenseBlock | FusedTransition):
            kind = FusedDenseBlock if isinstance(module, FusedDenseBlock) else FusedTransition
            yield Finding(name, module, kind)
        elif _consists_of_layers(module):
            yield Finding(name, module, FusedDenseBlock, _obstacles(module, FusedDenseBlock, _block_reasons))
        elif re.search("dense_?block", _class_name(module), re.IGNORECASE):
            reasons = ["it does not consist of denselayer1, denselayer2, ..."]
            yield Finding(name, module, FusedDenseBlock, reasons)
        elif _looks_like_transition(module):
            reasons = _PARTS_CALLED
            if not any(_is_inside(name, caller) for caller in callers):
                reasons = _obstacles(module, FusedTransition, _transition_reasons)
            yield Finding(name, module, FusedTransition, reasons)


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and name.startswith(f"{outer}." if outer else "")


def _class_name(module: nn.Module) -> str:
    scripted = getattr(module, "original_name", None)
    return scripted if isinstance(scripted, str) else type(module).__name__


def _consists_of_layers(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_children()]
    return bool(names) and all(re.fullmatch(r"denselayer\d+", name) for name in names)


def _looks_like_transition(module: nn.Module) -> bool:
    return "Transition" in _class_name(module) and {"norm", "conv"} <= dict(module.named_children()).keys()


def _obstacles(
    module: nn.Module, fused_class: type[nn.Module], structure: Callable[[nn.Module], tuple[list[str], list[type]]]
) -> list[str]:
    """Why a module that looks like one of ``fused_class`` cannot be fused."""
    if isinstance(module, torch.jit.ScriptModule):
        return ["it is scripted; fuse the network before torch.jit.script"]
    reasons, classes = structure(module)
    if module._parameters or module._buffers:
        reasons.append("it has parameters or buffers of its own")
    if "forward" in module.__dict__:
        reasons.append("its forward was replaced")
    if not reasons and not all(map(_is_known, classes)):
        reasons += _trial(module, fused_class)
    return reasons


def _is_known(cls: type) -> bool:
    """Whether ``cls`` is a package's own, with the ``forward`` that the package gave it."""
    forward = vars(cls).get("forward")
    return cls.__name__ in _PACKAGES.get(cls.__module__, ()) and getattr(forward, "__module__", "") in (
        cls.__module__,
        "",
    )


def _block_reasons(block: nn.Module) -> tuple[list[str], list[type]]:
    """What is wrong with the structure, and the classes whose ``forward`` matters."""
    layers = [take_apart(layer, name) for name, layer in block.named_children()]
    layer_class = type(layers[0].layer)
    return structure_reasons(layers, layer_class), [type(block), layer_class]


def _transition_reasons(transition: nn.Module) -> tuple[list[str], list[type]]:
    return FusedTransition.parts(transition).structure_reasons(), [type(transition)]  # type: ignore[arg-type]


def _trial(module: nn.Module, fused_class: type[nn.Module]) -> list[str]:
    """Compares a copy's own ``forward`` with the fused one in float64, in training and in eval mode."""
    kind = type(module).__name__
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            own = copy.deepcopy(module).to("cpu", torch.float64)
            for part in own.modules():
                for hooks in (part._forward_hooks, part._forward_pre_hooks):
                    hooks.clear()
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                        if tensor is not None:
                            tensor.uniform_(0.5, 1.5)
            fused = copy.deepcopy(own)
            swap(fused, fused_class)
            weight = next(p for p in own.parameters() if p.dim() > 1)
            x = torch.randn(2, weight.shape[1], *[4] * (weight.dim() - 2), dtype=torch.float64, device="cpu")
            for training in (True, False):
                results = []
                for part in (own, fused):
                    torch.manual_seed(0)
                    with use_backend("eager"), strict():
                        results.append([part.train(training)(x.clone()), *part.buffers()])
                if not all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(*results, strict=True)):
                    return [f"the forward of {kind} computes something else than a {fused_class.__name__}"]
    except Exception as error:  # it is somebody else's code: whatever it raises, it cannot be fused
        return [f"the forward of {kind} could not be tried: {type(error).__name__}: {error}"]
    return []
