"""That what a module is called with fits its parameters."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..ops.ranks import sync_group
from .reasons import autocasts, uses_batch_stats


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
