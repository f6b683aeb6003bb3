"""Parameters that go through autograd as stand-ins of a network's parts: what autograd does with them is what it always does."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import torchvisions
from tolerances import assert_largest
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from fused_densenet import DenseNet, fuse

STAND_IN = "fused_densenet::parameters"


@pytest.fixture
def model() -> Any:
    return DenseNet(2, (2, 2), 4, num_classes=3).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def nodes_of(out: Tensor) -> list[str]:
    found, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [node.name() for node in found]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return gradients(model)


def seen_by_hooks(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of parameters that autograd sees, for hooks want to pack what is saved."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        model.zero_grad()
        out = model(x)
    assert STAND_IN not in nodes_of(out)
    out.square().sum().backward()
    return gradients(model)


def assert_same(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert some.keys() == others.keys()
    assert all(torch.equal(some[name], others[name]) for name in some)


def test_the_same_gradients_as_of_parameters_that_autograd_sees(model: Any, x: Tensor) -> None:
    assert STAND_IN in nodes_of(model(x))
    assert_same(step(model, x), seen_by_hooks(model, x))
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


def test_gradients_are_laid_out_like_their_parameters(x: Tensor) -> None:
    model = fuse(torchvisions())
    model.to(memory_format=torch.channels_last)
    step(model, x.contiguous(memory_format=torch.channels_last))
    for parameter in model.features.parameters():
        assert parameter.grad.stride() == parameter.stride()


def test_gradients_accumulate(model: Any, x: Tensor) -> None:
    once = {name: gradient.clone() for name, gradient in step(model, x).items()}
    model(x).square().sum().backward()
    for name, gradient in gradients(model).items():
        assert_largest(gradient, 2 * once[name], "float64 whole block", "gradient")


def test_hooks_of_parameters_are_called_once(model: Any, x: Tensor) -> None:
    called: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: called.append(name))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: called.append(name))
    step(model, x)
    assert sorted(called) == sorted(2 * list(dict(model.named_parameters())))


def test_steps_taken_in_the_backward_pass(model: Any, x: Tensor) -> None:
    def take(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {name: gradient.clone() for name, gradient in step(model, x).items()}
    for parameter in model.parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(take)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name].sub(found[name], alpha=0.1))


def test_gradients_by_some(model: Any, x: Tensor) -> None:
    every = step(model, x)
    wanted = ["features.denseblock1.denselayer2.conv1.weight", "features.norm5.bias", "features.conv0.weight"]
    found = torch.autograd.grad(model(x).square().sum(), [model.get_parameter(name) for name in wanted])
    assert all(torch.equal(gradient, every[name]) for name, gradient in zip(wanted, found, strict=True))
    assert model.classifier.weight.grad is every["classifier.weight"]


@pytest.mark.parametrize("name", ["features.denseblock1.denselayer2.conv2.weight", "features.transition1.norm.bias"])
def test_a_parameter_without_gradient_is_left_out(name: str, model: Any, x: Tensor) -> None:
    every = {name: gradient.clone() for name, gradient in step(model, x).items()}
    model(x)
    model.get_parameter(name).requires_grad_(False)  # between two calls, of the same tensor
    out = model(x)
    assert STAND_IN not in nodes_of(out)
    model.zero_grad()
    out.square().sum().backward()
    found = gradients(model)
    assert found.keys() == every.keys() - {name}
    assert_same(found, {key: every[key] for key in found})


def test_a_change_in_place_before_the_backward_pass_is_noticed(model: Any, x: Tensor) -> None:
    out = model(x).sum()
    with torch.no_grad():
        model.features.denseblock1.denselayer1.norm2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_change_in_place_is_noticed_whatever_is_asked_for(model: Any, x: Tensor) -> None:
    out = model(x.requires_grad_()).sum()
    with torch.no_grad():
        model.features.denseblock1.denselayer1.conv2.weight.mul_(2)
    for wanted in (x, model.features.conv0.weight):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out, [wanted], retain_graph=True)


def test_hooks_of_nodes_may_look_and_change_nothing(model: Any, x: Tensor) -> None:
    def node_of(out: Tensor) -> Any:
        waiting = [out.grad_fn]
        while STAND_IN not in [following.name() for following, _ in waiting[0].next_functions if following is not None]:
            node = waiting.pop(0)
            waiting += [following for following, _ in node.next_functions if following is not None]
        return waiting[0]

    expected = step(model, x)
    out = model(x).square().sum()
    node_of(out).register_hook(lambda inputs, _: tuple(t if t is None else t.detach() for t in inputs))
    model.zero_grad()
    out.backward()
    assert_same(gradients(model), expected)
    out = model(x).square().sum()
    node_of(out).register_hook(lambda inputs, _: tuple(t if t is None else t * 2 for t in inputs))
    with pytest.raises(RuntimeError, match="register the hook on the parameter"):
        out.backward()


def test_freed_storage_is_an_error(model: Any, x: Tensor) -> None:
    out = model(x).sum()
    model.features.denseblock2.denselayer1.conv1.weight.untyped_storage().resize_(0)
    for run in (out.backward, lambda: model(x)):
        with pytest.raises((ValueError, RuntimeError), match="data"):
            run()


def second_order(model: Any, x: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))


def batched(model: Any, x: Tensor) -> list[Tensor]:
    out = model(x)
    directions = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    return list(torch.autograd.grad(out, list(model.parameters()), directions, is_grads_batched=True))


@pytest.mark.parametrize("run", [second_order, batched])
def test_other_kinds_of_backward_pass(run: Callable[[Any, Tensor], list[Tensor]], model: Any, x: Tensor) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        expected = run(model, x)
    for ours, theirs in zip(run(model, x), expected, strict=True):
        assert_largest(ours, theirs, "float64 whole block", "gradient")


def test_anomaly_detection_finds_none(model: Any, x: Tensor) -> None:
    expected = step(model, x)
    with pytest.warns(UserWarning, match="Anomaly Detection"):
        anomaly = torch.autograd.detect_anomaly(check_nan=True)
    with anomaly:
        assert_same(step(model, x), expected)


def test_other_parameters_after_the_forward_pass(model: Any, x: Tensor) -> None:
    expected = step(model, x)
    out, name = model(x).square().sum(), "features.denseblock1.denselayer1.conv1.weight"
    old = model.get_parameter(name)
    model.zero_grad()
    model.features.denseblock1.denselayer1.conv1.weight = nn.Parameter(torch.zeros_like(old))
    model(x)
    out.backward()
    assert torch.equal(old.grad, expected[name])
    assert model.get_parameter(name).grad is None


@pytest.mark.filterwarnings("ignore:.*Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_backward_pass(model: Any, x: Tensor) -> None:
    enabled = functools.partial(compiled_autograd._enable, torch.compile(backend="eager"))
    expected = step(model, x)
    with enabled():
        found = step(model, x)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():  # some are zero but for rounding
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9 * largest)
    out = model(x).sum()
    with enabled(), pytest.raises(RuntimeError, match="enable compiled autograd before the forward pass"):
        out.backward()
