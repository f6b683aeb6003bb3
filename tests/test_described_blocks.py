"""A block whose parts stand anywhere is a fused one like any other: copied, pickled, compiled, changed afterwards."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import step
from networks import assert_same_step
from rebuilt_networks import (
    GROWTH,
    OfListTaking,
    OneActivation,
    PooledPreConv,
    Unit,
    bamos,
    bearpaw,
    conv,
    gpleiss,
    hysts,
    mmpretrain,
    pytorchcv,
)
from small_networks import blocks, results
from tolerances import assert_largest, assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_densenet
from fused_densenet import FallbackWarning, FusedDenseBlock, FusedTransition, explain, fuse, reference, strict, unfuse
from fused_densenet.ops.block import run_block


def images() -> Tensor:
    return torch.randn(3, 3, 12, 14, dtype=torch.float64)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str) -> None:
    model = fuse(pytorchcv(0.3).double(), memory_efficient=True)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert len(blocks(copied)) == 2 and all(block.memory_efficient for block in blocks(copied))
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    x = images()
    with strict():
        assert_same_step(results(copied, x), results(model, x))
    assert type(unfuse(copied).stages[0]) is nn.Sequential


@pytest.mark.parametrize("build", [bamos, pytorchcv, mmpretrain, lambda: hysts(0.0)])
def test_compiled(build: Callable[[], nn.Module]) -> None:
    model = fuse(build().double())
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = images()
    assert_same_step(
        {name.removeprefix("_orig_mod."): value for name, value in results(compiled, x).items()}, results(model, x)
    )


def test_exported() -> None:
    model = fuse(bamos().double()).eval()
    program = torch.export.export(model, (images(),))
    assert [str(node.target) for node in program.graph.nodes].count("fused_densenet.dense_block.default") == 2
    x = images()
    assert_largest(program.module()(x), model(x), "float64 whole block", "output")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_by_torch_fx() -> None:
    graph = torch.fx.symbolic_trace(fuse(bamos())).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_module"][:4] == [
        *("first", "stages.0", "stages.1", "stages.2")
    ]


def _activation(model: Any) -> None:
    model.stages[0][1].relu = nn.SiLU()


def _class_of_a_layer(model: Any) -> None:
    model.stages[0][1].__class__ = type("Other", (OneActivation,), {})


def _hook(model: Any) -> None:
    model.stages[0][1].bn1.register_forward_hook(lambda module, inputs, output: 2 * output)


def _hook_of_a_layer(model: Any) -> None:
    model.stages[0][1].register_forward_hook(lambda module, inputs, output: 2 * output)


def _rate(model: Any) -> None:
    model.stages[0][1].dropRate = 0.9


def _layer_more(model: Any) -> None:
    model.stages[0].append(nn.Identity())


def _layer_less(model: Any) -> None:
    model.stages[0][2] = nn.Sequential(conv(16, 20, 1).double())


def _weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model.stages[0][1].conv1)


def _forward(model: Any) -> None:
    layer = model.stages[0][1]
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


def _stride(model: Any) -> None:
    model.stages[0][1].conv2.dilation, model.stages[0][1].conv2.padding = (2, 2), (2, 2)


def _width(model: Any) -> None:
    """As structural pruning leaves it: the first layer adds fewer features, the next ones read fewer."""
    stage, keep = model.stages[0], [i for i in range(20) if i != 9]
    stage[0].conv2 = conv(8, 3, 3).double()
    for layer, kept in ((stage[1], keep[:11]), (stage[2], keep[:15])):
        layer.bn1 = nn.BatchNorm2d(len(kept)).double()
        layer.conv1 = conv(len(kept), 8, 1).double()
    model.stages[1].bn1, model.stages[1].conv1 = nn.BatchNorm2d(19).double(), conv(19, 10, 1).double()


CHANGES: dict[str, tuple[Callable[[Any], None], str | None]] = {
    "activation": (_activation, r"1\.relu is a SiLU"),
    "class of a layer": (_class_of_a_layer, "1 is a Other"),
    "hook": (_hook, r"1\.bn1 has hooks"),
    "hook of a layer": (_hook_of_a_layer, "1 has hooks"),
    "rate": (_rate, "1 has another dropRate than when fuse was called"),
    "layer more": (_layer_more, "it has other modules inside than when fuse was called"),
    "layer less": (_layer_less, "2 is a Sequential"),
    "parametrization": (_weight_norm, r"1\.conv1 is a ParametrizedConv2d"),
    "forward": (_forward, "1 has a forward of its own"),
    "dilation": (_stride, r"1\.conv2 is grouped, strided or dilated"),
    "width": (_width, None),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_after_fuse(name: str, called: bool) -> None:
    """It does what the unfused one does, and says why it is slower where it is."""
    change, reason = CHANGES[name]
    theirs, x = bearpaw().double(), images()
    ours = fuse(copy.deepcopy(theirs))
    for model in (theirs, ours):
        if called:
            results(model, x)
        torch.manual_seed(2)
        change(model)
    if reason is None:
        with strict():
            actual = results(ours, x)
    else:
        with pytest.warns(FallbackWarning, match=reason):
            actual = results(ours, x)
    assert_same_step(actual, results(theirs, x))


class Scaling(nn.Module):
    """A block with a setting that its own ``forward`` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PreConv(8 + i * GROWTH) for i in range(2))
        self.factor = 1

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new if self.factor == 1 else self.factor * new], 1)
        return x


class PreConv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), conv(width, GROWTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.relu(self.norm(x)))
        return out


def test_setting_of_the_block_changed_after_a_call() -> None:
    theirs: Any = nn.Sequential(conv(3, 8, 3), Scaling()).double()
    ours, x = fuse(copy.deepcopy(theirs), strict=True), images()
    for model in (theirs, ours):
        results(model, x)
        model[1].factor = 2
    with pytest.warns(FallbackWarning, match="it has another factor than when fuse was called"):
        actual = results(ours, x)
    assert_same_step(actual, results(theirs, x))


def test_synchronised_norms() -> None:
    """Norms may be exchanged for norms: in eval mode SyncBatchNorm runs on the CPU."""
    model = fuse(bamos().double()).eval()
    x = images()
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with strict():
        assert_largest(converted(x), expected, "float64 whole block", "output")
    unfused = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(bamos().double()), strict=True)
    assert len(blocks(unfused)) == 2


def test_norms_in_different_modes() -> None:
    theirs = bamos().double()
    for module in theirs.stages[0][1].modules():
        module.eval()
    ours = fuse(copy.deepcopy(theirs), strict=True)
    x = images()
    with strict():
        assert_same_step(results(ours, x), results(theirs, x))


@pytest.mark.parametrize("efficient", [True, False])
def test_efficient_keeps_its_meaning(efficient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = gpleiss(False).double()  # which updates its running statistics once
    model = gpleiss(efficient).double()
    model.load_state_dict(theirs.state_dict())
    fuse(model, strict=True)
    assert [block.memory_efficient for block in blocks(model)] == [efficient] * 2
    seen = []
    monkeypatch.setattr(
        fused_densenet.nn.block,
        "run_block",
        lambda *args: seen.append(args[3]) or run_block(*args),
    )
    x = images()
    with strict():
        actual = results(model, x)
    assert seen == [efficient] * 2
    assert_same_step(actual, results(theirs, x))
    for module in model.modules():
        if hasattr(module, "efficient"):
            module.efficient = not efficient
    assert [block.memory_efficient for block in blocks(model)] == [not efficient] * 2


def test_rate_of_a_dropout_module() -> None:
    """It is read when it is needed, and those of all layers have to agree."""
    theirs = pytorchcv(0.3).double()
    ours = fuse(copy.deepcopy(theirs))
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.6
    x = images()
    with strict():
        assert_same_step(results(ours, x), results(theirs, x))
    ours.stages[0].unit1.dropout.eval()
    (first, _) = explain(ours).blocks
    assert first.reasons == ["layer 2 differs from layer 1 in its dropout"]


class DroppingTransition(nn.Module):
    """A dropout between the convolution and the pooling."""

    def __init__(self, dropout: nn.Module, dims: int) -> None:
        super().__init__()
        kinds = {2: (nn.BatchNorm2d, nn.Conv2d, nn.AvgPool2d), 3: (nn.BatchNorm3d, nn.Conv3d, nn.AvgPool3d)}
        norm, convolution, pool = kinds[dims]
        self.bn, self.squeeze, self.drop, self.down = norm(6), convolution(6, 4, 1), dropout, pool(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.squeeze(torch.relu(self.bn(x)))))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "volume"])
@pytest.mark.parametrize(
    "kinds", [{2: nn.Dropout, 3: nn.Dropout}, {2: nn.Dropout2d, 3: nn.Dropout3d}], ids=["values", "maps"]
)
def test_transition_with_a_dropout(kinds: dict[int, Any], layout: str) -> None:
    """It drops what the unfused one drops, at the rate and in the mode that it has at the time."""
    dims = 3 if layout == "volume" else 2
    block = reference.DenseBlock(1, 2, None, 4, spatial_dims=dims)
    theirs = nn.Sequential(block, DroppingTransition(kinds[dims](0.4), dims)).double()
    ours = fuse(copy.deepcopy(theirs), strict=True)
    assert isinstance(ours[1], FusedTransition)
    x = torch.randn(3, 2, *(6, 5, 4)[-dims:], dtype=torch.float64)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    for training, dropping, rate in ((True, True, 0.4), (False, False, 0.4), (False, True, 0.7), (True, True, 0.0)):
        found = []
        for model in (ours, theirs):
            model.train(training)[1].drop.train(dropping).p = rate
            torch.manual_seed(2)
            with strict():
                found.append((*step(model, x).items(), ("numbers", torch.get_rng_state())))
        actual, expected = map(dict, found)
        assert torch.equal(actual.pop("numbers"), expected.pop("numbers"))
        assert_same(actual, expected, "float64 whole block")


def test_layers_by_themselves() -> None:
    """Layers that a network calls one after the other without a module around them are blocks of one layer each."""
    theirs = nn.ModuleList([Unit(8), Unit(8 + GROWTH)]).double()
    ours = fuse(copy.deepcopy(theirs), strict=True)
    assert len(blocks(ours)) == 2
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    with strict():
        assert_largest(ours[1](ours[0](x)), theirs[1](theirs[0](x)), "float64 whole block", "output")


def test_pooling_replaced_by_another() -> None:
    theirs = pytorchcv().double()
    ours = fuse(copy.deepcopy(theirs))
    transition = ours.stages[1].trans2
    assert isinstance(transition, FusedTransition)
    for model in (theirs, ours):
        model.stages[1].trans2.pool = nn.MaxPool2d(2)
    x = images()
    with pytest.warns(FallbackWarning, match="pool is a MaxPool2d"):
        assert_same_step(results(ours, x), results(theirs, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_wrapped_block() -> None:
    """What only passes on to a module inside is not what is replaced."""
    for wrap in (nn.DataParallel, torch.optim.swa_utils.AveragedModel, nn.Sequential, torch.compile):
        wrapped = fuse(wrap(OfListTaking(2, 8)), strict=True)
        assert [type(m).__name__ for m in wrapped.modules() if isinstance(m, FusedDenseBlock)] == ["FusedDenseBlock"]
        assert not isinstance(wrapped, FusedDenseBlock)


def test_transition_in_a_stage_that_is_left() -> None:
    stage = nn.Sequential(PooledPreConv(16, 8), Unit(8), Unit(12))
    stage[2].conv2.bn = nn.GroupNorm(2, 2 * GROWTH)
    with pytest.warns(FallbackWarning, match="not every dense block can be fused: 0: 2.conv2.bn is a GroupNorm"):
        model = fuse(nn.ModuleList([stage]))
    assert isinstance(model[0][0], FusedTransition) and not blocks(model)
    (report,) = explain(model).blocks
    assert report.reasons == ["2.conv2.bn is a GroupNorm"]
