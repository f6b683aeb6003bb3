"""What tells torch.compile how to take a function, without importing the compiler: that takes longer than all the rest."""

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant(function: _Function) -> _Function:
    """What ``torch.compiler.assume_constant_result`` does: a compiler calls the function rather than traces it."""
    vars(function)["_dynamo_marked_constant"] = True
    return function
