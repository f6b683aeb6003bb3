"""Networks of public code, whatever their parts are called: what runs fused gives the same, what does not says why."""

import copy

import pytest
import torch
from networks import assert_same_step
from rebuilt_networks import NETWORKS, built
from small_networks import blocks, results
from torch import Tensor

from fused_densenet import FusedTransition, explain, fuse, strict, unfuse


def images() -> Tensor:
    return torch.randn(3, 3, 12, 14, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:not every dense block can be fused")
def test_network(name: str) -> None:
    expected = NETWORKS[name]
    theirs = built(name)
    ours = fuse(copy.deepcopy(theirs))
    assert len(blocks(ours)) == expected.blocks
    assert sum(isinstance(m, FusedTransition) for m in ours.modules()) == expected.transitions
    left = [report for report in explain(ours).blocks if not report.fused]
    assert len(left) == len(expected.reasons)
    assert all(reason in " ".join(report.reasons) for report, reason in zip(left, expected.reasons, strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images()
    for training in (True, False):
        with strict():
            assert_same_step(results(ours.train(training), x), results(theirs.train(training), x))
    kinds = [type(module) for module in theirs.modules()]
    assert [type(module) for module in unfuse(ours).modules()] == kinds
