"""Peak memory of a training step of the whole DenseNet-121, float32, batch 8, 224 by 224: the allocator's events."""

import pathlib
import sys
from collections.abc import Callable

import peers
import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch import nn

import fused_densenet

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

from allocator import StepMemory, step_memory

OURS: dict[str, Callable[..., nn.Module]] = {
    "DenseNet": fused_densenet.densenet121,
    "fuse(torchvision's)": lambda memory_efficient: fused_densenet.fuse(
        peers.densenet121(), memory_efficient=memory_efficient
    ),
}


def measured(network: nn.Module) -> StepMemory:
    """Forward, cross-entropy and backward; the update by SGD without momentum is in place."""
    x, labels = torch.randn(8, 3, 224, 224), torch.arange(8)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, foreach=False)
    return step_memory(
        lambda: F.cross_entropy(network(x), labels),
        lambda: (optimizer.step(), optimizer.zero_grad(set_to_none=True))[1],
        torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def torchvisions() -> StepMemory:
    return measured(peers.densenet121())


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("network", OURS)
def test_peak_beside_torchvisions(network: str, memory_efficient: bool, torchvisions: StepMemory) -> None:
    ours = measured(OURS[network](memory_efficient=memory_efficient))
    least = tolerance("torchvision's peak, memory_efficient" if memory_efficient else "torchvision's peak")
    assert torchvisions.peak_bytes >= least * ours.peak_bytes, torchvisions.peak_bytes / ours.peak_bytes
    assert ours.saved_bytes < ours.peak_bytes
