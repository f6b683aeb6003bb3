"""Training of the packages' networks, fused and as they come: the same losses, step by step."""

import pytest
import torch
from packages import PACKAGES, build, images
from tolerances import tolerance
from torch import Tensor, nn

from fused_densenet import fuse


def train(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step towards arbitrary targets; the loss before it."""
    optimizer.zero_grad()
    out = model(x)
    target = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
    loss = nn.functional.mse_loss(out, target)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", PACKAGES)
def test_twenty_steps(name: str) -> None:
    theirs, ours, x = build(name), build(name), images(name)
    dtype = torch.float64 if x.dim() == 4 else torch.float32  # a volume in float64 takes too long
    x = x.to(dtype)
    losses: list[list[float]] = []
    for model in (theirs, fuse(ours)):
        model.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
        losses.append([train(model, x, optimizer) for _ in range(20)])
    assert losses[0][-1] < 0.9 * losses[0][0]
    limit = tolerance(f"{str(dtype).removeprefix('torch.')} training") * max(losses[0])
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=limit)
