"""``fuse``: the dense blocks, transitions and stem of a network that somebody else built, run fused where they stand."""

import logging
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from ..arguments import check_flags, check_module
from ..fallback.reasons import FallbackError, warn_once
from ..nn.block import FusedDenseBlock
from ..nn.residual import FusedResidualDenseBlock
from ..nn.stem import FusedFeatures
from ..nn.transition import FusedTransition
from .recognition import DENSE_BLOCKS, Finding, survey
from .swapping import is_swapped, swap, swap_back

Module = TypeVar("Module", bound=nn.Module)
_log = logging.getLogger("fused_densenet")
_LEFT = "not every dense block can be fused: "


def fuse(model: Module, *, memory_efficient: bool | None = None, strict: bool = False) -> Module:
    """Lets every dense block, transition and stem that it recognises in ``model`` run fused, in place.

    Recognised are those of torchvision, timm, MONAI (1, 2 and 3 dimensions), TorchXRayVision and
    segmentation_models_pytorch, none of which is imported, and whatever computes the same, however it is called and
    built: a copy of every module that begins with a norm and a convolution is run on small inputs, its operators are
    noted, and the fused one must give the same results, gradients and buffers. ``model`` is not changed by that. A module
    that is replaced keeps its identity, parameters, state_dict keys and hooks, and is a :class:`FusedDenseBlock`,
    :class:`FusedTransition` or :class:`FusedFeatures` besides what it was. What was replaced, and what not and why, is
    logged (``logging.getLogger("fused_densenet")``, INFO), one line for all that are alike; ``fused_densenet.explain``
    tells it of a model at any later time.

    Args:
        model: the network, or a block itself.
        memory_efficient: compute the bottlenecks again in backward instead of keeping them; None keeps each block's own
            setting (``memory_efficient`` of torchvision's layers, ``grad_checkpointing`` of timm's, ``efficient``).
        strict: raise where a module looks like a dense block and cannot be fused, and where there is none at all.

    Returns:
        ``model``.

    Raises:
        TypeError: a bad argument.
        FallbackError: with ``strict``, naming each module and the reasons; nothing is replaced then.

    Warns:
        FallbackWarning: what looks like a dense block and cannot be fused, each with its reasons; once for the same text.
    """
    adopted(model, memory_efficient, strict)
    return model


def adopted(model: nn.Module, memory_efficient: bool | None = None, strict: bool = False) -> list[Finding]:
    """:func:`fuse`; what it found."""
    check_module("model", model)
    if not isinstance(memory_efficient, bool | None):
        raise TypeError(f"memory_efficient: expected True, False or None, got {type(memory_efficient).__name__}")
    check_flags(strict=strict)
    name, findings = type(model).__name__, survey(model)
    blocks = [finding for finding in findings if finding.fused_class in DENSE_BLOCKS]
    left = _described([finding for finding in blocks if finding.reasons])
    if strict and (left or not blocks):
        raise FallbackError(_LEFT + "\n".join(left) if left else f"no dense block was found in {name}")
    for finding in findings:
        if not finding.reasons and not finding.fused:
            swap(finding.module, finding.fused_class, finding.description)
        if memory_efficient is not None and isinstance(finding.module, FusedDenseBlock):
            finding.module.memory_efficient = memory_efficient
    _report(name, findings)
    if left:
        warn_once(_LEFT + "\n".join(left))
    return findings


def unfuse(model: Module) -> Module:
    """Undoes :func:`fuse`, in place: every module that it replaced is of its own class again. Returns ``model``.

    Raises:
        TypeError: ``model`` is no nn.Module.
        RuntimeError: the class of a fused module was changed afterwards (by ``fully_shard``, say).
    """
    check_module("model", model)
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
        for kind in (FusedDenseBlock, FusedResidualDenseBlock, FusedTransition, FusedFeatures)
        if kind is not FusedResidualDenseBlock or any(f.fused_class is kind for f in findings)
    ]
    _log.info("fuse(%s): %s", name, ", ".join(counts) if findings else "no dense block was found")
    for line in _described([finding for finding in findings if not finding.fused]):
        _log.info("fuse(%s): not fused: %s", name, line)


def _described(findings: Sequence[Finding]) -> list[str]:
    """A line for all findings of a class that have the same reasons but for numbers in them."""
    groups: dict[Any, list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, *_alike(finding.reasons)), []).append(finding)
    lines = []
    for group in groups.values():
        names = [finding.name or "the model itself" for finding in group]
        more = f" and {len(names) - 3} more of {group[0].kind}" if len(names) > 3 else ""
        reasons = [
            first if number == 1 else f"{first} (and {number - 1} more like it)"
            for first, number in _alike(group[0].reasons).values()
        ]
        lines.append(f"{', '.join(names[:3])}{more}: {'; '.join(reasons)}")
    return lines


def _alike(reasons: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The first, and the number, of reasons that differ in numbers only."""
    found: dict[str, tuple[str, int]] = {}
    for reason in reasons:
        pattern = re.sub(r"\d+", "#", reason)
        first, number = found.get(pattern, (reason, 0))
        found[pattern] = first, number + 1
    return found
