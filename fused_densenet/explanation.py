"""``explain``: what would run for each dense block of a network, and what keeps it from something faster."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .backends import choose, rejected
from .fallback import fallback_reasons, quiet, structure_and_hook_reasons, uses_batch_stats
from .fusing import survey
from .modules import FusedDenseBlock


@dataclass
class BlockReport:
    """What :func:`explain` found out about one dense block.

    Attributes:
        name: of the module in the network; "" for the network itself.
        fused: whether the module is a FusedDenseBlock that runs, or would run, fused.
        backend: name of the backend that would run; None where nothing runs fused or no input was given.
        mode: what it would keep and which statistics it would use, in words; None as ``backend``.
        reasons: everything that keeps it from running fused; where it does, why each faster backend does not run.
    """

    name: str
    fused: bool
    backend: str | None = None
    mode: str | None = None
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        state = "fused" if self.fused else "operator by operator"
        line = ", ".join([state, *([f"backend {self.backend}"] if self.backend else []), *filter(None, [self.mode])])
        return "\n    - ".join([f"{self.name or '(the module itself)'}: {line}", *self.reasons])


@dataclass
class Explanation:
    """The reports of a network's dense blocks, in order; printed, one paragraph for each."""

    blocks: list[BlockReport]

    def __str__(self) -> str:
        fused = sum(block.fused for block in self.blocks)
        lines = [f"{fused} of {len(self.blocks)} dense blocks run fused", *map(str, self.blocks)]
        return "\n".join(lines)


def explain(module: nn.Module, *inputs: Any) -> Explanation:
    """What would run for each dense block of ``module``: backend, mode, and every reason against something faster.

    With ``inputs``, ``module(*inputs)`` is run once under the autocast, gradient and train or eval mode of the call; its
    buffers, the random numbers and the warnings of later calls are left as they are. Without, what is known without an
    input is told: which blocks :func:`fuse` replaced or would replace, and what is in the way of the others.

    Args:
        module: a network or a block, before or after :func:`fuse`.
        inputs: what ``module`` would be called with.

    Raises:
        TypeError: ``module`` is no nn.Module.
        Exception: whatever ``module(*inputs)`` raises, a backend that was asked for and cannot run included.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    findings = survey(module)
    reports = []
    with contextlib.ExitStack() as stack:
        for finding in findings:
            block = finding.module
            if isinstance(block, FusedDenseBlock):
                reasons = structure_and_hook_reasons(block.parts(), block.layer_class)
                report = BlockReport(finding.name, not reasons, reasons=reasons)
                if inputs:
                    report.fused, report.reasons = False, ["this input does not reach it"]
                    handle = block.register_forward_pre_hook(lambda block, args, r=report: _fill(r, block, *args))
                    stack.callback(handle.remove)
            else:
                reasons = finding.reasons or ["fused_densenet.fuse would replace it, and was not called"]
                report = BlockReport(finding.name, False, reasons=reasons)
            reports.append(report)
        if inputs:
            stack.enter_context(_without_traces(inputs))
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            torch.func.functional_call(module, buffers, inputs)
    return Explanation(reports)


@contextlib.contextmanager
def _without_traces(inputs: tuple[Any, ...]) -> Iterator[None]:
    devices = {x.device for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), quiet():
        yield


def _fill(report: BlockReport, block: FusedDenseBlock, x: Tensor) -> None:
    layers = block.parts()
    report.reasons = fallback_reasons(x, layers, block.layer_class)
    report.fused = not report.reasons
    if not report.fused:
        return
    report.backend = choose(x.device, x.dtype)
    report.reasons = [f"not {name}: {reason}" for name, reason in rejected(x.device, x.dtype, report.backend)]
    report.mode = _mode(block, x)


def _mode(block: FusedDenseBlock, x: Tensor) -> str:
    layers = block.parts()
    from_batch = {uses_batch_stats(stage.norm) for parts in layers for stage in parts.stages}
    statistics = {frozenset({True}): "batch statistics", frozenset({False}): "running statistics"}.get(
        frozenset(from_batch), "batch statistics in some norms, running ones in others"
    )
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *block.parameters())):
        return f"inference with {statistics}"
    if len(layers[0].stages) == 1:
        return f"for backward, with {statistics}"
    kept = "bottlenecks computed again (memory_efficient)" if block.memory_efficient else "bottlenecks kept"
    return f"for backward, with {statistics}, {kept}"
