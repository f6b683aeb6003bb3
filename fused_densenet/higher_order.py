"""Gradients of gradients: autograd through the same function written operator by operator."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def second_order(
    function: Callable[..., Tensor], dout: Tensor, sources: Sequence[Tensor], second: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients, by ``dout`` and by every source, of the gradients of ``function(*sources)`` by its sources.

    Args:
        dout: the gradient of the function's result.
        second: the gradient of each first-order gradient; None or empty where there is none.
    """
    with torch.enable_grad(), torch.autocast(dout.device.type, enabled=False):
        # Aliases, still connected for higher orders, and none of them another's ancestor.
        inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (dout, *sources)]
        first = torch.autograd.grad(function(*inputs[1:]), inputs[1:], inputs[0], create_graph=True)
    used = [(g, s) for g, s in zip(first, second, strict=True) if s is not None and s.numel()]
    return list(
        torch.autograd.grad(
            [g for g, _ in used],
            inputs,
            [s for _, s in used],
            allow_unused=True,
            create_graph=torch.is_grad_enabled(),
        )
    )


def refuse_synchronised(group: str | None) -> None:
    """No second order through statistics of several processes.

    Raises:
        RuntimeError: ``group`` is one.
    """
    if group is not None:
        raise RuntimeError(
            "a gradient of a gradient through SyncBatchNorm was asked for; neither a fused module nor torch's "
            "SyncBatchNorm has one: train this part with BatchNorm, or without create_graph=True"
        )
