"""Launches of any kind in a training step and in an inference of DenseNet-121, by kernel."""

import counted_triton
import launch_counts
import pytest

MOST = {"training": 700, "inference": 200}


@pytest.mark.parametrize("kind", launch_counts.KINDS)
def test_launches(kind: str) -> None:
    launch_counts.check("triton", kind, counted_triton.count(kind), MOST[kind])
