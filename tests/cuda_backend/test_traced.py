"""torch.compile of a fused network on a GPU, as far as a machine without one can: one graph, no warning."""

import ast
import os
import sys
from pathlib import Path

import building
import fake_gpu
import pytest
import torch

TORCH = Path(torch.__file__).parent


def library(source: str, language: str, *flags: str) -> Path:
    def make(made: Path) -> None:
        text = made.with_suffix(".txt")
        text.write_text(source)
        building.run([building.COMPILER, "-shared", "-fPIC", "-x", language, text, "-x", "none", "-o", made, *flags])

    return building.cached(".so", [source, flags], make)


@pytest.mark.parametrize(("asked", "chosen"), [("auto", "cuda"), ("cuda", "cuda"), ("triton", "triton")])
def test_one_graph(asked: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels for CUDA present, and whatever backend is asked for; dynamo does not see how it is chosen."""
    guard = library(fake_gpu.GUARD, "c++", "-std=c++20", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-lc10")
    kernels = library(fake_gpu.KERNELS, "c")
    folder = Path(fake_gpu.__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(folder.parent)]))
    graphs = ast.literal_eval(building.run([sys.executable, fake_gpu.__file__, asked, guard, kernels]).splitlines()[-1])
    assert len(graphs) == 1
    operators = {operator.partition(" on ")[0].split(".")[1] for operator in graphs[0]}
    assert operators == {"stem", "channel_moments", "dense_block", "transition"}
    assert all(operator.endswith(f" on {chosen}") for operator in graphs[0])
