"""Part of a module computed again in the backward pass instead of kept, where it runs operator by operator."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .fallback import transform_reasons


def recomputed(module: nn.Module, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``part(*inputs)``, a part of ``module``'s forward, of which nothing is kept for backward but the inputs.

    The module's buffers are written once, in the forward pass. What records operators (torch.compile, which chooses by
    itself what to keep, and those of :func:`fused_densenet.fallback.transform_reasons`) is left to record them.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transform_reasons():
        return part(*inputs)
    contexts = contextlib.nullcontext(), _CopiedBuffers(module)
    out: Tensor = checkpoint(part, *inputs, use_reentrant=False, context_fn=lambda: contexts)
    return out


class _CopiedBuffers(contextlib.AbstractContextManager[None]):
    """Inside, the buffers of ``module`` are copies: what is written to them is forgotten. Can be entered again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        owners = [owner._buffers for owner in self.module.modules()]
        self.originals = [(owner, dict(owner)) for owner in owners]
        for owner in owners:
            owner.update({name: buffer.clone() for name, buffer in owner.items() if buffer is not None})

    def __exit__(self, *_: object) -> None:
        for owner, buffers in self.originals:
            owner.update(buffers)
