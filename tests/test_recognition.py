"""What ``fuse`` takes for a dense block or a transition: what computes the same, and nothing that only looks like it."""

import copy
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from networks import assert_same_step
from small_networks import SIZE, blocks, network, results
from torch import Tensor, nn

from fused_densenet import (
    FallbackError,
    FallbackWarning,
    FusedDenseBlock,
    FusedTransition,
    explain,
    fuse,
    strict,
    unfuse,
)


class _Subclass(peers.DenseBlock):
    pass


class _Doubled(peers.DenseBlock):
    def forward(self, init_features: Tensor) -> Tensor:
        return 2 * super().forward(init_features)


class _DoubledInTraining(peers.DenseBlock):
    def forward(self, init_features: Tensor) -> Tensor:
        return (2 if self.training else 1) * super().forward(init_features)


class _OnlyNew(peers.DenseBlock):
    def forward(self, init_features: Tensor) -> Tensor:
        return super().forward(init_features)[:, init_features.shape[1] :]


class _Failing(peers.DenseBlock):
    def forward(self, init_features: Tensor) -> Tensor:
        raise OSError("no such file")


class _SequentialLayer(nn.Sequential):
    """A layer as many copies of DenseNet have it: the result is concatenated to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm1d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv1d(channels, 6, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm1d(6), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv1d(6, 3, 3, padding=1, bias=False)
        self.drop_rate = 0.25

    def forward(self, x: Tensor) -> Tensor:
        new = nn.functional.dropout(super().forward(x), self.drop_rate, self.training)
        return torch.cat([x, new], 1)


class _SequentialBlock(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            self.add_module(f"denselayer{i + 1}", _SequentialLayer(5 + 3 * i))


@pytest.mark.parametrize("make", [lambda: _Subclass(*SIZE), _SequentialBlock])
def test_unknown_class_that_computes_the_same(make: Callable[[], nn.Module]) -> None:
    theirs = make().double()
    ours = copy.deepcopy(theirs)
    state = torch.get_rng_state()
    fuse(ours, strict=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(ours, FusedDenseBlock) and len(ours) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    x = (
        torch.randn(2, 5, 9, dtype=torch.float64)
        if isinstance(ours, nn.Sequential)
        else torch.randn(2, 8, 4, 4).double()
    )
    with strict():
        assert_same_step(results(ours, x), results(theirs, x))


def _parameter_of_its_own(block: nn.Module) -> None:
    block.scale = nn.Parameter(torch.ones(()))


def _forward_of_its_own(block: nn.Module) -> None:
    block.forward = block.forward


def _extra_module(block: nn.Module) -> None:
    block.get_submodule("denselayer2").attention = nn.Identity()


def _other_width(block: nn.Module) -> None:
    layer = block.get_submodule("denselayer2")
    layer.norm1, layer.conv1 = nn.BatchNorm2d(11), nn.Conv2d(11, 8, 1, bias=False)


def _activation(block: nn.Module) -> None:
    for layer in block.children():
        layer.relu2 = nn.SiLU()


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "doubled": (lambda: _Doubled(*SIZE), "its forward calls mul"),
    "doubled in training": (lambda: _DoubledInTraining(*SIZE), "its forward calls mul"),
    "only new features": (lambda: _OnlyNew(*SIZE), "its forward looks at the shape of a tensor"),
    "failing": (lambda: _Failing(*SIZE), "could not be tried: OSError: no such file"),
    "parameter": (lambda: _changed(_parameter_of_its_own), "parameters or buffers of its own"),
    "forward": (lambda: _changed(_forward_of_its_own), "its forward was replaced"),
    "extra module": (lambda: _changed(_extra_module), r"denselayer2\.attention is no part"),
    "width": (lambda: _changed(_other_width), "denselayer2 reads 11 channels where there are 12"),
    "activation": (lambda: _changed(_activation), r"denselayer1\.relu2 is a SiLU"),
    "name only": (lambda: type("ResidualDenseBlock", (nn.Sequential,), {})(nn.ReLU()), "it has no batch normalisation"),
}


def _changed(change: Callable[[nn.Module], None]) -> nn.Module:
    block = peers.DenseBlock(*SIZE)
    change(block)
    return block


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_fused(name: str) -> None:
    make, reason = OTHERS[name]
    model = nn.ModuleDict({"good": peers.DenseBlock(*SIZE), "odd": make()})
    kind = type(model["odd"])
    with pytest.raises(FallbackError, match=f"odd: .*{reason}"):
        fuse(model, strict=True)
    assert not blocks(model)
    with pytest.warns(FallbackWarning, match=f"^not every dense block can be fused: odd: .*{reason}") as warned:
        fuse(fuse(model))
    assert len(warned) == 1  # once
    assert warned[0].filename == __file__
    assert isinstance(model["good"], FusedDenseBlock) and type(model["odd"]) is kind


class _Transition(nn.Sequential):
    """A transition as another package might write it."""

    def __init__(self, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm3d(6), nn.ReLU(inplace=True)
        self.conv = nn.Conv3d(6, 5, 1, bias=False)
        self.pool = pool or nn.AvgPool3d(2)


class _ScaledTransition(_Transition):
    def forward(self, input: Tensor) -> Tensor:
        return 1 * super().forward(input)


def test_transition_of_an_unknown_class() -> None:
    theirs = _Transition().double()
    ours = fuse(copy.deepcopy(theirs))
    assert isinstance(ours, FusedTransition) and isinstance(ours[1], nn.ReLU)
    x = torch.randn(2, 6, 4, 5, 7, dtype=torch.float64)
    with strict():
        assert_same_step(results(ours, x), results(theirs, x))
    copied = fuse(copy.deepcopy(ours))
    assert isinstance(copied, FusedTransition) and type(unfuse(copied)) is _Transition


@pytest.mark.parametrize(
    ("transition", "reason"),
    [
        (_ScaledTransition(), "its forward calls mul"),
        (_Transition(nn.MaxPool3d(2)), "pool is a MaxPool3d"),
        (_Transition(nn.AvgPool3d(3)), "pool is no average pooling of window and stride 2: AvgPool3d"),
    ],
)
def test_transition_that_cannot_be_fused(transition: nn.Module, reason: str) -> None:
    model = nn.ModuleList([transition])
    fuse(model)
    assert isinstance(model[0], _Transition) and not isinstance(model[0], FusedTransition)
    (report,) = explain(model).transitions
    assert (report.name, report.fused) == ("0", False) and report.reasons[0].startswith(reason)


@pytest.mark.filterwarnings("ignore:not every dense block:fused_densenet.FallbackWarning")
@pytest.mark.parametrize("patched", [peers.DenseBlock, peers.DenseLayer, peers.Transition])
def test_class_that_was_patched(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known class may not do what its package gave it to do."""
    whole = patched.forward
    monkeypatch.setattr(patched, "forward", lambda module, x: 2 * whole(module, x))
    explanation = explain(fuse(network()))
    for kind, reports in (("Block", explanation.blocks), ("Transition", explanation.transitions)):
        expected = kind in patched.__name__ or (kind, patched) == ("Block", peers.DenseLayer)
        assert all(("calls mul" in " ".join(r.reasons)) == expected for r in reports)
        assert all(report.fused != expected for report in reports)


@pytest.mark.filterwarnings("ignore:not every dense block:fused_densenet.FallbackWarning")
def test_scripted_network() -> None:
    model = torch.jit.script(network().float().eval())
    with pytest.raises(FallbackError, match=r"denseblock2: it is scripted; fuse the network before"):
        fuse(model, strict=True)
    assert {r.reasons[0] for r in explain(fuse(model)).transitions} == {
        "it is scripted; fuse the network before torch.jit.script"
    }


def test_network_without_dense_blocks(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with caplog.at_level("INFO", "fused_densenet"):
        assert fuse(model) is model
    assert caplog.messages == ["fuse(Sequential): no dense block was found"]
    with pytest.raises(FallbackError, match="no dense block was found in Sequential"):
        fuse(model, strict=True)


def test_what_fuse_did_is_logged_and_not_printed(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleList([peers.DenseBlock(*SIZE), _Transition(), _ScaledTransition()])
    with caplog.at_level("INFO", "fused_densenet"):
        fuse(model)
    assert [(r.name, r.levelname) for r in caplog.records] == [("fused_densenet", "INFO")] * 2
    assert caplog.messages == [
        "fuse(ModuleList): 1 FusedDenseBlock, 1 FusedTransition, 0 FusedFeatures",
        "fuse(ModuleList): not fused: 2: its forward calls mul",
    ]
    caplog.clear()
    fuse(model)  # as logging is set up by default
    assert (*capfd.readouterr(), caplog.messages) == ("", "", [])


def test_around_a_block_is_no_block() -> None:
    kind = type("DenseBlockWithTransition", (nn.Sequential,), {})
    model = kind(peers.DenseBlock(*SIZE), peers.Transition(20, 10))
    assert isinstance(fuse(model, strict=True)[0], FusedDenseBlock)
