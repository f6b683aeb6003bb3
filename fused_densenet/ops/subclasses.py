"""Subclasses of Tensor: a fused module is one function to them, as any of torch's is."""

from collections.abc import Callable

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def on_plain(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(x)`` of a plain tensor; the result is what the class of ``x`` makes of results of torch's functions."""
    if has_torch_function_unary(x):
        result: Tensor = handle_torch_function(on_plain, (x,), x, function)
        return result
    return function(x if type(x) is Tensor else x.as_subclass(Tensor))
