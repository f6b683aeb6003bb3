"""What of somebody else's code becomes part of a snapshot's programs, and what stays as it is and is named."""

import copy
import functools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import torchvisions
from snapshots import HEADS, Heads, assert_served, leaves, randomised, segments
from tolerances import assert_largest
from torch import Tensor, nn

import fused_densenet
from fused_densenet import (
    FallbackError,
    FusedDenseBlock,
    FusedTransition,
    explain,
    fuse,
    optimize_for_inference,
)
from fused_densenet.adopt import drafts
from fused_densenet.nn.serving import Segment
from fused_densenet.ops import network


def test_hooks_are_called() -> None:
    """Of a module that is no part of a program, of one that would be, of a sequence and of one inside a block."""
    seen: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    model: Any = torchvisions()
    names = ["features.norm5", "features.transition1", "features", "features.denseblock2.denselayer1.conv1"]
    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    served, x = optimize_for_inference(model), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert not seen
    with pytest.warns(fused_densenet.FallbackWarning, match="has hooks"):
        found = served(x)
    assert sorted(seen) == sorted(names)
    assert_largest(found, model.eval()(x), "float64 whole block", "output")
    report = explain(served)
    assert [block.fused for block in report.blocks] == [True, False]
    assert report.blocks[1].reasons == ["denselayer1.conv1 has hooks"]
    assert any("features" in r.name and "has hooks" in r.reasons[0] for r in report.others)
    with pytest.raises(FallbackError, match="has hooks"):
        optimize_for_inference(model, strict=True)


@pytest.mark.parametrize(
    "name", ["features.conv0", "features.norm0", "features.relu0", "features.pool0", "features.norm5"]
)
def test_a_hook_around_the_blocks_is_called(name: str) -> None:
    """Of each module that would be taken with the one before it."""
    model: Any = randomised(torchvisions())
    model.get_submodule(name).register_forward_hook(lambda module, inputs, out: out * 2)
    served = assert_served(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    (report,) = [r for r in explain(served).others if r.name == name]
    assert "has hooks" in report.reasons[0]


def odd_slopes(model: Any) -> None:
    model.act.negative_slope = 1.5


def other_strides(model: Any) -> None:
    model.second[0] = nn.Conv2d(8, 8, 3, 2, padding=1, groups=2)


def reflected(model: Any) -> None:
    model.conv = nn.Conv2d(3, 8, 3, 2, padding=1, padding_mode="reflect")


def frozen_without_statistics(model: Any) -> None:
    model.bn = nn.BatchNorm2d(8, track_running_stats=False)


def without_affine(model: Any) -> None:
    model.bn, model.second[1] = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, affine=False)


def identities(model: Any) -> None:
    model.bn, model.act, model.second[2] = nn.Identity(), nn.Dropout2d(0.5), nn.Identity()


def other_eps(model: Any) -> None:
    model.norm.eps = 0.5


def pointwise(model: Any) -> None:
    model.second = nn.Sequential(
        nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.AvgPool2d(2), nn.Conv2d(8, 8, (1, 3), padding="same")
    )


def other_windows(model: Any) -> None:
    model.second = nn.Sequential(
        nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.AvgPool2d(2, padding=1), nn.MaxPool2d(3, 2, 1)
    )


CHANGES = [
    *(odd_slopes, other_strides, reflected, frozen_without_statistics, without_affine, identities, other_eps),
    *(pointwise, other_windows),
]


@pytest.mark.parametrize("change", CHANGES)
def test_other_stems(change: Callable[[Any], None]) -> None:
    model = Heads(HEADS["mean"][0])
    change(model)
    served = assert_served(randomised(model).double(), torch.randn(2, 3, 21, 25, dtype=torch.float64))
    assert any(isinstance(part, network.Structure) for segment in segments(served) for part in segment.parts)


class Branching(nn.Module):
    """Whose ``forward`` looks like one sequence of calls to a tracer that feeds it no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.features: Any = torchvisions().features

    def forward(self, x: Any) -> Tensor:
        return self.features(x if isinstance(x, Tensor) else -x)


class BySize(Branching):
    def forward(self, x: Any) -> Tensor:
        return self.features(x.flip(2) if x.shape[2] > 40 else x)


class WithMask(Branching):
    def forward(self, x: Any, mask: Any = None) -> Tensor:
        return self.features(x if mask is None else x * mask)


class Counting(Branching):
    calls = 0

    def forward(self, x: Any) -> Tensor:
        self.calls += 1
        return self.features(x) * self.calls


@pytest.mark.parametrize("kind", [Branching, BySize, WithMask, Counting])
def test_a_forward_that_cannot_be_followed_stays(kind: type[nn.Module]) -> None:
    """Its sequence of features is one program all the same."""
    model: Any = randomised(kind()).double()
    served, x = optimize_for_inference(model), torch.randn(1, 3, 48, 32, dtype=torch.float64)
    calls = ((x,), (x[:, :, :33],), *([(x, x)] if kind is WithMask else []))
    for i, inputs in enumerate(calls):
        if kind is Counting:
            served.inside.calls = model.calls = i
        assert_largest(served(*inputs), model(*inputs), "float64 whole block", "output")
    assert [len(s.parts) for s in segments(served)] == [5]
    assert explain(served).others[0].name == ""
    assert len(explain(served).others) == 1


class Looking(nn.Module):
    """Whose code cannot be followed, and looks into its sequence of features."""

    def __init__(self, look: str) -> None:
        super().__init__()
        self.features: Any = torchvisions().features
        self.look = look

    def forward(self, x: Any, unused: Any = None) -> Any:
        assert x.shape[1] == 3
        return LOOKS[self.look](self.features, x)


def taps(features: Any, x: Tensor) -> dict[str, Tensor]:
    found = {}
    for name, layer in features.named_children():
        x = layer(x)
        found[name] = x.mean((2, 3))
    return found


LOOKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "named_children": taps,
    "iteration": lambda features, x: functools.reduce(lambda y, layer: layer(y), features, x),
    "indexing": lambda features, x: [features[: len(features) - 1](x), features[-1].weight],
    "attributes": lambda features, x: features.denseblock1(features.pool0(features.norm0(features.conv0(x)))),
    "class": lambda features, x: features(x) if isinstance(features, nn.Sequential) else -x,
    "call and attribute": lambda features, x: (features(x), features.conv0(x)),
}


class Flipping(nn.Module):
    """By chance, in one way of many."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.inside, self.calls = torchvisions(), 0
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.flip(-1) if self.draw() else x)


class Counted(Flipping):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inside(x if self.calls < 50 else x.flip(-1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Flipping(lambda: random.random() < 0), "its forward draws random numbers"),
        (lambda: Flipping(lambda: np.random.rand() < 0), "its forward draws random numbers"),
        (lambda: Flipping(lambda: bool(torch.rand(()) < 0)), "its forward draws random numbers"),
        (lambda: Counted(lambda: 0), "its forward sets attributes of its own"),
    ],
    ids=["python", "numpy", "torch", "counter"],
)
def test_a_branch_that_may_be_another_next_time_stays(model: Callable[[], nn.Module], reason: str) -> None:
    """Whichever it was while the forward was followed; what random numbers follow is not changed."""
    made, x = model().eval(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    states = random.getstate(), torch.get_rng_state()
    served = optimize_for_inference(made)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert reason in str(explain(served))
    assert_largest(served(x), made(x), "float64 whole block", "output")


def test_what_asks_whether_there_are_gradients_is_followed_without_them() -> None:
    class Asking(Flipping):
        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x if torch.is_grad_enabled() else x.flip(-1))

    made = Asking(lambda: 0).eval()
    served, x = optimize_for_inference(made), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert_largest(served(x), made(x), "float64 whole block", "output")
    assert segments(served)


@pytest.mark.parametrize("name", LOOKS)
def test_code_that_looks_into_a_module_finds_its_children(name: str) -> None:
    model, x = randomised(Looking(name)).double(), torch.randn(2, 3, 33, 34, dtype=torch.float64)
    served = assert_served(model, x)
    assert [len(s.parts) for s in segments(served)] == [5]
    with torch.no_grad():
        expected = leaves(served(x))
        for one in (copy.deepcopy(served), pickle.loads(pickle.dumps(served)), served.to("cpu", torch.float64)):
            assert all(map(torch.equal, map(torch.as_tensor, leaves(one(x))), map(torch.as_tensor, expected)))


def changed_behind_a_program(model: Any, x: Tensor) -> Any:
    x = x * 1.0
    out = model.block(model.second(model.act(model.bn(model.conv(x)))))
    return model.norm(out), x.sub_(x.mean())


def changed_before_its_end(model: Any, x: Tensor) -> Any:
    h = model.conv(x)
    normed = model.bn(h)
    other = F.relu(h, inplace=True)
    return model.norm(model.block(model.act(normed))), other


def added_to(model: Any, x: Tensor) -> Any:
    h = model.conv(x)
    normed = model.bn(h)
    h.add_(1)
    return model.norm(model.block(model.act(normed))), h


class Changing(Heads):
    def forward(self, x: Tensor) -> Any:
        return self.head(self, x)


@pytest.mark.parametrize("head", [changed_behind_a_program, changed_before_its_end, added_to])
def test_a_program_reads_its_input_before_it_is_changed(head: Callable[[Any, Tensor], Any]) -> None:
    served = assert_served(randomised(Changing(head)).double(), torch.randn(2, 3, 17, 21, dtype=torch.float64))
    assert len(segments(served)) == 1


class Masked(Branching):
    """Whose result is another at each call, beside very large numbers."""

    calls, fill = 0, 0.0

    def forward(self, x: Any) -> Tensor:
        self.calls += 1
        return torch.cat([self.features(x).mean((2, 3)) * self.calls, torch.full((2, 1), self.fill).to(x)], 1)


@pytest.mark.parametrize("fill", [-1e4, -1e9, float("-inf")])
def test_large_numbers_hide_no_difference(fill: float) -> None:
    model: Any = randomised(Masked()).double()
    model.fill, model.calls = fill, 5
    served, x = optimize_for_inference(model), torch.randn(2, 3, 33, 34, dtype=torch.float64)
    found, expected = served(x)[:, :-1], model(x)[:, :-1]
    assert_largest(found, expected, "float64 whole block", "output")


class Crops(Branching):
    """Several of each image."""

    def forward(self, x: Any) -> Tensor:
        images = self.features(x.reshape(-1, 3, x.size(-2), x.size(-1)))
        return F.adaptive_avg_pool2d(images, 1).view(x.size(0), -1)


def test_crops_of_an_image_stay_together() -> None:
    model, x = randomised(Crops()).double(), torch.randn(2, 4, 3, 33, 34, dtype=torch.float64)
    served = assert_served(model, x)
    assert_served(model, x[:, 0])
    assert served(x).shape == (2, 4 * 32)


def test_an_image_that_is_normalised_in_place() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), torchvisions())
    x = torch.randn(2, 3, 33, 34, dtype=torch.float64)
    served = optimize_for_inference(randomised(model))
    assert len(segments(served)) == 1
    with torch.no_grad():
        assert_largest(served(x.clone()), model(x.clone()), "float64 whole block", "output")


def test_a_program_that_is_seen_to_be_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = drafts._with_norm
    monkeypatch.setattr(drafts, "_with_norm", lambda w, *rest: (fold(w, *rest)[0] * 1.001, fold(w, *rest)[1]))
    model, x = torchvisions(), torch.randn(2, 3, 33, 34, dtype=torch.float64)
    served = assert_served(randomised(model), x)
    assert any("its program computes something else than it" in r.reasons for r in explain(served).others)
    with pytest.raises(FallbackError, match="its program computes something else than it"):
        optimize_for_inference(model, strict=True)


class Scaled(Branching):
    """By a parameter of its own, and by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 3, 1, 1))

    def forward(self, x: Any) -> Tensor:
        return self.features((x - torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64).view(1, 3, 1, 1)) * self.scale)


def test_tensors_of_the_code() -> None:
    model, x = randomised(Scaled()).double(), torch.randn(2, 3, 33, 34, dtype=torch.float64)
    served = assert_served(model, x)
    assert {r.name for r in explain(served).others} == {"sub", "mul"}
    assert torch.equal(pickle.loads(pickle.dumps(served))(x), served(x))


def test_batch_statistics_are_left_to_the_modules() -> None:
    """A norm without running statistics takes those of the batch in evaluation, too."""
    model: Any = torchvisions()
    norm = model.features.transition1.norm
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    served = assert_served(model.eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64))
    (transition,) = explain(served).transitions
    assert not any(
        isinstance(m, Segment) and any(type(p).__name__ == "Reduction" for p in m.parts) for m in served.modules()
    )
    assert transition.reasons


def test_a_network_without_dense_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    served, x = optimize_for_inference(model), torch.randn(1, 3, 8, 8)
    assert torch.equal(served(x), model(x))
    assert explain(served).others[0].reasons == ["no dense block was found in Sequential"]
    with pytest.raises(FallbackError, match="no dense block was found"):
        optimize_for_inference(model, strict=True)


def test_a_fused_network() -> None:
    """With or without ``memory_efficient``; a snapshot is that of the network before it was fused."""
    model, x = randomised(torchvisions()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = optimize_for_inference(model)(x)
    for memory_efficient in (False, True):
        served = assert_served(fuse(copy.deepcopy(model), memory_efficient=memory_efficient), x)
        assert torch.equal(served(x), expected)
        assert len(segments(served)) == 1 and not explain(served).others


def test_blocks_and_transitions_by_themselves() -> None:
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    for model in (FusedDenseBlock(2, 8, 2, 4), FusedTransition(8, 3), FusedDenseBlock(2, 8, None, 4, bias=True)):
        served = assert_served(randomised(model).double(), x)
        assert len(segments(served)) == 1
