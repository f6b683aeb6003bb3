"""When a block runs operator by operator instead of fused: the reasons, said once, or an error in strict mode."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from ..callers import warn
from ..ops.ranks import are_there_ranks, sync_group
from ..variables import is_on
from .anatomy import LayerParts, intercepted, kinds_of, patches, structure_reasons

_thread = threading.local()


class FallbackWarning(UserWarning):
    """A block runs operator by operator, correct and slower; the message says why."""


class FallbackError(RuntimeError):
    """What :class:`FallbackWarning` says, in strict mode."""


@contextlib.contextmanager
def _setting(name: str, value: bool) -> Iterator[None]:
    """Inside the context, in this thread, ``_thread.<name>`` is ``value``."""
    before = getattr(_thread, name, None)
    setattr(_thread, name, value)
    try:
        yield
    finally:
        setattr(_thread, name, before)


def strict(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Inside the context a block that would fall back raises FallbackError; FUSED_DENSENET_STRICT=1 does so everywhere.

    Holds for the thread that enters it, as ``torch.no_grad`` does.
    """
    return _setting("strict", enabled)


def quiet() -> contextlib.AbstractContextManager[None]:
    """Inside the context, in this thread, a fallback is neither warned of nor an error."""
    return _setting("quiet", True)


def announce(reasons: Sequence[str], name: str = "FusedDenseBlock", module: nn.Module | None = None) -> None:
    """Warns of a fallback of ``module``, called ``name``, once for each message, or raises FallbackError in strict mode."""
    if getattr(_thread, "quiet", False):
        return
    message = f"{name} runs operator by operator, not fused: {reasons[0]}"
    if len(reasons) > 1:
        message += f" (and {len(reasons) - 1} more reasons, which fused_densenet.explain lists)"
    if module is not None and are_there_ranks() and any(map(sync_group, module.modules())):
        message += (
            ". It has SyncBatchNorm, whose messages are other ones then: where one rank runs operator by operator, all have "
            "to, or they wait for one another"
        )
    enabled = getattr(_thread, "strict", None)
    if is_on("FUSED_DENSENET_STRICT") if enabled is None else enabled:
        raise FallbackError(message)
    if not torch.compiler.is_compiling():
        warn_once(message)


@functools.cache
def warn_once(message: str) -> None:
    """A FallbackWarning, the first time that it is asked for."""
    warn(message, FallbackWarning)


def uses_batch_stats(norm: nn.Module) -> bool:
    """Whether a module is a batch normalisation that takes its statistics from the batch (training, nothing tracked)."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and (norm.training or norm.running_mean is None)


def statistics_groups(layers: Sequence[LayerParts]) -> set[str | None]:
    """The process groups, by name, over which the norms take batch statistics; None for this process alone."""
    norms = [stage.norm for parts in layers for stage in parts.stages]
    return {sync_group(norm) for norm in norms if uses_batch_stats(norm)}


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; some devices (meta) have none."""
    device = x.device.type  # a compiler's tensors are never on meta, and torch 2.11's cannot trace what asks
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def fallback_reasons(x: Tensor, standing: list[str], dtype: torch.dtype, groups: set[str | None]) -> list[str]:
    """Why a block cannot run fused on ``x``; empty if it can.

    Args:
        standing: why it cannot, whatever the input.
        dtype: of its weights.
        groups: its :func:`statistics_groups`.
    """
    reasons = context_reasons(x)
    if len(groups) > 1:
        reasons.append("its norms take their statistics over different processes")
    if not standing:
        reasons += dtype_reasons(x, dtype)
    return reasons + standing


def meets(x: Tensor, weight: Tensor) -> bool:
    """Whether there is nothing to be said against ``x`` for a convolution: channels, devices, dtypes, autocast."""
    device, dtype, shape = x.device, x.dtype, x.shape
    if weight.device != device or len(shape) != weight.dim() or shape[1] != weight.shape[1]:
        return False
    if device.type in ("cpu", "cuda") and not torch.is_autocast_enabled(device.type):
        return dtype == weight.dtype
    return autocasts(x) and not context_reasons(x) and not dtype_reasons(x, weight.dtype)


def dtype_reasons(x: Tensor, dtype: torch.dtype) -> list[str]:
    """Why weights of ``dtype`` cannot meet ``x`` under autocast; without it they must be the same, or it is an error."""
    if autocasts(x) and x.dtype != dtype and (dtype != torch.float32 or x.dtype == torch.float64):
        return [f"the input is {x.dtype} and the weights are {dtype}"]
    return []


def context_reasons(x: Tensor) -> list[str]:
    """Why no module can run fused on ``x`` where it is called."""
    reasons = surroundings_reasons()
    if is_distributed(x):
        reasons.append("the input is a DTensor, which takes only operators that say how they are sharded")
    if autocasts(x) and x.dtype not in (
        torch.float32,
        torch.float64,
        torch.get_autocast_dtype(x.device.type),
    ):
        reasons.append(f"autocast to {torch.get_autocast_dtype(x.device.type)} of an input in {x.dtype}")
    return reasons


def is_distributed(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor, parts of which are on several devices."""
    if type(x) is Tensor or torch.compiler.is_compiling():
        return False
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(x, kind)


def is_calm() -> bool:
    """Whether nothing records, follows, counts or changes single operators: then there are no :func:`surroundings_reasons`."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or foreign_function_modes()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.onnx.is_in_onnx_export()
        or module_hooks._has_any_global_hook()
    )


def surroundings_reasons() -> list[str]:
    """Why nothing can run fused where it is called, whatever the input."""
    reasons = [] if torch.compiler.is_compiling() else transform_reasons()
    if has_global_hooks():
        reasons.append("hooks on all modules are registered")
    return reasons


def foreign_function_modes() -> list[str]:
    """Names of the active modes that may change what torch's functions compute, and are not torch's own."""
    number: int = torch._C._len_torch_function_stack()
    kinds = [type(torch._C._get_function_stack_at(i)) for i in range(number)]
    return [kind.__name__ for kind in kinds if not kind.__module__.startswith(("torch.", "fused_densenet."))]


def transform_reasons() -> list[str]:
    """What is at work that needs to see every operator; not to be asked while torch compiles."""
    reasons = []
    if torch._C._functorch.peek_interpreter_stack() is not None:
        reasons.append("a torch.func transform (grad, vmap, ...) is active")
    if forward_ad._current_level >= 0:
        reasons.append("forward-mode differentiation is active")
    if torch.jit.is_tracing():
        reasons.append("torch.jit.trace is recording")
    return reasons + [f"a TorchFunctionMode is active: {name}" for name in foreign_function_modes()]


def structure_and_hook_reasons(layers: Sequence[LayerParts], layer_class: type | None) -> list[str]:
    """Those of :func:`fallback_reasons` that the layers alone give, as they are set up at the moment."""
    first, reasons = layers[0], structure_reasons(layers, layer_class)
    dropout = [first.drop_rate, first.drop_inside, first.drops_channels]
    for parts in layers:
        reasons += intercepted(parts)
        if [parts.drop_rate, parts.drop_inside, parts.drops_channels] != dropout:
            reasons.append(f"{parts.name} differs from {first.name} in its dropout")
    return reasons + patches(kinds_of(module for parts in layers for module in (parts.layer, *parts.modules.values())))


def has_global_hooks() -> bool:
    # Torch's own (its FLOP counter's module tracker) only follow the names of modules.
    registered = (
        module_hooks._global_forward_hooks,
        module_hooks._global_forward_pre_hooks,
        module_hooks._global_backward_hooks,
        module_hooks._global_backward_pre_hooks,
    )
    return any(not _is_torchs(hook) for hooks in registered for hook in hooks.values())


def _is_torchs(hook: Any) -> bool:
    return str(getattr(hook, "__module__", None)).startswith("torch.")
