"""``fuse``: the dense blocks, transitions and stem of a network that somebody else built, run fused where they stand."""

import logging
from typing import TypeVar

from torch import nn

from ..fallback.reasons import FallbackError, warn_once
from ..nn.block import FusedDenseBlock
from ..nn.stem import FusedFeatures
from ..nn.transition import FusedTransition
from .recognition import Finding, survey
from .swapping import is_swapped, swap, swap_back

Module = TypeVar("Module", bound=nn.Module)
_log = logging.getLogger("fused_densenet")
_LEFT = "not every dense block can be fused: "


def fuse(model: Module, *, memory_efficient: bool | None = None, strict: bool = False) -> Module:
    """Lets every dense block, transition and stem that it recognises in ``model`` run fused, in place.

    Recognised are those of torchvision, timm, MONAI (1, 2 and 3 dimensions), TorchXRayVision and
    segmentation_models_pytorch, and modules of other classes that are built alike, of ``denselayer1, denselayer2, ...``
    with ``norm1, relu1, conv1, norm2, relu2, conv2``, and give the same on a small random input. None of these packages
    is imported. A module that is replaced keeps its identity, parameters, state_dict keys and hooks, and is a
    :class:`FusedDenseBlock`, :class:`FusedTransition` or :class:`FusedFeatures` besides what
    it was. What was replaced, and what not and why, is logged (``logging.getLogger("fused_densenet")``, INFO);
    ``fused_densenet.explain`` tells it of a model at any later time.

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

    Warns:
        FallbackWarning: what looks like a dense block and cannot be fused, each with its reasons; once for the same text.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(memory_efficient, bool | None):
        raise TypeError(f"memory_efficient: expected True, False or None, got {type(memory_efficient).__name__}")
    name, findings = type(model).__name__, survey(model)
    left = [_described(f) for f in findings if f.reasons and f.fused_class is FusedDenseBlock]
    if strict and left:
        raise FallbackError(_LEFT + "\n".join(left))
    for finding in findings:
        if not finding.reasons and not finding.fused:
            swap(finding.module, finding.fused_class)
        if memory_efficient is not None and isinstance(finding.module, FusedDenseBlock):
            finding.module.memory_efficient = memory_efficient
    _report(name, findings)
    if left:
        warn_once(_LEFT + "\n".join(left))
    return model


def unfuse(model: Module) -> Module:
    """Undoes :func:`fuse`, in place: every module that it replaced is of its own class again. Returns ``model``.

    Raises:
        RuntimeError: the class of a fused module was changed afterwards (by ``fully_shard``, say).
    """
    fused = [(name, module) for name, module in model.named_modules() if is_swapped(module)]
    for name, module in fused:
        if "original_class" not in type(module).__dict__:
            raise RuntimeError(f"{name}: expected the class that fuse gave it, got {type(module).__name__}")
    for _, module in fused:
        swap_back(module)
    return model


def _report(name: str, findings: list[Finding]) -> None:
    counts = [
        f"{sum(f.fused for f in findings if f.fused_class is kind)} {kind.__name__}"
        for kind in (FusedDenseBlock, FusedTransition, FusedFeatures)
    ]
    _log.info("fuse(%s): %s", name, ", ".join(counts) if findings else "no dense block was found")
    for finding in findings:
        if not finding.fused:
            _log.info("fuse(%s): not fused: %s", name, _described(finding))


def _described(finding: Finding) -> str:
    return f"{finding.name or 'the model itself'}: {'; '.join(finding.reasons)}"
