"""Errors for bad arguments and inputs: each names the argument, what was expected and what came."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..ops.ranks import sync_group
from .reasons import autocasts, uses_batch_stats


def check_counts(counts: Mapping[str, object]) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def check_spatial_dims(spatial_dims: int) -> None:
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"spatial_dims: expected 1, 2 or 3, got {spatial_dims}")


def check_block_arguments(
    num_layers: int,
    num_input_features: int,
    bn_size: int | None,
    growth_rate: int,
    drop_rate: float,
    spatial_dims: int,
    bottleneck_drop_rate: float = 0.0,
) -> None:
    counts = {"num_layers": num_layers, "num_input_features": num_input_features, "growth_rate": growth_rate}
    if bn_size is not None:
        counts["bn_size"] = bn_size
    check_counts(counts)
    check_rate("drop_rate", drop_rate, "a probability")
    check_rate("bottleneck_drop_rate", bottleneck_drop_rate, "a probability")
    if bn_size is None and bottleneck_drop_rate:
        raise ValueError(f"bottleneck_drop_rate: expected 0 where bn_size is None, got {bottleneck_drop_rate}")
    check_spatial_dims(spatial_dims)


def check_rate(name: str, value: object, what: str) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected {what} between 0 and 1, got {value}")


def check_image(x: Tensor, name: str, channels: int, spatial_dims: int) -> None:
    """Type and shape of a module's input, its argument ``name``."""
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


def check_parameters(
    x: Tensor,
    name: str,
    modules: Iterable[tuple[str, nn.Module]],
    dtype: torch.dtype,
    norms: Sequence[nn.Module],
) -> None:
    """That an input fits a module's parameters: their device, their dtype, values enough for the norms' statistics."""
    device = x.device
    for path, module in modules:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{name}: expected device {tensor.device}, where {path}.{key} is, got {device}")
    if x.dtype != dtype and not autocasts(x):
        raise TypeError(f"{name}: expected {dtype}, the dtype of the parameters, got {x.dtype}")
    if x.numel() == x.shape[1] and any(uses_batch_stats(norm) and sync_group(norm) is None for norm in norms):
        raise ValueError(f"{name}: expected more than one value per channel in training, got shape {tuple(x.shape)}")
