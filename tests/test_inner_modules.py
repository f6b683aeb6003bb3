"""Hooks, parametrizations and replaced modules inside a fused block: correct, said once, and fast again without them."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import step
from networks import assert_same_step, images, torchvisions
from tolerances import assert_largest
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fused_densenet import FallbackError, FallbackWarning, fuse, strict

CONV = "features.denseblock2.denselayer1.conv2"


class LowRank(nn.Module):
    """A convolution and a trained 1x1 detour of low rank beside it, as LoRA adds it."""

    def __init__(self, conv: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, rank, 1, bias=False, dtype=conv.weight.dtype)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False, dtype=conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + self.up(self.down(x))
        return out


def adapter(network: nn.Module) -> None:
    owner, _, name = CONV.rpartition(".")
    setattr(network.get_submodule(owner), name, LowRank(network.get_submodule(CONV), 2))  # type: ignore[arg-type]


def pruned(network: nn.Module) -> None:
    prune.l1_unstructured(network.get_submodule(CONV), "weight", amount=0.5)


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weight norm": (lambda network: parametrizations.weight_norm(network.get_submodule(CONV)), "ParametrizedConv2d"),
    "spectral norm": (
        lambda network: parametrizations.spectral_norm(network.get_submodule(CONV)),
        "ParametrizedConv2d",
    ),
    "pruning": (pruned, "conv2 has hooks"),
    "adapter": (adapter, "conv2 is a LowRank"),
}


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_convolution(name: str, fused_first: bool) -> None:
    change, reason = CHANGES[name]
    theirs = torchvisions()
    ours = copy.deepcopy(theirs)
    if fused_first:
        fuse(ours)
    for network in (theirs, ours):
        torch.manual_seed(2)
        change(network)
    x = images(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not fused_first:
            fuse(ours)
        actual = step(ours, x, steps=2)
    assert_same_step(actual, step(theirs, x, steps=2))
    messages = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert len(messages) == 1 and reason in messages[0]
    if fused_first or name == "pruning":  # a pruned convolution is a convolution, with hooks
        with strict(), pytest.raises(FallbackError, match=reason):
            ours(x)


@pytest.mark.parametrize("name", ["weight norm", "pruning"])
def test_removed_change(name: str) -> None:
    network = fuse(torchvisions())
    CHANGES[name][0](network)
    x = images(2)
    with pytest.warns(FallbackWarning):
        expected = network.eval()(x)
    conv = network.get_submodule(CONV)
    if name == "pruning":
        prune.remove(conv, "weight")
    else:
        parametrize.remove_parametrizations(conv, "weight")
    with strict():
        assert_largest(network(x), expected, "float64 whole block", "output")


def grad_cam(network: nn.Module, x: Tensor, layer: str) -> Tensor:
    """Gradient-weighted class activation map of the best class (arXiv 1610.02391, equations 1 and 2)."""
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept["activation"] = output
        output.register_hook(lambda grad: kept.update(gradient=grad))

    handle = network.get_submodule(layer).register_forward_hook(keep)
    network(x).max(dim=1).values.sum().backward()
    handle.remove()
    weights = kept["gradient"].mean((2, 3), keepdim=True)
    return (weights * kept["activation"]).sum(1).relu()


@pytest.mark.parametrize("layer", [CONV, "features.denseblock2.denselayer2.norm1", "features.denseblock2"])
def test_grad_cam(layer: str) -> None:
    """On a module inside a block operator by operator; on a block, fused."""
    theirs = torchvisions().eval()
    for module in theirs.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # torchvision's own would overwrite what a hook on a norm kept
    ours = fuse(copy.deepcopy(theirs))
    x = images(2)
    expected = grad_cam(theirs, x, layer)
    assert expected.max() > 0
    if layer.endswith("denseblock2"):
        with strict():
            actual = grad_cam(ours, x, layer)
    else:
        with pytest.warns(FallbackWarning, match="has hooks"):
            actual = grad_cam(ours, x, layer)
    assert_largest(actual, expected, "float64 whole block", layer)
    with strict():
        ours(x)
