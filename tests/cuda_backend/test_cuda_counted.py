"""Launches of any kind in a training step and in an inference of DenseNet-121, by kernel."""

import counted_cuda
import launch_counts
import pytest

MOST = {"training": 450, "inference": 150}


@pytest.mark.parametrize("kind", launch_counts.KINDS)
def test_launches(kind: str) -> None:
    launch_counts.check("cuda", kind, counted_cuda.count(kind), MOST[kind])
