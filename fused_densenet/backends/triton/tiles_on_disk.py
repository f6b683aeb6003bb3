"""What autotuning found, kept for later processes: one file for each GPU model and set of versions.

The files are in ``$XDG_CACHE_HOME/fused_densenet`` (``~/.cache/fused_densenet``); deleting them is safe. Where they cannot be
written, a choice holds for its process.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ... import __version__


class Tile(NamedTuple):
    """What one program computes at a time: ``p`` pixels, ``c`` input channels, ``k`` output channels (or tap rows)."""

    p: int
    c: int
    k: int
    warps: int
    stages: int


def file(device: torch.device) -> Path:
    """The file for the model of a GPU and the versions that are installed."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = torch.get_device_module(device).get_device_name(device)
    what = f"{name}, torch {torch.__version__}, triton {triton.__version__}, fused_densenet {__version__}"
    return root / "fused_densenet" / f"tiles-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def read(path: Path) -> dict[str, Tile]:
    """By shape class; empty where there is no such file, or it holds something else."""
    try:
        return {shape: Tile(*values) for shape, values in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write(path: Path, shape: str, tile: Tile) -> None:
    """Adds a choice. The file is replaced as a whole, so that other processes never see half of it."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles = read(path) | {shape: tile}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as temporary:
            json.dump(tiles, temporary, indent=1)
        os.replace(temporary.name, path)
