"""Tile sizes of the kernels for each class of shapes: a fixed choice, and the candidates that autotuning tries.

With FUSED_DENSENET_AUTOTUNE=1 in the environment the candidates are timed at the first call of each shape class and
the fastest is kept, in the process and on disk (:mod:`.tiles_on_disk`); otherwise, and while a CUDA graph is captured, the
first candidate is taken. That is the default: another tile adds in another order, so only fixed choices give the same
bits on every machine of a kind and in every process, and the first step does not compile and time what it discards.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from ...variables import is_on
from . import tiles_on_disk
from .tiles_on_disk import Tile

AUTOTUNE = is_on("FUSED_DENSENET_AUTOTUNE")


class ShapeClass(NamedTuple):
    """What a kernel's best tile depends on.

    Attributes:
        kernel: the kernel's name.
        arithmetic: "half" (bfloat16 and float16), "tf32" or "ieee".
        k: output channels (tap rows in ``backward_weight``), rounded up to a power of two.
        taps: taps of the convolution.
        c: input channels, rounded up to a power of two.
        pixels: of the output, rounded up to a power of four.
        pool: whether windows are averaged on load.
    """

    kernel: str
    arithmetic: str
    k: int
    taps: int
    c: int
    pixels: int
    pool: bool


Choices = dict[int, list[Tile]]
"""By the most output channels that they serve; the first is the fixed choice, none a kernel that would not fit."""

_TILES: dict[tuple[str, str], Choices] = {
    ("norm_relu_conv", "half"): {
        16: [Tile(64, 64, 16, 4, 3), Tile(128, 64, 16, 4, 3)],
        32: [Tile(64, 64, 32, 4, 3), Tile(128, 64, 32, 4, 3)],
        64: [Tile(64, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 8, 2)],
        128: [Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 8, 3)],
        256: [Tile(64, 32, 256, 8, 3), Tile(64, 32, 256, 8, 2)],
    },
    ("norm_relu_conv", "tf32"): {
        64: [Tile(64, 32, 64, 4, 3)],
        128: [Tile(64, 32, 128, 8, 3)],
        256: [Tile(64, 32, 256, 8, 2)],
    },
    ("norm_relu_conv", "ieee"): {256: [Tile(32, 32, 32, 4, 1)]},
    ("norm_relu_conv pooled", "half"): {128: [Tile(64, 32, 128, 8, 2)], 256: [Tile(32, 32, 256, 8, 1)]},
    ("norm_relu_conv pooled", "tf32"): {128: [Tile(32, 32, 128, 8, 1)], 256: [Tile(32, 32, 256, 8, 1)]},
    ("norm_relu_conv pooled", "ieee"): {256: [Tile(32, 32, 32, 4, 1)]},
    ("backward_pointwise", "half"): {
        64: [Tile(64, 64, 64, 8, 2)],
        128: [Tile(64, 64, 128, 8, 2), Tile(64, 32, 128, 8, 2)],
        256: [Tile(64, 32, 256, 8, 2), Tile(32, 32, 256, 8, 2)],
    },
    ("backward_pointwise", "tf32"): {128: [Tile(64, 32, 128, 8, 1)], 256: [Tile(16, 32, 256, 8, 1)]},
    ("backward_pointwise pooled", "half"): {128: [Tile(32, 32, 128, 8, 1)], 256: [Tile(16, 32, 256, 8, 1)]},
    ("backward_pointwise pooled", "tf32"): {128: [Tile(16, 32, 128, 8, 1)], 256: [Tile(16, 32, 256, 8, 1)]},
    ("backward_data", "half"): {
        16: [Tile(64, 128, 16, 8, 2), Tile(64, 64, 16, 4, 2)],
        32: [Tile(64, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2)],
        256: [Tile(64, 64, 64, 8, 2), Tile(64, 64, 32, 4, 2)],
    },
    ("backward_data", "tf32"): {256: [Tile(64, 64, 32, 4, 2)]},
    ("backward_data", "ieee"): {256: [Tile(32, 32, 32, 4, 1)]},
    ("backward_data pooled", "half"): {256: [Tile(64, 64, 64, 8, 2)]},
    ("backward_data pooled", "tf32"): {256: [Tile(32, 64, 32, 4, 2)]},
    ("backward_data pooled", "ieee"): {256: [Tile(32, 32, 32, 4, 1)]},
    ("backward_weight", "half"): {256: [Tile(32, 64, 64, 8, 2)]},
    ("backward_weight", "tf32"): {256: [Tile(32, 64, 64, 8, 1)]},
    ("backward_weight", "ieee"): {256: [Tile(32, 32, 32, 4, 1)]},
    ("backward_weight pooled", "half"): {256: [Tile(32, 64, 64, 8, 1)]},
    ("backward_weight pooled", "tf32"): {256: [Tile(32, 32, 64, 8, 1)]},
    ("backward_weight pooled", "ieee"): {256: [Tile(32, 32, 32, 4, 1)]},
}

_SMALL: dict[tuple[str, str], list[Tile]] = {
    ("norm_relu_conv", "half"): [Tile(32, 32, 64, 4, 3)],
    ("norm_relu_conv", "tf32"): [Tile(32, 16, 32, 8, 3)],
    ("backward_data", "half"): [Tile(64, 64, 32, 4, 2), Tile(32, 64, 32, 8, 2)],
}
"""Further candidates of every family, for so few pixels that the others leave multiprocessors without a program."""

_MMA_SYNC: dict[tuple[str, str], Choices] = {
    ("backward_pointwise", "half"): {
        64: [Tile(64, 32, 64, 8, 2)],
        128: [Tile(64, 32, 128, 8, 2)],
        256: [Tile(32, 32, 256, 8, 2)],
    },
    ("backward_pointwise", "tf32"): {128: [Tile(32, 32, 128, 8, 1)]},
    ("backward_weight", "tf32"): {256: [Tile(32, 32, 64, 8, 1)]},
}
"""Where ``mma.sync`` keeps the sums of both products in registers."""

_TILES_OF: dict[str, dict[tuple[str, str], Choices]] = {
    "sm_80": {
        **_MMA_SYNC,
        ("norm_relu_conv pooled", "ieee"): {256: [Tile(32, 16, 32, 8, 1)]},
        ("backward_data", "ieee"): {256: [Tile(32, 32, 32, 8, 1)]},
    },
    "sm_90": {
        ("norm_relu_conv pooled", "half"): {256: [Tile(64, 32, 256, 8, 2)]},
        ("norm_relu_conv pooled", "tf32"): {128: [Tile(64, 32, 128, 8, 1)], 256: [Tile(64, 32, 256, 8, 1)]},
        ("backward_data", "ieee"): {256: [Tile(32, 32, 32, 8, 1)]},
        ("backward_data pooled", "tf32"): {256: [Tile(64, 64, 32, 8, 2)]},
        ("backward_pointwise pooled", "half"): {128: [Tile(64, 32, 128, 8, 2), Tile(32, 32, 128, 8, 1)]},
    },
    "sm_100": {
        ("norm_relu_conv", "half"): {
            16: [Tile(64, 32, 16, 4, 3)],
            64: [Tile(128, 32, 64, 8, 2)],
            128: [Tile(64, 64, 128, 8, 3), Tile(128, 32, 128, 8, 3)],
        },
        ("norm_relu_conv pooled", "half"): {128: [Tile(64, 32, 128, 8, 1)], 256: [Tile(64, 32, 256, 8, 1)]},
        ("norm_relu_conv pooled", "tf32"): {128: [Tile(64, 32, 128, 8, 1)], 256: [Tile(64, 32, 256, 8, 1)]},
        ("backward_data", "half"): {32: [Tile(64, 64, 32, 4, 2)], 256: [Tile(64, 64, 32, 4, 2)]},
        ("backward_data", "tf32"): {256: [Tile(64, 64, 32, 8, 2)]},
        ("backward_data", "ieee"): {256: [Tile(32, 32, 32, 8, 1)]},
        ("backward_data pooled", "tf32"): {256: [Tile(64, 64, 32, 8, 2)]},
        ("backward_pointwise", "half"): {64: [Tile(64, 32, 64, 8, 2)]},
        ("backward_pointwise", "tf32"): {16: [Tile(64, 32, 16, 4, 1)]},
        ("backward_pointwise pooled", "half"): {128: [Tile(64, 32, 128, 8, 1)], 256: [Tile(32, 32, 256, 8, 1)]},
        ("backward_pointwise pooled", "tf32"): {128: [Tile(16, 32, 128, 4, 1)]},
    },
    "sm_120": {
        **_MMA_SYNC,
        ("norm_relu_conv", "tf32"): {16: [Tile(32, 32, 16, 4, 3)]},
        ("norm_relu_conv", "half"): {
            16: [Tile(64, 32, 16, 8, 3)],
            64: [Tile(64, 64, 64, 8, 3)],
            128: [Tile(64, 64, 128, 8, 3), Tile(128, 32, 128, 8, 3)],
        },
        ("norm_relu_conv", "ieee"): {256: [Tile(32, 16, 32, 8, 1)]},
        ("backward_pointwise", "tf32"): {
            32: [Tile(32, 32, 32, 8, 1)],
            64: [Tile(32, 16, 64, 8, 1)],
            128: [Tile(32, 32, 128, 8, 1)],
            256: [Tile(16, 16, 256, 8, 1)],
        },
        ("backward_pointwise pooled", "tf32"): {128: [Tile(32, 16, 128, 8, 1)], 256: [Tile(16, 16, 256, 8, 1)]},
    },
    "gfx1100": {
        ("norm_relu_conv", "half"): {
            16: [Tile(64, 32, 16, 4, 1)],
            32: [Tile(64, 32, 32, 8, 1)],
            64: [Tile(64, 32, 64, 8, 1)],
            128: [Tile(64, 32, 64, 8, 1)],
            256: [Tile(64, 32, 64, 8, 1)],
        },
        ("norm_relu_conv pooled", "half"): {128: [Tile(32, 32, 64, 8, 1)], 256: [Tile(32, 32, 64, 8, 1)]},
        ("backward_data", "half"): {
            16: [Tile(64, 64, 16, 8, 1)],
            32: [Tile(64, 64, 32, 8, 1)],
            256: [Tile(64, 32, 32, 8, 1)],
        },
        ("backward_data pooled", "half"): {256: [Tile(32, 32, 32, 8, 1)]},
        ("backward_pointwise", "half"): {
            64: [Tile(32, 32, 64, 8, 1)],
            128: [Tile(32, 32, 128, 8, 1)],
            256: [],
        },
        ("backward_pointwise pooled", "half"): {64: [Tile(16, 16, 64, 8, 1)], 128: [], 256: []},
        ("backward_weight", "half"): {256: [Tile(32, 32, 32, 4, 1)]},
        ("backward_weight pooled", "half"): {256: [Tile(32, 32, 32, 4, 1)]},
    },
    "gfx942": {
        ("norm_relu_conv", "half"): {
            32: [Tile(64, 64, 32, 4, 3)],
            64: [Tile(64, 64, 64, 4, 3)],
            128: [Tile(64, 32, 128, 8, 2)],
            256: [Tile(64, 32, 256, 8, 2)],
        },
        ("backward_pointwise", "half"): {
            64: [Tile(32, 32, 64, 8, 1)],
            128: [Tile(32, 32, 128, 8, 1)],
            256: [Tile(16, 32, 256, 8, 1)],
        },
        ("backward_pointwise pooled", "half"): {128: [Tile(16, 32, 128, 8, 1)]},
    },
}
"""Where a family of GPUs differs: fewer registers or less shared memory than what the others use."""


def candidates(shape: ShapeClass, family: str) -> list[Tile]:
    """The tiles worth trying on a family of GPUs, the fixed choice first."""
    key = (shape.kernel + " pooled" * shape.pool, shape.arithmetic)
    choices = _choices(key, family)
    k = min(shape.k, max(choices))
    tiles = next(choices[most] for most in sorted(choices) if k <= most)
    if tiles[0].stages > 1:  # one stage is for GPUs whose registers hold no more
        tiles = tiles + _SMALL.get(key, [])
    return list(dict.fromkeys(tile._replace(k=min(k, tile.k)) for tile in tiles))


def widest(kernel: str, arithmetic: str, pool: bool, family: str) -> int:
    """The most output channels that a kernel serves with one tile on a family of GPUs."""
    return max(_choices((kernel + " pooled" * pool, arithmetic), family), default=0)


def _choices(key: tuple[str, str], family: str) -> Choices:
    choices = _TILES.get(key, {}) | _TILES_OF.get(family, {}).get(key, {})
    return {most: tiles for most, tiles in choices.items() if tiles}


_chosen: dict[tuple[ShapeClass, torch.device], Tile] = {}


def tile(shape: ShapeClass, device: torch.device, pixels: int) -> Tile:
    """The tile in use for a shape class on a device: what tuning found, or the first that gives every multiprocessor a
    program where the output has so many pixels, or the one with the most programs."""
    found = _chosen.get((shape, device))
    if found is not None:
        return found
    choices = candidates(shape, family(device))
    if shape.kernel not in ("norm_relu_conv", "backward_data"):  # the others divide the pixels by the multiprocessors
        return choices[0]

    def programs(choice: Tile) -> int:
        columns = -(-shape.k // choice.k) if shape.kernel == "norm_relu_conv" else -(-shape.c // choice.c)
        return -(-pixels // choice.p) * columns

    filling = [choice for choice in choices if programs(choice) >= multiprocessors(device)]
    return filling[0] if filling else max(choices, key=programs)


def tune(shape: ShapeClass, device: torch.device, run: Callable[[Tile], None]) -> bool:
    """Times ``run`` with every candidate and keeps the fastest, for this process and on disk; whether it did.

    Does nothing where that is done, here or by an earlier process, and while a CUDA graph is captured. A candidate that
    does not fit a GPU's shared memory or registers is left out.
    """
    if (shape, device) in _chosen:
        return False
    with contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
        return _tune(shape, device, run)


def _tune(shape: ShapeClass, device: torch.device, run: Callable[[Tile], None]) -> bool:
    """On the current device, whose streams and events these are."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    choices = candidates(shape, family(device))
    file = tiles_on_disk.file(device)
    found = tiles_on_disk.read(file).get(str(shape))
    if found not in choices:
        found = min(choices, key=lambda choice: _fastest(functools.partial(run, choice), device))
        tiles_on_disk.write(file, str(shape), found)
    _chosen[shape, device] = found
    return True


def _fastest(run: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of the fastest of a few runs; infinity where the kernel does not fit."""
    try:
        run()
    except OutOfResources:
        return math.inf
    return min(_milliseconds(run, device) for _ in range(5))


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    module = torch.get_device_module(device)
    start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def family(device: torch.device) -> str:
    """The GPUs whose choices a device shares, named by the one that the choices are compiled for.

    "sm_80" stands for compute capability 8 and, until someone tunes them, for Intel's; "gfx942" for AMD's data center GPUs,
    "gfx1100" for its others.
    """
    if device.type != "cuda":
        return "sm_90" if device.type == "cpu" else "sm_80"
    major = torch.cuda.get_device_capability(device)[0]
    if torch.version.hip is not None:
        return "gfx942" if major == 9 else "gfx1100"
    return {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major, "sm_80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or what other makers call so; 1 for the interpreter."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return properties.multi_processor_count if device.type == "cuda" else properties.gpu_subslice_count
