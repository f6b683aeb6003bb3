"""Subclasses of Tensor: a fused module is one function to them, as any of torch's is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

_DISABLED = torch._C._disabled_torch_function_impl
"""Of classes that are no other to torch's functions: Parameter, and those that tracers use."""


def on_plain(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(x)`` of a plain tensor; the result is what the class of ``x`` makes of results of torch's functions."""
    kind: Any = type(x)
    if kind is not Tensor and kind.__torch_function__ is not _DISABLED and has_torch_function_unary(x):
        result: Tensor = handle_torch_function(_on_plain, (x,), x, function)
        return result
    return function(x)


def _on_plain(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(x.as_subclass(Tensor))
