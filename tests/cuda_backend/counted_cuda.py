"""What a step of DenseNet-121 launches, counted where csrc/cuda_binding.cpp launches it on a GPU like an H100."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import binding
import building
import launch_counts
import nvcc
import torch
from emulated import load
from ptx_launch import launches

NAMESPACE, MULTIPROCESSORS = "fused_densenet_counted", 132


@functools.cache
def _library() -> tuple[Path, torch.library.Library]:
    library = binding.build(NAMESPACE, building.kernels(), MULTIPROCESSORS)
    operators = binding.define(NAMESPACE)
    torch.ops.load_library(library)
    return library, operators


def count(kind: str) -> dict[str, int]:
    """``kind`` is one of :data:`launch_counts.KINDS`."""
    with _counted() as (counts, call):
        launch_counts.count("cuda", kind == "training", counts, call)
    return launch_counts.table(counts)


def launches_in(run: Callable[[], None]) -> Counter[str]:
    """Of modules on tensors without data, by kernel and operator of torch."""
    with _counted() as (counts, call), launch_counts.calls("cuda", counts, call):
        run()
    return counts


@contextlib.contextmanager
def _counted() -> Iterator[tuple[Counter[str], Callable[..., None]]]:
    """What is counted, and what runs a call of ours."""
    counts: Counter[str] = Counter()
    library, _ = _library()

    def call(function: Any, *arguments: Any) -> None:
        getattr(getattr(torch.ops, NAMESPACE), function.overloadpacket.__name__).default(*arguments)

    with launches(load(library), lambda launch: counts.update([nvcc.readable(launch.kernel).partition("<")[0]])):
        yield counts, call
