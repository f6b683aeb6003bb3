"""What records a network instead of running it: torch.fx, torch.jit.script, the ONNX exporters."""

import functools
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..callers import warn


def one_call(module: nn.Module, x: torch.fx.Proxy) -> Any:
    """What ``torch.fx.symbolic_trace`` records of a fused module: one call of it.

    Raises:
        RuntimeError: it was asked to trace the fused module itself.
    """
    tracer: Any = x.tracer
    if type(tracer).__module__.startswith("torch.ao.quantization"):
        _warn_of_one_operator("FX quantization")
    if tracer.root is module:
        raise RuntimeError(
            "torch.fx records a fused module as one call, and was asked to look into it: trace fused_densenet.unfuse(module), "
            "or a network that contains it"
        )
    if (
        type(tracer).__name__ == "NodePathTracer"
    ):  # of torchvision's feature extractors, which name nodes inside modules
        warn(
            f"torch.fx records {tracer.path_of_module(module)} as one call: a feature extractor for nodes inside it takes "
            "fused_densenet.unfuse(model)",
            UserWarning,
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})


def warn_of_foreign_modes() -> None:
    """Warns where somebody's ``TorchDispatchMode``, which may count operators or change them, sees one instead of many."""
    kind = type(_get_current_dispatch_mode())
    if kind is not type(None) and not kind.__module__.startswith(("torch.", "fused_densenet.")):
        _warn_of_one_operator(kind.__name__)


@functools.cache
def _warn_of_one_operator(what: str) -> None:
    warn(
        f"{what} sees a fused module as one operator: where it counts, quantises or changes operators, "
        "give it fused_densenet.unfuse(model)",
        UserWarning,
    )


def exports_operators() -> bool:
    """Whether the caller is an ONNX exporter, which has no fused operators."""
    return torch.onnx.is_in_onnx_export()


def refuse_script() -> NoReturn:
    raise RuntimeError(
        "torch.jit.script cannot compile a fused module: script fused_densenet.unfuse(model), the model as it was before "
        "fuse, or record the operators with torch.jit.trace; torch.export takes the fused model"
    )
