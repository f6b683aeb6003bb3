"""One computation, written in the ways that torch has for it, is recognised in each of them."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from networks import assert_same_step
from small_networks import results
from torch import Tensor, nn

from fused_densenet import FallbackWarning, FusedDenseBlock, FusedResidualDenseBlock, explain, fuse, strict

WIDTH, GROWTH = 7, 5
Join = Callable[[Sequence[Tensor]], Tensor]


def layer(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, GROWTH, 3, padding=1, bias=False))


class Block(nn.Module):
    """``join`` concatenates, ``result`` takes what is returned."""

    def __init__(self, join: Join = torch.hstack, result: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.steps = nn.ModuleList(layer(WIDTH + GROWTH * i) for i in range(3))
        self.__dict__["join"], self.__dict__["result"] = join, result

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = self.join([x, step(x)])
        return self.result(x) if self.result else x


JOINS: dict[str, Join] = {
    "hstack": torch.hstack,
    "keywords": lambda parts: torch.cat(tensors=list(parts), dim=1),
    "axis": lambda parts: torch.concatenate(list(parts), axis=-3),
}
RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x[:, :],
    "new": lambda x: x[:, WIDTH:],
    "new of all sizes": lambda x: x[:, WIDTH:, :, :],
    "new by size": lambda x: x[:, x.size(1) - 3 * GROWTH :, ...],
}


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("result", [None, *RESULTS])
def test_block(join: str, result: str | None) -> None:
    if result is not None and join != "hstack":
        join = "keywords"
    theirs = Block(JOINS[join], RESULTS[result] if result else None).double()
    ours = fuse(copy.deepcopy(theirs), strict=True)
    assert isinstance(ours, FusedDenseBlock)
    x = torch.randn(2, WIDTH, 6, 11, dtype=torch.float64)
    for training in (True, False):
        with strict():
            assert_same_step(results(ours.train(training), x), results(theirs.train(training), x))


@pytest.mark.parametrize(
    "result",
    [
        lambda x: x[:, 1:],
        lambda x: x[:, WIDTH + 1 :],
        lambda x: x[:, WIDTH:-1],
        lambda x: x[:, ::2],
        lambda x: x[1:, WIDTH:],
        lambda x: x[:, WIDTH:, 1:],
        lambda x: x[..., WIDTH:],
    ],
)
def test_other_slices(result: Callable[[Tensor], Tensor]) -> None:
    """Of another dimension, or of half a layer's features."""
    model = nn.Sequential(nn.Identity(), Block(result=result))
    with pytest.warns(FallbackWarning, match="1: its forward calls __getitem__"):
        fuse(model)
    (report,) = explain(model).blocks
    assert not report.fused and report.reasons == ["its forward calls __getitem__"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding(mode: str) -> None:
    model = Block()
    model.steps[1][2] = nn.Conv2d(WIDTH + GROWTH, GROWTH, 3, padding=1, padding_mode=mode, bias=False)
    with pytest.warns(FallbackWarning, match="calls pad"):
        fuse(nn.Sequential(model, nn.Identity()))


def test_rates_that_differ() -> None:
    model = Block()
    for step, rate in zip(model.steps, (0.1, 0.1, 0.2), strict=True):
        step.append(nn.Dropout(rate))
    with pytest.warns(FallbackWarning, match="can be fused: 0: layer 3 differs from layer 1 in its dropout"):
        fuse(nn.Sequential(model, nn.Identity()).eval())


def in_place(new: Tensor, x: Tensor) -> Tensor:
    new *= 0.3
    new += x
    return new


class Residual(nn.Module):
    """A dense block without norms that adds its input in the end."""

    def __init__(self, end: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(WIDTH, 3, 3, padding=1), nn.Conv2d(WIDTH + 3, 4, 3, padding=1)
        self.last = nn.Conv2d(WIDTH + 7, WIDTH, 1)
        self.__dict__["end"] = end

    def forward(self, x: Tensor) -> Tensor:
        a = nn.functional.leaky_relu(self.first(x), 0.1)
        b = nn.functional.leaky_relu_(self.second(torch.cat([x, a], 1)), 0.2)
        return self.end(self.last(torch.cat([x, a, b], 1)), x)


@pytest.mark.parametrize(
    "end",
    [in_place, lambda new, x: new.mul_(0.3).add_(x), lambda new, x: torch.add(x, torch.mul(new, 0.3)), torch.add],
)
def test_end_of_a_block_without_norms(end: Callable[[Tensor, Tensor], Tensor]) -> None:
    theirs = Residual(end).double()
    ours = fuse(copy.deepcopy(theirs), strict=True)
    assert isinstance(ours, FusedResidualDenseBlock)
    x = torch.randn(2, WIDTH, 6, 11, dtype=torch.float64)
    with strict():
        assert_same_step(results(ours, x), results(theirs, x))
