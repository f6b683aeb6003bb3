"""A fused block or transition that was an ``nn.Sequential`` is still one, and takes the arguments that it took."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from tolerances import assert_largest
from torch import Tensor, nn

from fused_densenet import FallbackError, FallbackWarning, FusedDenseBlock, FusedTransition, explain, fuse, strict


class _Layer(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv1 = nn.Conv2d(channels, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


class _Block(nn.Sequential):
    pass


def _block() -> Any:
    torch.manual_seed(0)
    block = _Block()
    for i in range(3):
        block.add_module(f"denselayer{i + 1}", _Layer(6 + 4 * i))
    return block.double()


def _appended(block: nn.Sequential) -> nn.Module:
    torch.manual_seed(1)
    return block.append(_Layer(18).double()).append(nn.Conv2d(22, 3, 1).double())


def _without_the_last(block: Any) -> nn.Module:
    del block[-1]
    return block


USES: dict[str, Callable[[Any], nn.Module]] = {
    "slice": lambda block: block[:2],
    "slice from the end": lambda block: block[-1:],
    "layer": lambda block: nn.Sequential(block[0], block.denselayer2),
    "appended": _appended,
    "deleted": _without_the_last,
    "popped": lambda block: nn.Sequential(block.pop(0)),
    "added": lambda block: block + nn.Sequential(nn.ReLU()),
    "added at the left": lambda block: nn.Sequential(nn.ReLU()) + block,
    "iterated": lambda block: nn.Sequential(*block),
    "named": lambda block: nn.Sequential(*(layer for _, layer in block.named_children())),
    "copied": copy.copy,
    "extended": lambda block: block.extend([nn.ReLU(), nn.ReLU()]),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_block_as_a_sequence(name: str) -> None:
    theirs, ours = _block(), fuse(_block(), strict=True)
    assert isinstance(ours, FusedDenseBlock) and len(ours) == len(theirs)
    width = 14 if name == "slice from the end" else 6
    x = torch.randn(2, width, 5, 6, dtype=torch.float64)
    expected, actual = USES[name](theirs), USES[name](ours)
    assert_largest(actual(x), expected(x), "float64 whole block", name)
    assert list(actual.state_dict()) == list(expected.state_dict())


TRANSITION_USES: dict[str, Callable[[Any], nn.Module]] = {
    "slice": lambda transition: transition[:3],
    "norm": lambda transition: transition[0],
    "appended": lambda transition: transition.append(nn.ReLU()),
    "added": lambda transition: transition + nn.Sequential(nn.ReLU()),
    "iterated": lambda transition: nn.Sequential(*list(transition)[::-1][::-1]),
    "deleted": _without_the_last,
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", TRANSITION_USES)
@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_transition_as_a_sequence(name: str, plain: bool) -> None:
    theirs: Any = peers.Transition(6, 4).double()
    if plain:
        theirs = nn.Sequential(OrderedDict(theirs.named_children()))
    elif name == "slice":
        return  # its class takes numbers, not modules
    ours = fuse(copy.deepcopy(theirs))
    assert isinstance(ours, FusedTransition)
    x = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    assert_largest(TRANSITION_USES[name](ours)(x), TRANSITION_USES[name](theirs)(x), "float64 whole block", name)


class _WithArguments(peers.DenseBlock):
    def forward(self, features: Tensor, scale: float = 1.0, *, return_all: bool = False) -> Any:
        out = super().forward(features)
        if scale != 1.0:
            out = out * scale
        return (out, features) if return_all else out


def test_arguments_of_its_own_forward() -> None:
    theirs = _WithArguments(2, 6, 2, 4, 0.0).double().eval()
    ours = fuse(copy.deepcopy(theirs), strict=True)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = theirs(x)
    with strict():
        assert_largest(ours(features=x), expected, "float64 whole block", "by keyword")
        assert_largest(ours(x, 1.0, return_all=False), expected, "float64 whole block", "defaults")
        with pytest.raises(FallbackError, match="called with other arguments than a tensor"):
            ours(x, 2.0)
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            ours(x, scales=2.0)
    with pytest.warns(FallbackWarning, match="called with other arguments than a tensor"):
        assert_largest(ours(x, 2.0), 2 * expected, "float64 whole block", "scale")
    out, features = ours(x, return_all=True)
    assert features is x and torch.equal(out, ours(x, scale=1.0, return_all=True)[0])


def test_explain_by_keyword() -> None:
    block = fuse(_WithArguments(2, 6, 2, 4, 0.0))
    (report,) = explain(block, features=torch.randn(2, 6, 5, 5)).blocks
    assert report.fused and report.backend == "cpu"
    (report,) = explain(block, torch.randn(2, 6, 5, 5), scale=2.0).blocks
    assert report.reasons == ["it was called with other arguments than a tensor"]
