"""Dense blocks without norms: recognised by what they compute, the same results and gradients, one buffer kept."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import step
from networks import assert_same_step
from residual_networks import NETWORKS, Five, InSequences, LocalFusion, RRDBNet, conv3
from small_networks import results
from tolerances import assert_largest, assert_no_worse, assert_same
from torch import Tensor, nn

from fused_densenet import FallbackWarning, FusedResidualDenseBlock, explain, fuse, strict, unfuse

PLANES = 200


def images(*sizes: int) -> Tensor:
    return torch.randn(2, 3, *(sizes or (9, 7)), dtype=torch.float64)


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FusedResidualDenseBlock)]


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    build, count = NETWORKS[name]
    theirs = build().double()
    ours = fuse(copy.deepcopy(theirs), strict=True)
    assert len(blocks(ours)) == count == len(explain(ours).blocks)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images()
    for training in (True, False):
        with strict():
            assert_same_step(results(ours.train(training), x), results(theirs.train(training), x))
    assert [type(module) for module in unfuse(ours).modules()] == [type(module) for module in theirs.modules()]


def pair(**options: Any) -> tuple[FusedResidualDenseBlock, nn.Module]:
    theirs = Five(8, 4)
    ours = FusedResidualDenseBlock(8, 4, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.usefixtures("backend")
def test_module() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 8, 6, 5)
    exact = step(copy.deepcopy(theirs).double(), x.double())
    with strict():
        assert_same(step(copy.deepcopy(ours).double(), x.double()), exact, "float64 whole block")
        assert_same(step(ours, x), exact, "float32 whole block")


def test_scale_changed_after_a_call() -> None:
    ours, x = FusedResidualDenseBlock(8, 4).double(), torch.randn(2, 8, 6, 5, dtype=torch.float64)
    before = ours(x) - x
    ours.scale *= 2
    with strict():
        torch.testing.assert_close(ours(x) - x, 2 * before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("narrow_input", [True, False])
def test_under_autocast(dtype: torch.dtype, narrow_input: bool) -> None:
    ours, theirs = pair()
    x = torch.randn(2, 8, 9, 8).to(dtype if narrow_input else torch.float32)
    exact = step(copy.deepcopy(theirs).double(), x.double())
    with strict():
        found = step(ours, x, autocast=dtype)
    expected = step(theirs, x, autocast=dtype)
    assert found["output"].dtype == expected["output"].dtype
    assert_no_worse(found, expected, exact)


def test_operator_by_operator() -> None:
    ours, theirs = pair()
    ours.conv2.register_forward_hook(lambda module, inputs, output: 2 * output)
    theirs.conv2.register_forward_hook(lambda module, inputs, output: 2 * output)
    x = torch.randn(2, 8, 6, 5)
    with pytest.warns(FallbackWarning, match="conv2 has hooks"):
        found = step(ours, x)
    assert_same(found, step(theirs.double(), x.double()), "float32 whole block")


def test_compiled_and_exported() -> None:
    model = fuse(RRDBNet(1, 8, 4).double(), strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = images()
    found = {name.removeprefix("_orig_mod."): value for name, value in results(compiled, x).items()}
    assert_same_step(found, results(model, x))
    program = torch.export.export(model.eval(), (x,))
    assert [str(node.target) for node in program.graph.nodes].count("fused_densenet.dense_block.default") == 3
    assert_largest(program.module()(x), model(x), "float64 whole block", "output")


def test_second_order() -> None:
    ours, theirs = (module.double() for module in pair())
    x = torch.randn(1, 8, 4, 3, dtype=torch.float64)
    found = []
    for block in (ours, theirs):
        source = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(block(source).square().sum(), source, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [source, *block.parameters()]))
    for actual, expected in zip(*found, strict=True):
        assert_largest(actual, expected, "float64 whole block", "second-order gradient")


def kept(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that autograd keeps beside parameters, each memory once."""
    memories: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            memories[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(x)
    assert out.requires_grad
    return sum(memories.values())


def test_memory() -> None:
    x = torch.randn(1, 64, 16, 16).requires_grad_()
    theirs = Five(64, 32)
    ours = fuse(copy.deepcopy(theirs), strict=True)
    plane = 16 * 16 * 4
    assert kept(theirs, x * 1) > 600 * plane
    with strict():
        assert kept(ours, x * 1) <= PLANES * plane


class NoisyDenseBlock(Five):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1e-9 * torch.randn_like(x))


class ScaledDenseBlock(Five):
    def __init__(self, features: int, growth: int) -> None:
        super().__init__(features, growth)
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.beta


class SkippingDenseBlock(Five):
    """The second layer's result is added to by the first's, as ESRGAN+ does."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.lrelu(self.conv1(x))
        b = self.lrelu(self.conv2(torch.cat((x, a), 1))) + a
        c = self.lrelu(self.conv3(torch.cat((x, a, b), 1)))
        d = self.lrelu(self.conv4(torch.cat((x, a, b, c), 1)))
        return self.conv5(torch.cat((x, a, b, c, d), 1)) * 0.2 + x


class ReflectingDenseBlock(Five):
    """As DenseFuse pads."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__(features, growth)
        self.conv2.padding_mode = "reflect"
        self.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


LEFT = {
    NoisyDenseBlock: "its forward calls randn_like",
    ScaledDenseBlock: "it does not concatenate its input with what convolutions and activations make of it",
    SkippingDenseBlock: "it does not concatenate its input with what convolutions and activations make of it",
    ReflectingDenseBlock: "conv2 is a Conv2d|conv2 calls pad",
}


@pytest.mark.parametrize("kind", LEFT)
@pytest.mark.filterwarnings("ignore:not every dense block can be fused")
def test_left_alone(kind: type[Five]) -> None:
    ours = fuse(kind(8, 4))
    assert type(ours) is kind and not blocks(ours)
    (report,) = explain(ours).blocks
    assert any(part in report.reasons[0] for part in LEFT[kind].split("|")), report.reasons


def test_changed_after_fuse() -> None:
    theirs = InSequences(8, 4).double()
    ours = fuse(copy.deepcopy(theirs), strict=True)
    for block in (theirs, ours):
        torch.manual_seed(0)
        block.conv2[0] = nn.Conv2d(12, 4, 3, padding=2, dilation=2).double()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match=r"conv2\.0 is grouped, strided or dilated"):
        assert_same_step(results(ours, x), results(theirs, x))


def test_networks_without_growth_are_not_tried() -> None:
    model = nn.Sequential(conv3(3, 8), nn.ReLU(), conv3(8, 8))
    assert not explain(model).blocks


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
        FusedResidualDenseBlock(num_layers=0)
    with pytest.raises(ValueError, match="negative_slope: expected a number between 0 and 1, got 2"):
        FusedResidualDenseBlock(negative_slope=2)
    with pytest.raises(ValueError, match="x: expected 8 channels, got 7"):
        FusedResidualDenseBlock(8, 4)(torch.randn(1, 7, 4, 4))
    with pytest.raises(TypeError, match=r"x: expected torch\.float32, the dtype of the parameters, got torch\.float64"):
        fuse(LocalFusion(8, 4), strict=True)(torch.randn(1, 8, 4, 4, dtype=torch.float64))
