"""When a block runs operator by operator instead of fused: the reasons, said once, or an error in strict mode."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from .ranks import sync_group

if TYPE_CHECKING:
    from .modules import FusedDenseLayer

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_VARIABLE = "FUSED_DENSENET_STRICT"
_strict: list[bool] = []


class FallbackWarning(UserWarning):
    """A block runs operator by operator, correct and slower; the message says why."""


class FallbackError(RuntimeError):
    """What :class:`FallbackWarning` says, in strict mode."""


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Inside the context a block that would fall back raises FallbackError; FUSED_DENSENET_STRICT=1 does so everywhere."""
    _strict.append(enabled)
    try:
        yield
    finally:
        _strict.pop()


def announce(reason: str) -> None:
    """Warns of a fallback, once for each reason, or raises FallbackError in strict mode."""
    message = f"FusedDenseBlock runs operator by operator, not fused: {reason}"
    if _strict[-1] if _strict else os.environ.get(_VARIABLE, "0") not in ("", "0"):
        raise FallbackError(message)
    if not torch.compiler.is_compiling():
        _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=4)


def uses_batch_stats(norm: nn.Module) -> bool:
    """Whether a module is a batch normalisation that takes its statistics from the batch (training, nothing tracked)."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and (norm.training or norm.running_mean is None)


def statistics_groups(layers: "Sequence[FusedDenseLayer]") -> set[str | None]:
    """The process groups, by name, over which the norms take batch statistics; None for this process alone."""
    return {sync_group(norm) for layer in layers for norm, _, _ in layer.pairs() if uses_batch_stats(norm)}


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; some devices (meta) have none."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def fallback_reason(x: Tensor, layers: "Sequence[FusedDenseLayer]") -> str | None:
    """Why the block cannot run fused on ``x``, or None."""
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a torch.func transform (grad, vmap, ...) is active"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation is active"
        if torch.jit.is_tracing():
            return "torch.jit.trace is recording"
    if autocasts(x) and x.dtype not in (
        torch.float32,
        torch.float64,
        torch.get_autocast_dtype(x.device.type),
    ):
        return f"autocast to {torch.get_autocast_dtype(x.device.type)} of an input in {x.dtype}"
    if _global_hooks():
        return "hooks on all modules are registered"
    first = layers[0]
    for number, layer in enumerate(layers, 1):
        name = f"denselayer{number}"
        reason = _layer_reason(layer, first)
        if reason is not None:
            return f"{name}{reason}"
    if len(statistics_groups(layers)) > 1:
        return "its norms take their statistics over different processes"
    weight = first.conv1.weight
    if x.dtype != weight.dtype and (weight.dtype != torch.float32 or x.dtype == torch.float64):
        return f"the input is {x.dtype} and the weights are {weight.dtype}"
    return None


def _layer_reason(layer: "FusedDenseLayer", first: "FusedDenseLayer") -> str | None:
    if type(layer) is not type(first):
        return f" is a {type(layer).__name__}"
    if _has_hooks(layer):
        return " has hooks"
    if (layer.drop_rate, layer.training) != (first.drop_rate, first.training) and (
        layer.drop_rate * layer.training != first.drop_rate * first.training
    ):
        return " differs from denselayer1 in its dropout"
    for number, (norm, relu, conv) in enumerate(layer.pairs(), 1):
        if type(norm) not in _NORMS:
            return f".norm{number} is a {type(norm).__name__}"
        if type(relu) is not nn.ReLU:
            return f".relu{number} is a {type(relu).__name__}"
        if type(conv) not in _CONVS:
            return f".conv{number} is a {type(conv).__name__}"
        for name, module in (("norm", norm), ("relu", relu), ("conv", conv)):
            if _has_hooks(module):
                return f".{name}{number} has hooks"
        reason = _conv_reason(conv)
        if reason is not None:
            return f".conv{number} {reason}"
    if layer.bottleneck and layer.conv1.weight.shape[0] != first.conv1.weight.shape[0]:
        return ".conv1 is of another width than denselayer1's"
    return None


def _conv_reason(conv: Any) -> str | None:
    same = tuple(size // 2 for size in conv.kernel_size)
    if conv.bias is not None:
        return "has a bias"
    if conv.groups != 1 or set(conv.stride) != {1} or set(conv.dilation) != {1}:
        return "is grouped, strided or dilated"
    if (
        conv.padding_mode != "zeros"
        or (conv.padding not in ("same", same))
        or any(k % 2 == 0 for k in conv.kernel_size)
    ):
        return "does not pad with zeros to the size of its input"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _global_hooks() -> bool:
    # Torch's own (its FLOP counter's module tracker) only follow the names of modules.
    registered = (
        module_hooks._global_forward_hooks,
        module_hooks._global_forward_pre_hooks,
        module_hooks._global_backward_hooks,
        module_hooks._global_backward_pre_hooks,
    )
    return any(not hook.__module__.startswith("torch.") for hooks in registered for hook in hooks.values())
