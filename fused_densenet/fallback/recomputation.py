"""Modules computed again in the backward pass instead of kept, where a block runs operator by operator."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import checkpoint

from .reasons import transform_reasons


def concatenated(modules: Sequence[nn.Module], *inputs: Tensor) -> Tensor:
    """``modules`` one after the other on ``inputs`` side by side."""
    out = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
    for module in modules:
        out = module(out)
    return out


def recomputed(modules: Sequence[nn.Module], *inputs: Tensor) -> Tensor:
    """:func:`concatenated`, of which nothing is kept for backward but the inputs.

    The backward pass computes on copies of the modules as they are now, with the same parameters: their buffers are
    written once, in the forward pass. What records operators (torch.compile, which chooses by itself what to keep, a
    CUDA graph, and those of :func:`fused_densenet.fallback.transform_reasons`) is left to record them; and where a module
    has a ``forward`` of its own, which may belong to another one, all is kept.

    Raises:
        RuntimeError: in the backward pass, where an input or a parameter was changed in place meanwhile.
    """
    patched = any("forward" in part.__dict__ for module in modules for part in module.modules())
    if not torch.is_grad_enabled() or patched or _records(inputs[0]):
        return concatenated(modules, *inputs)
    copies = [_copy(module) for module in modules]
    tensors = [*inputs, *(parameter for module in copies for parameter in _parameters(module))]
    versions = [tensor._version for tensor in tensors]
    calls = iter([modules])  # the first, in the forward pass

    def compute(*inputs: Tensor) -> Tensor:
        if (now := next(calls, None)) is None:
            if versions != [tensor._version for tensor in tensors]:
                raise RuntimeError(
                    "memory_efficient=True computes a layer again in the backward pass, but its input or one of its "
                    "parameters has been changed by an inplace operation since the forward pass"
                )
            now = [_copy(module) for module in copies]
        return concatenated(now, *inputs)

    out: Tensor = checkpoint(compute, *inputs, use_reentrant=False)
    return out


def _records(x: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        or get_proxy_mode() is not None
        or bool(transform_reasons())
    )


def _copy(module: nn.Module) -> nn.Module:
    """With buffers of its own and the parameters of ``module``."""
    copy = module.__new__(type(module))
    copy.__dict__.update(
        module.__dict__,
        _parameters=dict(module._parameters),
        _buffers={name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()},
        _modules={name: child if child is None else _copy(child) for name, child in module._modules.items()},
    )
    return copy


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    return (p for part in module.modules() for p in part._parameters.values() if p is not None)
