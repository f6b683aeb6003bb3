"""``explain``: what would run for each dense block of a network, and what keeps it from something faster."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_module
from ..backends import choose, rejected
from ..fallback.anatomy import own_class
from ..fallback.reasons import quiet, uses_batch_stats
from ..nn.block import FusedDenseBlock
from ..nn.residual import FusedResidualDenseBlock
from ..nn.serving import Snapshot
from ..nn.stem import FusedFeatures
from ..nn.transition import FusedTransition
from .recognition import Finding, survey
from .swapping import OTHER_ARGUMENTS, only_argument

KINDS = {
    FusedDenseBlock: "dense block",
    FusedResidualDenseBlock: "dense block",
    FusedTransition: "transition",
    FusedFeatures: "stem",
}


@dataclass
class Report:
    """What :func:`explain` found out about one dense block, transition or stem.

    Attributes:
        name: of the module in the network; "" for the network itself.
        kind: "dense block", "transition" or "stem", which is a sequence with BN, ReLU and max pooling in it; in a snapshot
            "other" for what it leaves to the network's own modules and functions.
        fused: whether the module runs, or would run, fused.
        backend: name of the backend that would run; None where nothing runs fused or no input was given.
        mode: what it would keep and which statistics it would use, in words; None as ``backend``.
        reasons: everything that keeps it from running fused; where it does, why each faster backend does not run.
    """

    name: str
    kind: str
    fused: bool
    backend: str | None = None
    mode: str | None = None
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        words = [
            "fused" if self.fused else "operator by operator",
            self.backend and f"backend {self.backend}",
            self.mode,
        ]
        line = f"{self.name or '(the module itself)'}: {', '.join(filter(None, words))}"
        return "\n    - ".join([line, *self.reasons])


@dataclass
class Explanation:
    """The reports of a network's dense blocks, transitions and stems, each in order; printed, a paragraph for each.

    And of a snapshot what is left as it is; its stem, last norm and classifier are told of where they are no part of a
    program.
    """

    blocks: list[Report]
    transitions: list[Report]
    stems: list[Report]
    others: list[Report] = field(default_factory=list)

    def __str__(self) -> str:
        groups = {"dense blocks": self.blocks, "transitions": self.transitions, "stems": self.stems}
        counts = [f"{sum(r.fused for r in reports)} of {len(reports)} {name}" for name, reports in groups.items()]
        reports = [str(report) for group in (*groups.values(), self.others) for report in group]
        return "\n".join([f"{', '.join(counts)} run fused", *reports])


def explain(module: nn.Module, *inputs: Any, **options: Any) -> Explanation:
    """What would run for each dense block, transition and stem of ``module``, and every reason against a faster way.

    With inputs, ``module(*inputs, **options)`` is run once under the autocast, gradient and train or eval mode of the call; its
    buffers, the random numbers and the warnings of later calls are left as they are. Without, what is known without an
    input is told: what :func:`fuse` replaced or would replace, and what is in the way of the rest. Tools that count or
    quantise operators see one for each module that runs fused: give them :func:`unfuse` of the model.

    Args:
        module: a network or a block, before or after :func:`fuse`; or a snapshot, of which is told what is part of a
            program and what is not, and why.
        inputs, options: what ``module`` would be called with.

    Raises:
        TypeError: ``module`` is no nn.Module.
        Exception: whatever ``module`` raises, a backend that was asked for and cannot run included.
    """
    check_module("module", module)
    groups: dict[str, list[Report]] = {kind: [] for kind in KINDS.values()}
    if isinstance(module, Snapshot):
        return _of_snapshot(module, inputs, options)
    with contextlib.ExitStack() as stack:
        for finding in survey(module):
            report = _standing_report(finding)
            groups[report.kind].append(report)
            if (inputs or options) and finding.fused:
                report.fused, report.reasons = False, ["this input does not reach it"]
                handle = finding.module.register_forward_pre_hook(functools.partial(_fill, report), with_kwargs=True)
                stack.callback(handle.remove)
        if inputs or options:
            stack.enter_context(_without_traces((*inputs, *options.values())))
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            torch.func.functional_call(module, buffers, inputs, options)
    return Explanation(*groups.values())


def _of_snapshot(snapshot: Snapshot, inputs: tuple[Any, ...], options: dict[str, Any]) -> Explanation:
    """What was found out when it was made; with inputs, with the backend that ran."""
    reports = [dataclasses.replace(report) for report in snapshot.notes]
    if inputs or options:
        with _without_traces((*inputs, *options.values())):
            snapshot(*inputs, **options)
        backend = choose(snapshot.device, snapshot.dtype)
        for report in reports:
            report.backend = backend if report.fused else None
    kinds = (*KINDS.values(), "other")
    return Explanation(*[[r for r in reports if r.kind == kind] for kind in dict.fromkeys(kinds)])


def _standing_report(finding: Finding) -> Report:
    """What is known without an input."""
    kind = KINDS[finding.fused_class]
    if finding.fused:
        reasons = finding.module.fallback_reasons()
        return Report(finding.name, kind, not reasons, reasons=reasons)
    reasons = finding.reasons or ["fused_densenet.fuse would replace it, and was not called"]
    return Report(finding.name, kind, False, reasons=reasons)


@contextlib.contextmanager
def _without_traces(inputs: tuple[Any, ...]) -> Iterator[None]:
    devices = {x.device for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), quiet():
        yield


def _fill(report: Report, module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    x = only_argument(own_class(module), args, options)
    report.reasons = OTHER_ARGUMENTS if x is None else module.fallback_reasons(x)
    report.fused = not report.reasons
    if report.fused:
        report.backend = choose(x.device, x.dtype)
        report.reasons = [f"not {name}: {reason}" for name, reason in rejected(x.device, x.dtype, report.backend)]
        report.mode = _mode(module, x)


def _mode(module: Any, x: Tensor) -> str:
    parts = [run.norm for run in module.runs()] if isinstance(module, FusedFeatures) else []
    parts = parts or module.modules()
    from_batch = {uses_batch_stats(m) for m in parts if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    statistics = "batch statistics" if True in from_batch else "running statistics"
    if len(from_batch) == 2:
        statistics = "batch statistics in some norms, running ones in others"
    inference = not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *module.parameters()))
    if isinstance(module, FusedResidualDenseBlock):
        return "inference" if inference else "for backward"
    if inference:
        return f"inference with {statistics}"
    if not isinstance(module, FusedDenseBlock) or len(module.parts()[0].stages) == 1:
        return f"for backward, with {statistics}"
    kept = "bottlenecks computed again (memory_efficient)" if module.memory_efficient else "bottlenecks kept"
    return f"for backward, with {statistics}, {kept}"
