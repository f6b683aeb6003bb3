"""What goes from module to module in a network: statistics of what nobody has touched, and layouts at every door."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from networks import torchvisions
from tolerances import assert_largest, assert_same, tolerance
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fused_densenet import FusedDenseBlock, FusedFeatures, FusedTransition, fuse, strict
from fused_densenet.ops.statistics import statistics_of


def stage() -> nn.Sequential:
    """A block, a transition, and a norm and ReLU that read another block, as torchvision writes them."""
    parts = OrderedDict[str, nn.Module](
        denseblock1=peers.DenseBlock(2, 4, 2, 4, 0.0),
        transition1=peers.Transition(12, 6),
        denseblock2=peers.DenseBlock(2, 6, 2, 4, 0.0),
        norm5=nn.BatchNorm2d(14),
        relu5=nn.ReLU(),
    )
    return nn.Sequential(parts).double()


def images() -> Tensor:
    return torch.randn(2, 4, 6, 6, dtype=torch.float64)


def assert_same_forward(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    assert_largest(ours(x), theirs(x), "float64 whole block", "output")
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "float64 whole block")


@pytest.mark.usefixtures("backend")
def test_statistics_of_a_block_are_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = stage()
    ours, x = fuse(copy.deepcopy(theirs)), images()
    assert isinstance(ours, FusedFeatures)
    with monkeypatch.context() as patch, strict():
        patch.setattr("fused_densenet.ops.statistics.take_moments", None)
        assert_same_forward(ours, theirs, x)
        with pytest.raises(TypeError):
            ours.transition1(ours.denseblock1(x))  # one by one: what happens in between is not known


def test_sequence_without_a_stem_passes_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As networks for small images begin: a convolution, a block and a transition."""
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1).double(), *list(stage().children())[:2])
    ours, x = fuse(copy.deepcopy(theirs)), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with monkeypatch.context() as patch, strict():
        patch.setattr("fused_densenet.ops.statistics.take_moments", None)
        assert_same_forward(ours, theirs, x)
    assert ours(x).stride() == theirs(x).stride()


def by_data(out: Tensor) -> None:
    out.data.mul_(3)


def by_numpy(out: Tensor) -> None:
    out.detach().numpy()[:] *= 3


def without_gradients(out: Tensor) -> None:
    with torch.no_grad():
        out.mul_(3)


CHANGES: list[Callable[[Tensor], None]] = [by_data, by_numpy, without_gradients]


def hooked_block(network: nn.Module, change: Callable[[Tensor], None]) -> Any:
    return network.get_submodule("denseblock1").register_forward_hook(lambda module, inputs, out: change(out))


def hooked_transition(network: nn.Module, change: Callable[[Tensor], None]) -> Any:
    return network.get_submodule("transition1").register_forward_pre_hook(lambda module, inputs: change(inputs[0]))


def hook_on_all_blocks(network: nn.Module, change: Callable[[Tensor], None]) -> Any:
    block = network.get_submodule("denseblock1")
    return register_module_forward_hook(lambda module, inputs, out: change(out) if module is block else None)


def hook_before_all_transitions(network: nn.Module, change: Callable[[Tensor], None]) -> Any:
    transition = network.get_submodule("transition1")
    return register_module_forward_pre_hook(lambda module, inputs: change(inputs[0]) if module is transition else None)


def module_between(network: nn.Module, change: Callable[[Tensor], None]) -> None:
    class Between(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            change(x)
            return x

    children = list(network.named_children())
    for name, _ in children[1:]:
        delattr(network, name)
    for name, module in (("between", Between()), *children[1:]):
        network.add_module(name, module)


def forward_of_the_instance(network: nn.Module, change: Callable[[Tensor], None]) -> None:
    block: Any = network.get_submodule("denseblock1")
    own = block.forward

    def forward(x: Tensor) -> Tensor:
        out: Tensor = own(x)
        change(out)
        return out

    block.forward = forward


PLACES = [
    *(hooked_block, hooked_transition, hook_on_all_blocks, hook_before_all_transitions),
    *(module_between, forward_of_the_instance),
]


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", PLACES)
def test_feature_maps_that_somebody_changed(place: Callable[..., Any], change: Callable[[Tensor], None]) -> None:
    theirs = stage()
    ours, x, handles = fuse(copy.deepcopy(theirs)), images(), []
    try:
        with torch.no_grad():
            for network in (ours, theirs):
                handles.append(place(network, change))
                network(x)
            assert_same_forward(ours, theirs, x)
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def hooked(transition: Any) -> Any:
    transition.conv.register_forward_hook(lambda *_: None)
    return transition


BETWEEN: dict[str, Callable[[], list[nn.Module]]] = {
    "activation": lambda: [nn.ReLU()],
    "pooling": lambda: [nn.MaxPool2d(3, 1, 1)],
    "convolution": lambda: [nn.Conv2d(12, 12, 3, padding=1)],
    "norm": lambda: [nn.BatchNorm2d(12)],
    "stem": lambda: [nn.BatchNorm2d(12), nn.ReLU()],
    "transition": lambda: [peers.Transition(12, 12)],
    "transition that runs operator by operator": lambda: [hooked(peers.Transition(12, 12))],
    "module of another class": lambda: [Shifted()],
    "sequence": lambda: [nn.Sequential(nn.ReLU(), Shifted())],
}


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@pytest.mark.parametrize("after", ["transition", "stem"])
@pytest.mark.parametrize("name", BETWEEN)
def test_statistics_hold_for_the_next_module_only(name: str, after: str) -> None:
    last = [peers.Transition(12, 12)] if after == "transition" else []
    last += [nn.BatchNorm2d(12), nn.ReLU()]
    theirs = nn.Sequential(peers.DenseBlock(2, 4, 2, 4, 0.0), *BETWEEN[name](), *last).double()
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.bias, 0.5, 1.5)  # a mean of zero is only rounding
    ours, x = fuse(copy.deepcopy(theirs)), images()
    assert isinstance(ours, FusedFeatures)
    assert_same_forward(ours, theirs, x)


@pytest.mark.parametrize("change", CHANGES)
def test_feature_maps_changed_between_modules_that_stand_alone(change: Callable[[Tensor], None]) -> None:
    theirs = stage()
    ours, x, results = fuse(copy.deepcopy(theirs)), images(), []
    for network in (ours, theirs):
        out = network.denseblock1(x)
        with torch.no_grad():
            change(out)
        results.append(network.transition1(out))
    assert_largest(*results, "float64 whole block", "output")


def test_class_that_was_patched_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools that draw a network do: every module is called by ``nn.Module.__call__``."""
    network, seen = fuse(stage()), []
    call = nn.Module.__call__

    def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(module).__name__)
        return call(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", recorded)
    network(images())
    assert seen == ["FusedFeatures", "FusedDenseBlock", "FusedTransition", "FusedDenseBlock"]


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_module_added_to_a_sequence_that_ends_in_one_layer() -> None:
    """Which ``fuse`` may take for a block of one layer, and what comes before it."""
    theirs = nn.Sequential(*list(stage().children())[:2], peers.DenseBlock(1, 6, 2, 4, 0.0).double())
    ours, x = fuse(copy.deepcopy(theirs)), images()
    assert_same_forward(ours, theirs, x)
    for network in (ours, theirs):
        network.insert(1, nn.Tanh())
    assert_same_forward(ours, theirs, x)


def test_compiled_block_and_backward_hooks_are_called() -> None:
    """``block.compile()`` and backward hooks, which ``nn.Module.__call__`` sees to."""
    network, seen = fuse(stage()), []
    block, transition = network.denseblock1, network.transition1
    compiled = block.forward
    block._compiled_call_impl = lambda x: seen.append("compiled") or compiled(x)
    transition.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    network.denseblock2.register_full_backward_pre_hook(lambda module, outputs: seen.append("before"))
    network(images().requires_grad_()).sum().backward()
    assert seen == ["compiled", "before", "backward"]


def test_statistics_of_another_group_are_taken() -> None:
    x = images()
    whole = statistics_of(x, "eager", None)
    known = whole._replace(moments=whole.moments + 1, group="another")
    torch.testing.assert_close(statistics_of(x, "eager", None, known).moments, whole.moments)
    assert statistics_of(x, "eager", None, whole) is whole


def test_own_class_of_block_is_called() -> None:
    class Doubled(FusedDenseBlock):
        def forward(self, init_features: Tensor) -> Tensor:
            return 2 * super().forward(init_features)

    torch.manual_seed(0)
    doubled = Doubled(2, 4, 2, 4)
    torch.manual_seed(0)
    plain = FusedDenseBlock(2, 4, 2, 4)
    transition, x = FusedTransition(12, 6), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(FusedFeatures(doubled, transition)(x), transition(2 * plain(x)))


# Layouts

SHAPES = {2: (2, 3, 32, 32), 3: (2, 3, 32, 32, 32)}


def network(**options: Any) -> Any:
    return torchvisions(**options).float()


def assert_same_door(ours: nn.Module, theirs: nn.Module, x: Tensor) -> Tensor:
    """The same values, and strides that torch's operators and ``view`` see as the same."""
    out, expected = ours(x), theirs(x)
    assert out.stride() == expected.stride()
    limit = tolerance("float32 whole block") * expected.abs().max().item()
    torch.testing.assert_close(out, expected, rtol=0, atol=limit)
    return out


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "every second column, channels last": lambda x: x.repeat_interleave(2, 3).to(memory_format=torch.channels_last)[
        ..., ::2
    ],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", ["contiguous", "channels last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_features(layout: str, weights: str, training: bool) -> None:
    theirs = network().train(training)
    if weights == "channels last":
        theirs.to(memory_format=torch.channels_last)
    ours, x = fuse(copy.deepcopy(theirs)), LAYOUTS[layout](torch.randn(SHAPES[2]))
    with strict():
        out = assert_same_door(ours.features, theirs.features, x)
    if layout == weights == "contiguous":
        out.view(2, -1)
        F.avg_pool2d(out, 2).view(2, -1)
        out.view(2, 4, -1, 2, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_layout_of_volumes(layout: torch.memory_format) -> None:
    densenet = pytest.importorskip("monai.networks.nets.densenet")
    theirs = densenet.DenseNet(3, 3, 5, 8, 8, (2, 2), 2)
    ours = fuse(copy.deepcopy(theirs))
    assert_same_door(ours.features, theirs.features, torch.randn(SHAPES[3]).to(memory_format=layout))


def test_layout_of_signals() -> None:
    densenet = pytest.importorskip("monai.networks.nets.densenet")
    theirs = densenet.DenseNet(1, 3, 5, 8, 8, (2, 2), 2)
    ours = fuse(copy.deepcopy(theirs))
    assert_same_door(ours.features, theirs.features, torch.randn(2, 3, 64)).view(2, -1)


class Viewing(nn.Module):
    """Channel attention that needs its input as the unfused network gives it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.view(x.shape[0], x.shape[1], -1).mean(2).sigmoid()[..., None, None]


class ViewingConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(x.shape[0], -1).view(x.shape))


def convolution_of_its_own(features: Any) -> None:
    own = ViewingConv2d(3, 16, 7, 2, 3, bias=False)
    own.load_state_dict(features.conv0.state_dict())
    features.conv0 = own


def hook_on_the_convolution(features: Any) -> None:
    features.conv0.register_forward_hook(lambda module, inputs, out: out.view(-1).view(out.shape))
    features.conv0.register_forward_pre_hook(lambda module, inputs: (inputs[0].view(-1).view(inputs[0].shape),))


def hook_on_the_last_norm(features: Any) -> None:
    features.norm5.register_forward_hook(lambda module, inputs, out: out.view(-1).view(out.shape))
    features.norm5.register_forward_pre_hook(lambda module, inputs: (inputs[0].view(-1).view(inputs[0].shape),))


def attention_between(features: Any) -> None:
    features.norm5 = nn.Sequential(Viewing(), features.norm5)


def hook_inside_a_block(features: Any) -> None:
    norm = features.denseblock2.denselayer1.norm2
    norm.register_forward_hook(lambda module, inputs, out: out.view(-1).view(out.shape))


def hook_inside_a_transition(features: Any) -> None:
    features.transition1.norm.register_forward_hook(lambda module, inputs, out: out.view(-1).view(out.shape))


def hook_inside_the_stem(features: Any) -> None:
    features.relu0.register_forward_hook(lambda module, inputs, out: out.view(-1).view(out.shape))


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        convolution_of_its_own,
        hook_on_the_convolution,
        hook_on_the_last_norm,
        attention_between,
        hook_inside_a_block,
        hook_inside_a_transition,
        hook_inside_the_stem,
    ],
)
def test_what_views_its_input(change: Callable[[Any], None], fused_first: bool) -> None:
    theirs, ours = network(), network()
    ours.load_state_dict(theirs.state_dict())
    change(theirs.features)
    if fused_first:
        change(fuse(ours).features)
    else:
        change(ours.features)
        fuse(ours)
    x = torch.randn(SHAPES[2])
    for _ in range(2):
        assert_same_door(ours.features, theirs.features, x)


@pytest.mark.parametrize("noise", [lambda x: F.dropout(x, 0.5), F.dropout2d, torch.rand_like, torch.bernoulli])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_random_numbers_after_the_features(layout: str, noise: Callable[[Tensor], Tensor]) -> None:
    """Hit the same elements as after the unfused network: they are drawn in the order of memory."""
    theirs = network()
    ours, x, drawn = fuse(copy.deepcopy(theirs)), LAYOUTS[layout](torch.randn(SHAPES[2])), []
    for model in (ours, theirs):
        features = model.features(x).sigmoid()
        torch.manual_seed(2)
        drawn.append(noise(features))
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_inside_blocks(layout: str) -> None:
    """Of every layer, and with the same random numbers for what follows."""
    theirs = network(drop_rate=0.4)
    ours, x, results = fuse(copy.deepcopy(theirs)), LAYOUTS[layout](torch.randn(SHAPES[2])), []
    for model in (ours, theirs):
        torch.manual_seed(2)
        with strict():
            results.append(torch.cat([model.features(x), torch.rand(2, 1, 4, 4)], dim=1))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_dropout_between_fused_modules() -> None:
    theirs = network()
    for name in ("transition1", "denseblock2"):
        setattr(theirs.features, name, nn.Sequential(nn.Dropout(0.5), theirs.features.get_submodule(name)))
    ours, x, results = fuse(copy.deepcopy(theirs)), torch.randn(SHAPES[2]), []
    for model in (ours, theirs):
        torch.manual_seed(2)
        results.append(model.features(x))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_no_copy_between_fused_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the image and what leaves the network change their layout."""
    ours, x, copied = fuse(network()), torch.randn(SHAPES[2]), []
    contiguous = Tensor.contiguous

    def recorded(t: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        out = contiguous(t, memory_format=memory_format)
        if out is not t and t.dim() > 2:
            copied.append(tuple(t.shape))
        return out

    monkeypatch.setattr(Tensor, "contiguous", recorded)
    features = ours.features(x)
    assert copied == [tuple(x.shape), tuple(features.shape)]
    copied.clear()
    ours.features(x.to(memory_format=torch.channels_last))
    assert copied == []


def whole(network: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = network(x)
    return out


def one_by_one(network: nn.Module, x: Tensor) -> Tensor:
    for child in network.children():
        x = child(x)
    return x


@pytest.mark.parametrize("call", [whole, one_by_one])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["denseblock1", "transition1"])
def test_backward_hook_and_one_image(
    name: str, training: bool, register: str, call: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """As for a map of class activations: a norm of torch's reads a view of what the hooked module returned."""
    parts = OrderedDict[str, nn.Module](
        denseblock1=peers.DenseBlock(2, 8, 2, 4, 0.0), transition1=peers.Transition(16, 8), norm=nn.BatchNorm2d(8)
    )
    if name == "denseblock1":
        parts = OrderedDict(denseblock1=parts["denseblock1"], norm=nn.BatchNorm2d(16))
    theirs = nn.Sequential(parts).double().train(training)
    ours = fuse(copy.deepcopy(theirs))
    results = []
    for network in (ours, theirs):
        seen: list[Tensor] = []
        getattr(network.get_submodule(name), register)(
            lambda module, *gradients, seen=seen: seen.append(gradients[-1][0])
        )
        x = torch.ones(1, 8, 6, 6, dtype=torch.float64).cumsum(3).cumsum(1).sin().requires_grad_()
        call(network, x).contiguous().sin().sum().backward()
        named = {key: parameter.grad for key, parameter in network.named_parameters()}
        results.append({"seen": seen[0], "input": x.grad, **named})
    for key, expected in results[1].items():
        assert_largest(results[0][key], expected, "float64 whole block", key)
