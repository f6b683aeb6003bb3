"""Running statistics: what ``nn.BatchNorm`` does to its buffers in training, once for every forward pass.

A module that torch.utils.checkpoint computes again in the backward pass has counted that batch; torch's own norms count it
twice. Computing again is told from the Python frames above the module: every other forward pass that runs in a backward
pass, a tensor hook's or a custom Function's, is one of its own.
"""

import operator
import sys
from collections.abc import Sequence
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS, choose
from ..ops.statistics import BatchMoments


class RunningStatistics:
    """The buffers of norms in groups, each of a module's norms in the order of execution.

    A norm that several layers share is there as often. What it depends on is ``training``, ``momentum``,
    ``track_running_stats`` and which buffers there are.
    """

    def __init__(self, *groups: Sequence[Any]) -> None:
        self.groups = groups
        norms = [norm for group in groups for norm in group]
        self._buffers = [norm._buffers for norm in norms]
        self._momenta = [norm.momentum for norm in norms]
        # One launch updates all norms at once; one that several layers share takes one batch after the other.
        self._ordinary = len(set(norms)) == len(norms) and all(map(_is_ordinary, norms))
        self._looked: _Looked | None = None

    def update(self, read: Sequence[tuple[BatchMoments, Tensor]], tensors: object | None = None) -> None:
        """``running += momentum * (batch - running)``, the variance unbiased; counted where only the count is left.

        For each group the moments of what its norms read, and an image of as many pixels as they are of. Moments take no
        part in differentiation, so there is no gradient to switch off (torch.export could not record it). The buffers are
        those of the last call where ``tensors`` are.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and _is_computed_again():
            return
        at_once = self._ordinary and not compiling and torch._C._len_torch_dispatch_stack() == 0
        if at_once and all(moments.pixels is None for moments, _ in read) and self._update_at_once(read, tensors):
            return
        for norms, (moments, x) in zip(self.groups, read, strict=True):
            _update_one_by_one(norms, moments, x)

    def _update_at_once(self, read: Sequence[tuple[BatchMoments, Tensor]], tensors: object | None) -> bool:
        moments, x = read[0]
        kernels, looked = BACKENDS[choose(x.device, x.dtype)], self._looked
        if looked is None or tensors is None or looked.tensors is not tensors:
            looked = self._looked = _Looked.at(self._buffers, tensors, kernels)
        if looked.devices != {x.device}:
            raise ValueError(
                f"running statistics: expected them on {x.device}, where the input is, got {looked.devices}"
            )
        if not hasattr(kernels, "update_running") or looked.dtypes != {moments.stats.dtype, torch.int64}:
            return False
        inside: list[Tensor] = []
        groups: list[int] = []
        for norms, (moments, _) in zip(self.groups, read, strict=True):
            groups += [len(norms), -1 if moments.bottleneck_stats is None else len(inside), moments.from_end]
            if moments.bottleneck_stats is not None:
                inside.append(moments.bottleneck_stats)
        stats, unbiased = [moments.stats for moments, _ in read], [_unbiased(x) for _, x in read]
        kernels.update_running(stats, inside, groups, looked.buffers, self._momenta, unbiased, *looked.bound)
        return True


def _unbiased(x: Tensor) -> float:
    pixels = x.numel() // x.shape[1]
    return pixels / max(pixels - 1, 1)


def _update_one_by_one(norms: Sequence[Any], moments: BatchMoments, x: Tensor) -> None:
    if moments.pixels is None:
        unbiased: Any = _unbiased(x)
    else:
        unbiased = moments.pixels / (moments.pixels - 1).clamp_min_(1)
    inside = moments.bottleneck_stats
    variances = moments._replace(  # of all norms at once
        stats=moments.stats[1:] * unbiased, bottleneck_stats=None if inside is None else inside[1:] * unbiased
    )
    batches = []
    for i, norm in enumerate(norms):
        if norm.training and norm.track_running_stats:
            width = next((t.shape[0] for t in (norm.running_mean, norm.running_var) if t is not None), 0)
            batches.append((norm, moments.of(i, width)[0], variances.of(i, width)[0]))
    if len({norm for norm, *_ in batches}) == len(batches):
        _update(batches)
    else:  # a norm that several layers share sees one batch after the other
        for batch in batches:
            _update([batch])


class _Looked(NamedTuple):
    """Means, variances and counts, when their tensors were these; devices of the first two.

    ``bound`` has the buffers as a backend keeps them from call to call, where it does.
    """

    tensors: object | None
    buffers: list[Tensor]
    bound: list[Tensor]
    devices: set[torch.device]
    dtypes: set[torch.dtype]

    @classmethod
    def at(cls, buffers: Sequence[dict[str, Any]], tensors: object | None, kernels: ModuleType) -> "_Looked":
        means, variances, counts = (list(map(name, buffers)) for name in _OF_BUFFERS)
        statistics = means + variances
        found = statistics + counts
        bound = kernels.bind(found) if tensors is not None and hasattr(kernels, "bind") else None
        return cls(tensors, found, [] if bound is None else [bound], {*map(_DEVICE, statistics)}, {*map(_DTYPE, found)})


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_OF_BUFFERS = [operator.itemgetter(name) for name in _BUFFERS]
_DEVICE, _DTYPE = operator.attrgetter("device"), operator.attrgetter("dtype")


def _is_ordinary(norm: Any) -> bool:
    """Whether a norm's buffers are all there and all updated by its momentum."""
    complete = all(norm._buffers.get(name) is not None for name in _BUFFERS)
    return bool(norm.training and norm.track_running_stats and complete and norm.momentum is not None)


def _update(batches: Sequence[tuple[Any, Tensor, Tensor]]) -> None:
    if counts := [norm.num_batches_tracked for norm, *_ in batches if norm.num_batches_tracked is not None]:
        torch._foreach_add_(counts, 1)
    by_momentum: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for norm, *moments in batches:
        for running, batch in zip((norm.running_mean, norm.running_var), moments, strict=True):
            if running is None:
                continue
            batch = batch.to(running.dtype)
            if norm.momentum is not None:
                old, new = by_momentum.setdefault(norm.momentum, ([], []))
                old.append(running)
                new.append(batch)
            elif norm.num_batches_tracked is not None:  # the cumulative average; torch's norms need the count for it
                running.lerp_(batch, 1 / norm.num_batches_tracked.to(running.dtype))
    for momentum, (old, new) in by_momentum.items():
        torch._foreach_lerp_(old, new, momentum)


def _is_computed_again() -> bool:
    """Whether a checkpoint, torch's or one like it, is computing its function for the second time.

    It does so in a backward pass, or under its own hooks where a saved tensor is read outside of one.
    """
    if torch._C._current_graph_task_id() == -1 and not torch._C._autograd._top_saved_tensors_default_hooks(False):
        return False
    caller: FrameType | None = sys._getframe(1)
    callee = caller
    while caller is not None:
        if _computes_again(caller, callee):
            return True
        caller, callee = caller.f_back, caller
    return False


def _computes_again(frame: FrameType, callee: FrameType | None) -> bool:
    name = frame.f_code.co_name
    if name == "recompute_fn":
        return frame.f_globals.get("__name__") == "torch.utils.checkpoint"
    # The reentrant kind runs its function in its own backward, and then a backward pass through it, which may run more.
    if name != "backward" or callee is None or callee.f_globals.get("__name__") == "torch.autograd":
        return False
    return hasattr(frame.f_locals.get("ctx"), "run_function")
