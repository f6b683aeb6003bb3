"""Blocks of unknown classes whose code depends on more than tensors: what is changed after ``fuse`` is computed."""

import copy
import enum
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_largest
from torch import Tensor, nn

from fused_densenet import FallbackWarning, FusedDenseBlock, fuse, strict


class Mood(enum.Enum):
    CALM = 1
    WILD = 2


class Conv(nn.Conv2d):
    """A convolution with a switch, and a mask that is there or not."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.doubled = False
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2 if self.doubled else self.weight
        return self._conv_forward(x, weight if self.mask is None else weight * self.mask, None)


class Norm(nn.BatchNorm2d):
    frozen = False

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class Layer(nn.Module):
    scale = 1.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.relu, self.conv = Norm(width), nn.ReLU(), Conv(width, 4, 3, padding=1, bias=False)
        self.act: Callable[[Tensor], Tensor] = F.relu
        self.config, self.options = types.SimpleNamespace(rate=0.0), {"gain": 1}
        self.mood, self.mask, self.gain = Mood.CALM, None, 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(self.act(self.norm(x)))
        if self.scale != 1:
            out = out * self.scale
        if self.config.rate:
            out = out * (1 - self.config.rate)
        if self.options["gain"] != 1:
            out = out * self.options["gain"]
        if self.mood is Mood.WILD:
            out = -out
        if self.mask is not None:
            out = out * torch.as_tensor(self.mask)
        if hasattr(self, "extra"):
            out = out + self.extra
        return torch.cat([x, out], 1)


class InTurn(nn.Module):
    """Calls its children in the order in which they stand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.relu, self.conv = (
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for child in self.children():
            out = child(out)
        return torch.cat([x, out], 1)


def block(layer: Callable[[int], nn.Module] = Layer) -> Any:
    torch.manual_seed(0)
    found = nn.Sequential(*(layer(8 + 4 * i) for i in range(3))).double()
    for norm in found.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    return found


def images() -> Tensor:
    return torch.randn(2, 8, 9, 8, dtype=torch.float64)


def assert_alike(ours: Any, theirs: Any) -> None:
    x = images()
    for training in (True, False):
        out, expected = ours.train(training)(x), theirs.train(training)(x)
        assert_largest(out, expected, "float64 whole block", "output")
        out.square().sum().backward()
        expected.square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert_largest(a.grad, b.grad, "float64 whole block", name)
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert_largest(a.double(), b.double(), "float64 whole block", name)


def of_the_class(layer: Any) -> None:
    type(layer).scale = 0.5


def to_the_end(layer: Any) -> None:
    relu = layer.relu
    del layer.relu
    layer.relu = relu


CHANGES: dict[str, Callable[[Any], object]] = {
    "a switch of a convolution": lambda layer: setattr(layer.conv, "doubled", True),
    "a convolution's mask": lambda layer: setattr(layer.conv, "mask", torch.rand_like(layer.conv.weight)),
    "a frozen norm": lambda layer: setattr(layer.norm, "frozen", True),
    "another function": lambda layer: setattr(layer, "act", F.silu),
    "an attribute of the class": of_the_class,
    "an attribute that hides the class's": lambda layer: setattr(layer, "scale", 0.5),
    "a configuration": lambda layer: setattr(layer.config, "rate", 0.5),
    "a dict": lambda layer: layer.options.update(gain=2),
    "a dict that is another": lambda layer: setattr(layer, "options", {"gain": 2}),
    "a member of an enumeration": lambda layer: setattr(layer, "mood", Mood.WILD),
    "numbers": lambda layer: setattr(layer, "mask", torch.rand(8, dtype=torch.float64).numpy()),
    "a parameter": lambda layer: setattr(layer, "extra", nn.Parameter(torch.ones(1, dtype=torch.float64))),
}


@pytest.mark.parametrize("called_before", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_after_fuse(name: str, called_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "scale", 1.0)
    theirs = block()
    ours = fuse(copy.deepcopy(theirs))
    assert isinstance(ours, FusedDenseBlock)
    if called_before:
        with strict():
            ours(images())
        ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        torch.manual_seed(1)
        CHANGES[name](model[1])
    with pytest.warns(FallbackWarning):
        ours(images())
    for model in (ours, theirs):
        model.load_state_dict(block().state_dict(), strict=False)
    assert_alike(ours, theirs)


def test_children_in_another_order() -> None:
    theirs = block(InTurn)
    ours = fuse(copy.deepcopy(theirs))
    assert isinstance(ours, FusedDenseBlock)
    for model in (ours, theirs):
        to_the_end(model[1])
    with pytest.warns(FallbackWarning, match="other order"):
        assert_alike(ours, theirs)


def test_unchanged_copies_stay_fused() -> None:
    ours = fuse(block())
    with strict():
        copy.deepcopy(ours)(images())


@pytest.mark.filterwarnings("ignore:not every dense block")
def test_one_of_two_alike_is_frozen() -> None:
    """What one was seen to compute says nothing about the other."""
    theirs = nn.ModuleDict({"teacher": block(), "student": block()})
    for norm in theirs["student"].modules():
        if isinstance(norm, Norm):
            norm.frozen = True
    ours = fuse(copy.deepcopy(theirs))
    assert isinstance(ours["teacher"], FusedDenseBlock)
    for name in theirs:
        assert_alike(ours[name], theirs[name])


class Asking(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.conv.weight.requires_grad else x.detach())


class Casting(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("kind", [Asking, Casting])
@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_what_no_trial_tells_apart_is_left_alone(kind: type[Layer]) -> None:
    """A frozen weight that is asked for, as all weights of a trial are not; autocast, which float64 does not show."""
    model = block(kind)
    model.requires_grad_(False)
    assert type(fuse(model)) is nn.Sequential


class Scaled(nn.Sequential):
    def forward(self, input: Any, gain: Any = 1.0) -> Tensor:
        x = torch.cat(input, 1) if isinstance(input, list) else input
        out: Tensor = super().forward(x)
        return out if isinstance(gain, float) and gain == 1 else out * gain


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_other_arguments() -> None:
    """A list; a gain that equals the default and has a gradient; one that compares to no truth value."""
    theirs = Scaled(*block())
    ours, x = fuse(copy.deepcopy(theirs)), images()
    assert isinstance(ours, FusedDenseBlock)
    pieces = list(x.split(4, 1))
    assert_largest(ours(pieces), theirs(pieces), "float64 whole block", "output")
    for gain in (torch.ones(1, dtype=torch.float64, requires_grad=True), torch.rand(20, 1, 1, dtype=torch.float64)):
        out, expected = ours(x, gain), theirs(x, gain)
        assert_largest(out, expected, "float64 whole block", "output")
        if gain.requires_grad:
            [found], [wanted] = (torch.autograd.grad(y.sum(), gain) for y in (out, expected))
            assert_largest(found, wanted, "float64 whole block", "gradient")


class Named(nn.Sequential):
    def parts(self) -> str:
        return "of its own"


@pytest.mark.parametrize("name", ["parts", "items", "memory_efficient", "original_class"])
@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_children_called_as_what_the_fused_class_has(name: str) -> None:
    class OfOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, block())

        def forward(self, x: Tensor) -> Tensor:
            for layer in self._modules[name]:  # type: ignore[union-attr]
                x = layer(x)
            return x

    model: Any = fuse(OfOne())
    assert type(model) is OfOne and len(getattr(model, name)) == 3


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_names_that_the_fused_class_has_too() -> None:
    model = fuse(Named(*block()))
    assert type(model) is Named and model.parts() == "of its own"


class Nested(nn.Module):
    """A layer whose lists are called as torchvision's first checkpoints call a layer's modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(8)])
        self.conv = nn.ModuleList([nn.Conv2d(width, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for norm, conv in zip(self.norm, self.conv, strict=True):
            out = conv(norm(out).relu())
        return torch.cat([x, out], 1)


def test_keys_that_look_like_earlier_ones() -> None:
    found = nn.Sequential()
    for i in range(2):
        found.add_module(f"denselayer{i + 1}", Nested(8 + 4 * i))
    model = fuse(found)
    assert isinstance(model, FusedDenseBlock)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
