"""Changes between two calls of a network: the second one is of the network as it is then."""

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import step
from networks import assert_same_step, torchvisions
from torch import nn

from fused_densenet import DenseNet, FusedDenseBlock, fuse, strict
from fused_densenet.backends import extension
from fused_densenet.fallback import standing
from fused_densenet.fallback.standing import Standing, known_of


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


def _of_class(layer: Any) -> None:
    layer.__class__ = type("Other", (type(layer),), {})


def _hooked(layer: Any) -> None:
    layer.norm1._forward_hooks[0] = lambda *_: None  # nothing tells of it but the dict


def _patched(layer: Any) -> None:
    layer.conv1.forward = lambda x: x


def _replaced(layer: Any) -> None:
    layer._modules["relu1"] = nn.ReLU()


def _renamed(layer: Any) -> None:
    layer._modules["relu3"] = layer._modules.pop("relu2")


def _without_weight(layer: Any) -> None:
    layer.norm2.weight = None


def _without_statistics(layer: Any) -> None:
    layer.norm2.running_mean = None


def _pruned(layer: Any) -> None:
    layer.conv2.weight.data = layer.conv2.weight.data[:2]


def _of_same_value(layer: Any) -> None:
    layer.norm1.eps = float(str(layer.norm1.eps))  # another object: worked out again


def _in_mode(layer: Any) -> None:
    layer.norm1.eval()


SEEN = [
    *(_of_class, _hooked, _patched, _replaced, _renamed, _without_weight, _without_statistics, _pruned),
    *(_of_same_value, _in_mode),
]


def _other_values(layer: Any) -> None:
    nn.init.ones_(layer.conv1.weight)


def _other_parameter(layer: Any) -> None:
    layer.conv1.weight = nn.Parameter(layer.conv1.weight.clone())


def _other_buffer(layer: Any) -> None:
    layer.norm1.running_var = layer.norm1.running_var.clone()


def _frozen(layer: Any) -> None:
    layer.requires_grad_(False)


@pytest.fixture(params=["by versions", "compiled", "python"])
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """At dicts: at their versions, where Python has any; at what is in them, in C++ or in Python."""
    if request.param == "compiled":
        monkeypatch.setattr(standing, "_VERSIONS_AT", 0)
    elif request.param == "python":
        monkeypatch.setattr(extension, "cpu", None)
    name: str = request.param
    return name


NOT_SEEN = [_other_values, _other_parameter, _other_buffer, _frozen]


@pytest.mark.parametrize("change", [*SEEN, *NOT_SEEN])
def test_what_is_seen(change: Callable[[Any], None], look: str) -> None:
    block = FusedDenseBlock(2, 4, 2, 3)
    known: Standing[None] = Standing(None, block, list(block.modules())[1:])
    assert known.holds()
    change(block["denselayer2"])
    assert known.holds() == (change in NOT_SEEN)
    assert known.one_device


def test_replaced_method_of_a_class_is_seen(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = FusedDenseBlock(2, 4, 2, 3)
    known: Standing[None] = Standing(None, block, list(block.modules())[1:])
    with monkeypatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", lambda self, x: x)
        assert not known.holds()
    assert known.holds()


def test_what_was_worked_out_while_another_thread_traced(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, call = DenseNet(4, (2, 2), 8).eval().features, nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: call(self, *args))  # as torch.fx does

    def work_out() -> Any:
        worked_out = features.work_out()
        monkeypatch.setattr(nn.Module, "__call__", call)
        return worked_out

    assert not known_of(features, work_out).plan.chains
    assert known_of(features, features.work_out).plan.chains


def test_tensor_on_another_device_is_seen(look: str) -> None:
    block: Any = FusedDenseBlock(2, 4, 2, 3)
    known: Standing[None] = Standing(None, block, list(block.modules())[1:])
    block["denselayer1"].norm1.running_mean = torch.zeros(4, device="meta")
    assert known.holds()
    assert not known.one_device


def test_what_is_changed_and_changed_back(look: str) -> None:
    block: Any = FusedDenseBlock(2, 4, 2, 3)
    known: Standing[None] = Standing(None, block, list(block.modules())[1:])
    norm = block["denselayer2"].norm1
    eps = norm.eps
    for _ in range(2):
        norm.eps = 0.5
        assert not known.holds()
        norm.eps = eps
        assert known.holds()
    hook = norm.register_forward_hook(lambda *_: None)
    assert not known.holds()
    hook.remove()
    assert known.holds()


def test_versions_are_read_where_python_has_them() -> None:
    has = sys.implementation.name == "cpython" and sys.version_info < (3, 13) and not hasattr(sys, "getobjects")
    assert (standing._VERSIONS_AT > 0) == has


def test_what_is_looked_at_outlives_nothing() -> None:
    block = FusedDenseBlock(2, 4, 2, 3).eval()
    with torch.no_grad():
        block(torch.randn(1, 4, 3, 3))
    layer = weakref.ref(block["denselayer1"])
    del block
    gc.collect()
    assert layer() is None


def to_another_dtype(model: Any) -> None:
    model.double()


def other_state(model: Any) -> None:
    model.load_state_dict({name: t.clone() + 1 for name, t in model.state_dict().items()})


@pytest.mark.parametrize("change", [to_another_dtype, other_state])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_tensors_can_be_swapped(change: Any, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = DenseNet(2, (2, 2), 4, num_classes=3).train(training), torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(training):
        model(x)
    change(expected := copy.deepcopy(model))
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    change(model)
    x = x.to(model.classifier.weight.dtype)
    with torch.set_grad_enabled(training):
        assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("part", ["", "features", "features.denseblock1", "features.transition1"])
def test_computed_weights_are_for_one_call(part: str) -> None:
    """As inner steps of meta-learning make them: with them would live all that they were computed from."""
    network = torchvisions()
    theirs, ours = (model.get_submodule(part) for model in (network, fuse(copy.deepcopy(network))))
    first = next(iter(theirs.parameters())).shape
    x = torch.randn(2, first[0] if "." in part else 3, 32, 32, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        factor = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
        weights = {name: parameter.detach() * factor for name, parameter in module.named_parameters()}
        alive = [weakref.ref(weight) for weight in weights.values()]
        with strict():
            torch.func.functional_call(module, weights, (x,)).square().sum().backward()
        del weights
        gc.collect()
        assert not any(weight() is not None for weight in alive)
        results.append(factor.grad)
        with strict():
            module(x)
    torch.testing.assert_close(*results)
