"""Changes between two calls of a network: the second one is of the network as it is then."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import step
from networks import assert_same_step, torchvisions
from torch import nn

from fused_densenet import fuse, strict


def norms_eps(features: Any) -> None:
    features.norm0.eps = features.transition1.norm.eps = 0.1
    features.denseblock1.denselayer2.norm1.eps = features.denseblock2.denselayer1.norm2.eps = 0.3


def momentum(features: Any) -> None:
    features.norm0.momentum = features.transition1.norm.momentum = 0.5
    features.denseblock1.denselayer1.norm2.momentum = None


def some_norms_evaluate(features: Any) -> None:
    features.norm0.eval()
    features.transition1.norm.eval()
    features.denseblock2.denselayer2.norm1.eval()


def untracked(features: Any) -> None:
    features.denseblock2.denselayer2.norm1.track_running_stats = False


def dilated_convolution(features: Any) -> None:
    conv = features.denseblock2.denselayer1.conv2
    conv.dilation, conv.padding = (2, 2), (2, 2)


def padding_mode(features: Any) -> None:
    conv = features.denseblock1.denselayer1.conv2
    conv.padding_mode, conv._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


def dilated_pooling(features: Any) -> None:
    features.pool0.dilation, features.pool0.padding = 2, 1


def pooling_without_overlap(features: Any) -> None:
    features.pool0.kernel_size, features.pool0.padding = 2, 0


def other_divisor(features: Any) -> None:
    features.transition1.pool.divisor_override = 3


def norm_without_weight(features: Any) -> None:
    features.denseblock1.denselayer2.norm2.weight = None


def exchanged_layers(features: Any) -> None:
    block = features.denseblock1
    block._modules["denselayer1"].conv2, block._modules["denselayer2"].conv2 = (
        block._modules["denselayer2"].conv2,
        block._modules["denselayer1"].conv2,
    )


def exchanged_norms(features: Any) -> None:
    for name in ("norm0", "relu0"):
        setattr(features, name, copy.deepcopy(getattr(features, name)))
    nn.init.constant_(features.norm0.weight, 0.3)


def frozen_parameters(features: Any) -> None:
    features.denseblock1.denselayer1.requires_grad_(False)


CHANGES: list[tuple[Callable[[Any], None], bool]] = [
    *((change, True) for change in (norms_eps, momentum, some_norms_evaluate, untracked, norm_without_weight)),
    *((change, True) for change in (exchanged_layers, exchanged_norms, frozen_parameters)),
    *((change, True) for change in (dilated_pooling, pooling_without_overlap)),
    *((change, False) for change in (dilated_convolution, padding_mode, other_divisor)),
]


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@pytest.mark.parametrize(("change", "stays_fused"), CHANGES)
def test_changed_after_a_call(change: Callable[[Any], None], stays_fused: bool) -> None:
    theirs = torchvisions()
    ours, x = fuse(copy.deepcopy(theirs)), torch.randn(3, 3, 48, 48, dtype=torch.float64)
    for network in (ours, theirs):
        step(network, x)
        change(network.features)
    with strict(stays_fused):
        found = step(ours, x)
    assert_same_step(found, step(theirs, x))
    with strict(stays_fused):  # and once more, of what has been worked out now
        found = step(ours, x)
    assert_same_step(found, step(theirs, x))
