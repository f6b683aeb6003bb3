"""Checks of arguments: each error names the argument, what was expected and what came."""

import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor, nn


def integer(name: str, value: Any) -> int:
    """Of whatever type that stands for one (numpy's, too), as Python's; a bool is none."""
    try:
        return operator.index("" if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None


def counts(**values: Any) -> list[int]:
    """Integers of at least 1."""
    found = [integer(name, value) for name, value in values.items()]
    for name, value in zip(values, found, strict=True):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    return found


def dimensions(spatial_dims: Any) -> int:
    found = integer("spatial_dims", spatial_dims)
    if found not in (1, 2, 3):
        raise ValueError(f"spatial_dims: expected 1, 2 or 3, got {found}")
    return found


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    return float(value)


def rate(name: str, value: Any, what: str = "a probability") -> float:
    found = number(name, value)
    if not 0 <= found <= 1:
        raise ValueError(f"{name}: expected {what} between 0 and 1, got {value}")
    return found


def check_flags(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_module(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(value).__name__}")


def sequence(name: str, values: Any) -> list[int]:
    """One or more integers of at least 1."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of ints, got {type(values).__name__}")
    found = counts(**{f"{name}[{i}]": value for i, value in enumerate(values)})
    if not found:
        raise ValueError(f"{name}: expected at least one entry, got {values!r}")
    return found


def check_image(x: Any, name: str, channels: int, spatial_dims: int) -> None:
    """Type and shape of feature maps."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    sizes = ("W", "H, W", "D, H, W")[spatial_dims - 1]
    if x.dim() != spatial_dims + 2:
        raise ValueError(
            f"{name}: expected {spatial_dims + 2} dimensions (N, C, {sizes}), got {x.dim()} of shape {tuple(x.shape)}"
        )
    if x.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got {x.shape[1]}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}: expected sizes of at least 1, got shape {tuple(x.shape)}")
