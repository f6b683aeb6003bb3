"""Weights for a network: from a file, or torchvision's published ones."""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Weights: TypeAlias = str | os.PathLike[str] | Any | None
"""A path, a member of torchvision's weight enums (``DenseNet121_Weights.DEFAULT``), or None."""

_NESTED = ("state_dict", "model_state_dict", "model")


def load_weights(weights: str | os.PathLike[str] | Any, enum_name: str, progress: bool = True) -> dict[str, Tensor]:
    """A DenseNet's state dict.

    Args:
        weights: the path of a file that ``torch.save`` wrote, of a state dict or of a checkpoint that holds one as
            ``state_dict``, ``model_state_dict`` or ``model``, whose keys may begin with ``module.`` (as
            DistributedDataParallel saves them); or a member of torchvision's enum ``enum_name``, which is downloaded
            once by torchvision. Files are read with ``weights_only``: they cannot run code.
        progress: show the download.

    Raises:
        TypeError: ``weights`` is neither, or of another network's enum.
        ValueError: the file holds no state dict of a DenseNet.
    """
    if isinstance(weights, str | os.PathLike):
        found = torch.load(weights, map_location="cpu", weights_only=True)
        for name in _NESTED:
            if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
                found = found[name]
                break
        state = {str(k).removeprefix("module."): v for k, v in found.items()} if isinstance(found, Mapping) else {}
        if not isinstance(state.get("classifier.weight"), Tensor):
            raise ValueError(f"weights: expected a state dict with classifier.weight in {os.fspath(weights)}")
        return state
    if type(weights).__name__ != enum_name or not hasattr(weights, "get_state_dict"):
        raise TypeError(f"weights: expected a path or a member of torchvision's {enum_name}, got {weights!r}")
    return dict(weights.get_state_dict(progress=progress, check_hash=True))
