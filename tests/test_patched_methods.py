"""A method that was assigned to a module or to its class runs: torch's own, a package's, before ``fuse`` and after it."""

import copy
from collections.abc import Callable
from typing import Any

import peers
import pytest
import rebuilt_networks
import torch
from small_networks import network
from torch import Tensor, nn

from fused_densenet import FallbackWarning, FusedDenseBlock, fuse, strict


def _halved(method: Any) -> Callable[..., Tensor]:
    return lambda *args: method(*args) / 2


def _conv_of_an_instance(model: Any, _: pytest.MonkeyPatch) -> None:
    conv = model.features.denseblock1.denselayer2.conv1
    conv._conv_forward = _halved(conv._conv_forward)


def _dimensions_of_a_transitions_norm(model: Any, _: pytest.MonkeyPatch) -> None:
    model.features.transition1.norm._check_input_dim = lambda x: x.mul_(0.5)


def _helper_of_an_instance(model: Any, _: pytest.MonkeyPatch) -> None:
    layer = model.features.denseblock1.denselayer2
    layer.bn_function = _halved(layer.bn_function)


def _class(owner: Any, name: str = "forward") -> Callable[[Any, pytest.MonkeyPatch], None]:
    def patch(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(owner, name, _halved(getattr(owner, name)))

    return patch


PATCHES: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], None], str]] = {
    "_conv_forward of an instance": (_conv_of_an_instance, "denselayer2.conv1 has a forward of its own"),
    "_check_input_dim of an instance": (_dimensions_of_a_transitions_norm, "norm has a forward of its own"),
    "bn_function of an instance": (_helper_of_an_instance, "denselayer2 has a forward of its own"),
    "bn_function": (_class(peers.DenseLayer, "bn_function"), "the forward of _DenseLayer was replaced"),
    "ReLU": (_class(nn.ReLU), "the forward of ReLU was replaced"),
    "BatchNorm2d": (_class(nn.BatchNorm2d), "the forward of BatchNorm2d was replaced"),
    "Conv2d._conv_forward": (_class(nn.Conv2d, "_conv_forward"), "the forward of Conv2d was replaced"),
    "AvgPool2d": (_class(nn.AvgPool2d), "the forward of AvgPool2d was replaced"),
    "layer": (_class(peers.DenseLayer), "the forward of _DenseLayer was replaced"),
    "block": (_class(peers.DenseBlock), "the forward of _DenseBlock was replaced"),
    "transition": (_class(peers.Transition), "the forward of _Transition was replaced"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patched_after_fuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = PATCHES[name]
    theirs = network().eval()
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = theirs(x)
    change(theirs, monkeypatch)
    change(ours, monkeypatch)
    with pytest.warns(FallbackWarning, match=reason):
        actual = ours(x)
    torch.testing.assert_close(actual, theirs(x))
    assert not torch.allclose(actual, before)
    monkeypatch.undo()
    for module in ours.modules():
        for method in ("_conv_forward", "_check_input_dim", "bn_function"):
            module.__dict__.pop(method, None)
    with strict():
        torch.testing.assert_close(ours(x), before)


def test_blocks_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = FusedDenseBlock(2, 8, 2, 4), torch.randn(2, 8, 4, 4)
    monkeypatch.setattr(nn.ReLU, "forward", lambda relu, x: x)
    with pytest.warns(FallbackWarning, match="the forward of ReLU was replaced"):
        block(x)


def test_patched_before_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.ReLU, "forward", lambda relu, x: x.abs())
    theirs = network().eval()
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match="the forward of ReLU was replaced"):
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("of_class", [True, False])
def test_a_helper_of_an_unknown_class(of_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``bottleneck`` is what the ``forward`` of mmpretrain's layers calls."""
    theirs = rebuilt_networks.built("mmpretrain").eval()
    ours, x = fuse(copy.deepcopy(theirs)), torch.randn(2, 3, 20, 20, dtype=torch.float64)
    with strict():
        before = ours(x)
    for model in (theirs, ours):
        layer: Any = next(part for part in model.modules() if isinstance(part, rebuilt_networks.ListTaking))
        if not of_class:
            layer.bottleneck = _halved(layer.bottleneck)
    if of_class:
        monkeypatch.setattr(rebuilt_networks.ListTaking, "bottleneck", _halved(rebuilt_networks.ListTaking.bottleneck))
    with pytest.warns(FallbackWarning):
        actual = ours(x)
    torch.testing.assert_close(actual, theirs(x))
    assert not torch.allclose(actual, before)
