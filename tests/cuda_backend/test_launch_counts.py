"""Launches of a training step and of an inference of DenseNet-121, counted where the binding makes them."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import binding
import building
import launch_counts
import nvcc
import pytest
import report
import torch
from emulated import load
from ptx_launch import launches

NAMESPACE, MULTIPROCESSORS = "fused_densenet_counted", 132
MOST = {"training": 450, "inference": 150}


@pytest.fixture(scope="module")
def library() -> Iterator[Path]:
    """The binding and the kernels, for a GPU like an H100."""
    library = binding.build(NAMESPACE, building.kernels(), MULTIPROCESSORS)
    operators = binding.define(NAMESPACE)
    torch.ops.load_library(library)
    yield library
    del operators


@pytest.mark.parametrize("kind", MOST)
def test_launches(library: Path, kind: str) -> None:
    counts: Counter[str] = Counter()
    namespace = getattr(torch.ops, NAMESPACE)

    def call(function: Any, *arguments: Any) -> None:
        getattr(namespace, function.overloadpacket.__name__).default(*arguments)

    with launches(load(library), lambda launch: counts.update([nvcc.readable(launch.kernel).partition("<")[0]])):
        launch_counts.count("cuda", kind == "training", counts, call)
    found = launch_counts.table(counts)
    report.sections[f"CUDA: launches, {kind}"] += [f"{count:4} {name}" for name, count in found.items()]
    assert found == launch_counts.expected(f"cuda {kind}")
    assert found["all"] <= MOST[kind]
