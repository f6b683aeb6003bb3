"""Batch statistics over the processes of a group: what ``nn.SyncBatchNorm`` means for a block.

A group is known by its name, a string that an operator's schema can hold.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def are_there_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


def sync_group(norm: nn.Module) -> str | None:
    """Name of the group over which ``norm`` takes its batch statistics; None where it takes this process's alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not are_there_ranks():
        return None
    group: dist.ProcessGroup = norm.process_group or dist.group.WORLD  # type: ignore[assignment]
    return group.group_name if group.size() > 1 else None


def merge_moments(mean: Tensor, var: Tensor, local: int, pixels: Tensor, group: str) -> None:
    """Makes ``mean`` and biased ``var`` ``(C,)`` of ``local`` pixels those of all ranks, and ``pixels`` their number.

    One sum over the ranks, 16 bytes for each channel whatever their number. In float64 the squares lose 1e-16 of
    ``mean**2``, so float32 moments keep all their digits up to means of ten thousand deviations.
    """
    sums = torch.zeros(2 * mean.numel() + 1, dtype=torch.float64, device=mean.device)
    if local:  # an empty batch has no moments
        means = mean.double()
        sums[:-1] = torch.cat([means, var + means * means])
        sums[-1] = 1
        sums *= local
    sum_over_ranks(sums, group)
    pixels.copy_(sums[-1:])
    means, squares = (sums[:-1] / sums[-1]).chunk(2)
    mean.copy_(means)
    var.copy_((squares - means * means).clamp_min_(0))


def sum_over_ranks(x: Tensor, group: str) -> None:
    """``x``, contiguous, becomes its sum over the ranks."""
    dist.all_reduce(x, group=dist.distributed_c10d._resolve_process_group(group))  # type: ignore[arg-type]
