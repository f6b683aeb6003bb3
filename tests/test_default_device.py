"""Everything here is on the CPU, whatever torch's default device is when a module runs for the first time."""

import copy

import pytest
import torch
from blocks import step
from networks import assert_same_step
from tolerances import assert_largest
from torch import nn

from fused_densenet import FusedDenseBlock, FusedTransition, reference, strict

PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "block": (FusedDenseBlock(3, 7, 3, 5), reference.DenseBlock(3, 7, 3, 5), (2, 7, 6, 5)),
    "transition": (FusedTransition(7, 5), reference.Transition(7, 5), (2, 7, 6, 5)),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("training", [True, False])
def test_a_first_call(kind: str, training: bool) -> None:
    ours, theirs, size = PAIRS[kind]
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = (copy.deepcopy(module).double().train(training) for module in (ours, theirs))
    x = torch.randn(size, dtype=torch.float64)
    with torch.device("meta"), strict():
        out = ours(x)
        out.square().sum().backward()
    expected = theirs(x)
    expected.square().sum().backward()
    assert_largest(out, expected, "float64 whole block", "output")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_largest(a.grad, b.grad, "float64 whole block", name)
    assert_same_step(step(ours, x), step(theirs, x))
