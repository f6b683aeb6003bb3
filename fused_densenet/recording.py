"""What records a network instead of running it: torch.fx, torch.jit.script, the ONNX exporters."""

from typing import Any, NoReturn

import torch
from torch import nn


def one_call(module: nn.Module, x: torch.fx.Proxy) -> Any:
    """What ``torch.fx.symbolic_trace`` records of a fused module: one call of it."""
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})


def exports_operators() -> bool:
    """Whether the caller is an ONNX exporter, which has no fused operators."""
    return torch.onnx.is_in_onnx_export()


def refuse_script() -> NoReturn:
    raise RuntimeError(
        "torch.jit.script cannot compile a fused module: script fused_densenet.unfuse(model), the model as it was before "
        "fuse, or record the operators with torch.jit.trace; torch.export takes the fused model"
    )
