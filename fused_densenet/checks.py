"""Errors for bad arguments and inputs: each names the argument, what was expected and what came."""

from collections.abc import Sequence

from torch import Tensor

from .fallback import autocasts, uses_batch_stats
from .layers import LayerParts
from .ranks import sync_group


def check_block_arguments(
    num_layers: int,
    num_input_features: int,
    bn_size: int | None,
    growth_rate: int,
    drop_rate: float,
    spatial_dims: int,
) -> None:
    counts = {"num_layers": num_layers, "num_input_features": num_input_features, "growth_rate": growth_rate}
    if bn_size is not None:
        counts["bn_size"] = bn_size
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not isinstance(drop_rate, (int, float)):
        raise TypeError(f"drop_rate: expected a float, got {type(drop_rate).__name__}")
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate: expected a probability between 0 and 1, got {drop_rate}")
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"spatial_dims: expected 1, 2 or 3, got {spatial_dims}")


def check_input(x: Tensor, num_input_features: int, spatial_dims: int) -> None:
    """Type and shape of a block's input."""
    if not isinstance(x, Tensor):
        raise TypeError(f"init_features: expected a Tensor, got {type(x).__name__}")
    names = ("W", "H, W", "D, H, W")[spatial_dims - 1]
    if x.dim() != spatial_dims + 2:
        raise ValueError(
            f"init_features: expected {spatial_dims + 2} dimensions (N, C, {names}), got {x.dim()} of shape {tuple(x.shape)}"
        )
    if x.shape[1] != num_input_features:
        raise ValueError(f"init_features: expected {num_input_features} channels, got {x.shape[1]}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"init_features: expected a floating dtype, got {x.dtype}")


def check_agreement(x: Tensor, layers: Sequence[LayerParts]) -> None:
    """That a block's input and its parameters fit each other: device, dtype, values enough for the statistics."""
    for number, parts in enumerate(layers, 1):
        for name, module in parts.modules.items():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.device != x.device:
                    raise ValueError(
                        f"init_features: expected device {tensor.device}, where denselayer{number}.{name}.{key} is, "
                        f"got {x.device}"
                    )
    weight_dtype = layers[0].stages[0].conv.weight.dtype
    if x.dtype != weight_dtype and not autocasts(x):
        raise TypeError(f"init_features: expected {weight_dtype}, the dtype of the parameters, got {x.dtype}")
    if x.numel() == x.shape[1] and any(
        uses_batch_stats(stage.norm) and sync_group(stage.norm) is None for parts in layers for stage in parts.stages
    ):
        raise ValueError(
            f"init_features: expected more than one value per channel in training, got shape {tuple(x.shape)}"
        )
