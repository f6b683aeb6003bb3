"""Children of a Sequential that were put in another order: what is computed is in that order, too."""

import copy
from typing import Any

import packages
import pytest
import rebuilt_networks
import torch
from networks import torchvisions
from tolerances import assert_largest
from torch import nn

from fused_densenet import FallbackWarning, FusedDenseBlock, FusedTransition, fuse, strict


def to_the_end(sequence: Any, name: str) -> None:
    """Takes a child out and puts it in again, behind all others."""
    child = getattr(sequence, name)
    delattr(sequence, name)
    setattr(sequence, name, child)


def relu_of_a_transition(model: Any) -> None:
    to_the_end(model.features.transition1, "relu")


@pytest.mark.parametrize("before_fuse", [True, False])
@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@torch.no_grad()
def test_a_transition(before_fuse: bool) -> None:
    theirs = torchvisions().eval()
    if before_fuse:
        relu_of_a_transition(theirs)
    ours = fuse(copy.deepcopy(theirs))
    if not before_fuse:
        ours(torch.randn(1, 3, 32, 32, dtype=torch.float64))
        for model in (theirs, ours):
            relu_of_a_transition(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_largest(ours(x), theirs(x), "float64 whole block", "output")


def test_our_own_transition() -> None:
    transition, x = FusedTransition(8, 4).double(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    transition(x)
    to_the_end(transition, "relu")
    with pytest.warns(FallbackWarning, match="calls norm, conv, pool, relu in this order"):
        out = transition(x)
    assert out.min() == 0
    assert_largest(out, nn.Sequential.forward(transition, x), "float64 whole block", "output")


@torch.no_grad()
def test_a_layer_of_monais() -> None:
    theirs = packages.build("monai").eval()
    ours, x = fuse(copy.deepcopy(theirs)), packages.images("monai").double()
    for model in (theirs, ours):
        to_the_end(model.features.denseblock1.denselayer1.layers, "relu1")
    with pytest.warns(FallbackWarning, match="calls norm1, conv1, norm2, relu2, conv2, relu1 in this order"):
        out = ours(x)
    assert_largest(out, theirs(x), "float64 whole block", "output")


@torch.no_grad()
def test_a_layer_of_an_unknown_class() -> None:
    theirs = rebuilt_networks.built("KernelBench 14").eval()
    ours, x = fuse(copy.deepcopy(theirs)), torch.randn(2, 3, 20, 20, dtype=torch.float64)
    with strict():
        before = ours(x)
    for model in (theirs, ours):
        layer = next(
            part for part in model.modules() if isinstance(part, rebuilt_networks.ListedBlock | FusedDenseBlock)
        )
        to_the_end(layer.layers[1], "1")
    with pytest.warns(FallbackWarning, match="has its modules in another order"):
        out = ours(x)
    assert_largest(out, theirs(x), "float64 whole block", "output")
    assert not torch.allclose(out, before)
