"""``fuse`` and ``unfuse`` on torchvision's blocks, on networks built from them, and on what only looks like them."""

import copy
import io
import logging
import re
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from blocks import step
from networks import assert_same_step
from tolerances import assert_largest, assert_same
from torch import Tensor, nn

import fused_densenet
from fused_densenet import (
    FallbackError,
    FallbackWarning,
    FusedDenseBlock,
    FusedFeatures,
    FusedTransition,
    explain,
    fuse,
    strict,
    unfuse,
)

SIZE = (3, 8, 2, 4, 0.0)


def network(**options: Any) -> nn.Module:
    return peers.DenseNet(4, (2, 3), 8, 2, num_classes=5, **options).double()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def blocks(model: nn.Module) -> list[FusedDenseBlock]:
    return [m for m in model.modules() if isinstance(m, FusedDenseBlock)]


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return step(model, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_same_results(training: bool, drop_rate: float) -> None:
    theirs = network(drop_rate=drop_rate).train(training)
    ours = fuse(copy.deepcopy(theirs))
    x = images()
    with strict():
        assert_same_step(results(ours, x), results(theirs, x))


def test_identity_of_everything() -> None:
    model = network()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    assert fuse(model) is model
    assert len(blocks(model)) == 2
    assert all(a is b for a, b in zip(parameters.values(), model.parameters(), strict=True))
    assert all(module is model.get_submodule(name) for name, module in modules.items())
    assert list(model.state_dict()) == keys
    assert isinstance(blocks(model)[0], peers.DenseBlock)
    assert isinstance(model.features.transition1, FusedTransition) and isinstance(
        model.features.transition1, peers.Transition
    )
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not blocks(model)


def test_block_itself_and_twice() -> None:
    block = peers.DenseBlock(*SIZE)
    assert fuse(block) is block and isinstance(block, FusedDenseBlock)
    fused = type(block)
    assert type(fuse(block, strict=True)) is fused
    assert type(unfuse(unfuse(block))) is peers.DenseBlock


def test_own_blocks_stay() -> None:
    model = fused_densenet.DenseNet(4, (2, 2), 8)
    fuse(model, memory_efficient=True)
    assert [b.memory_efficient for b in blocks(model)] == [True, True]
    assert [type(b) for b in blocks(unfuse(model))] == [FusedDenseBlock] * 2


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("wanted", [True, False, None])
def test_memory_efficient(own: bool, wanted: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    block = fuse(peers.DenseBlock(*SIZE, own), memory_efficient=wanted)
    assert block.memory_efficient is (own if wanted is None else wanted)
    seen = []
    monkeypatch.setattr(
        fused_densenet.modules,
        "dense_block",
        lambda *args, **options: seen.append(options) or fused_densenet.dense_block(*args, **options),
    )
    block(torch.randn(2, 8, 4, 4))
    assert seen[0]["memory_efficient"] is block.memory_efficient
    for layer in block.children():
        layer.memory_efficient = not own
    assert block.memory_efficient is (not own if wanted is None else wanted)


def test_optimizer_made_before() -> None:
    theirs = network()
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (theirs, ours)]
    fuse(ours)
    x = images()
    for _ in range(3):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).logsumexp(1).sum().backward()
            optimizer.step()
    assert_same(ours.state_dict(), theirs.state_dict(), "float64 whole block")


def test_hooks_of_the_block() -> None:
    block, seen = peers.DenseBlock(*SIZE), []
    block.register_forward_hook(lambda module, inputs, output: seen.append("before"))
    fuse(block)
    block.register_forward_hook(lambda module, inputs, output: seen.append("after"))
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    with strict():
        block(torch.randn(2, 8, 4, 4, requires_grad=True)).sum().backward()
    unfuse(block)(torch.randn(2, 8, 4, 4))
    assert seen == ["before", "after", "backward", "before", "after"]


def test_hook_inside_runs_the_blocks_own_forward() -> None:
    theirs = peers.DenseBlock(*SIZE).double()
    ours = fuse(copy.deepcopy(theirs))
    x, seen = torch.randn(2, 8, 4, 4, dtype=torch.float64), []
    handle = ours["denselayer2"].conv1.register_forward_hook(lambda m, i, output: seen.append(output.shape))
    with pytest.warns(FallbackWarning, match=r"denselayer2\.conv1 has hooks"):
        assert torch.equal(ours(x), theirs(x))
    assert seen == [(2, 8, 4, 4)]
    handle.remove()
    with strict():
        ours(x)


def test_replaced_forward_inside_runs() -> None:
    block = fuse(peers.DenseBlock(*SIZE))
    conv = block["denselayer1"].conv2
    conv.forward = lambda x: torch.zeros(2, 4, 4, 4)
    with pytest.warns(FallbackWarning, match=r"denselayer1\.conv2 has a forward of its own"):
        assert not block(torch.randn(2, 8, 4, 4))[:, 8:12].any()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_fused_network(how: str) -> None:
    model = fuse(network(), memory_efficient=True)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert len(blocks(copied)) == 2 and all(b.memory_efficient for b in blocks(copied))
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    x = images()
    with strict():
        assert_same_step(results(copied, x), results(model, x))
    blocks(copied)[0].memory_efficient = False
    assert blocks(model)[0].memory_efficient
    assert type(unfuse(copied).features.denseblock1) is peers.DenseBlock


@pytest.mark.parametrize("direction", ["into fused", "from fused"])
def test_checkpoints(direction: str) -> None:
    plain, fused = network(), fuse(network())
    source, target = (plain, fused) if direction == "into fused" else (fused, plain)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = images()
    assert_largest(target.eval()(x), source.eval()(x), "float64 whole block", "output")


def _legacy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict as torchvision saved it before 0.2: ``norm.1`` for ``norm1``, no counters."""
    renamed = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): v for key, v in state.items()}
    return {key: value for key, value in renamed.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("kind", ["fused", "ours", "block"])
def test_legacy_keys(kind: str) -> None:
    source = network()
    target: Any = {
        "fused": lambda: fuse(network()),
        "ours": lambda: fused_densenet.DenseNet(4, (2, 3), 8, 2, num_classes=5),
        "block": lambda: FusedDenseBlock(2, 8, 2, 4),
    }[kind]()
    state = (source.features.denseblock1 if kind == "block" else source).state_dict()
    legacy = _legacy(state)
    before = dict(legacy)
    target.load_state_dict(legacy, strict=True)
    assert legacy == before
    for name, value in target.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name
    wrong = {key.replace("denselayer1", "denselayer9"): value for key, value in legacy.items()}
    with pytest.raises(RuntimeError, match=r"denselayer9\.norm\.1"):
        target.load_state_dict(wrong, strict=True)


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
    "doubled": (lambda: _Doubled(*SIZE), "_Doubled computes something else"),
    "doubled in training": (lambda: _DoubledInTraining(*SIZE), "computes something else"),
    "only new features": (lambda: _OnlyNew(*SIZE), "computes something else"),
    "failing": (lambda: _Failing(*SIZE), "could not be tried: OSError: no such file"),
    "parameter": (lambda: _changed(_parameter_of_its_own), "parameters or buffers of its own"),
    "forward": (lambda: _changed(_forward_of_its_own), "its forward was replaced"),
    "extra module": (lambda: _changed(_extra_module), r"denselayer2\.attention is no part"),
    "width": (lambda: _changed(_other_width), "denselayer2 reads 11 channels where there are 12"),
    "activation": (lambda: _changed(_activation), r"denselayer1\.relu2 is a SiLU"),
    "name only": (lambda: type("ResidualDenseBlock", (nn.Sequential,), {})(nn.ReLU()), "does not consist of"),
}


def _changed(change: Callable[[nn.Module], None]) -> nn.Module:
    block = peers.DenseBlock(*SIZE)
    change(block)
    return block


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_fused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = OTHERS[name]
    model = nn.ModuleDict({"good": peers.DenseBlock(*SIZE), "odd": make()})
    kind = type(model["odd"])
    with pytest.raises(FallbackError, match=f"odd: .*{reason}"):
        fuse(model, strict=True)
    assert not blocks(model)
    with caplog.at_level(logging.INFO, "fused_densenet"):
        fuse(model)
    assert isinstance(model["good"], FusedDenseBlock) and type(model["odd"]) is kind
    assert re.search(f"not fused: odd: .*{reason}", caplog.text)


def test_stem() -> None:
    """The sequence around the blocks; parts of it, and copies, are still one."""
    theirs = network()
    ours = fuse(copy.deepcopy(theirs))
    assert isinstance(ours.features, FusedFeatures) and type(ours.features[:4]).__name__ == "FusedFeatures"
    assert isinstance(copy.deepcopy(ours).features, FusedFeatures)
    x = images()
    with strict():
        assert_largest(ours.features[:4](x), theirs.features[:4](x), "float64 whole block", "stem")
    ours.features.relu0.register_forward_hook(lambda *_: None)
    with pytest.warns(FallbackWarning, match="relu0 has hooks"):
        ours.features(x)
    assert explain(ours, x).stems[0].reasons == ["relu0 has hooks"]
    assert type(unfuse(ours).features) is nn.Sequential


def test_sequence_without_dense_blocks_stays() -> None:
    model = nn.Sequential(peers.DenseBlock(*SIZE), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    assert type(fuse(model)) is nn.Sequential and type(model[1]) is nn.Sequential


class _Transition(nn.Sequential):
    """A transition as another package might write it; ``scale`` is what sets it apart."""

    def __init__(self, scale: float = 1, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm3d(6), nn.ReLU(inplace=True)
        self.conv = nn.Conv3d(6, 5, 1, bias=False)
        self.pool = pool or nn.AvgPool3d(2)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)


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
        (_Transition(scale=2), "the forward of _Transition computes something else than a FusedTransition"),
        (_Transition(pool=nn.MaxPool3d(2)), "pool is no average pooling of window and stride 2: MaxPool3d"),
    ],
)
def test_transition_that_cannot_be_fused(transition: nn.Module, reason: str) -> None:
    model = nn.ModuleList([transition])
    fuse(model, strict=True)  # which is about dense blocks
    assert type(model[0]) is _Transition
    (report,) = explain(model).transitions
    assert (report.name, report.fused) == ("0", False) and report.reasons[0].startswith(reason)


@pytest.mark.parametrize("patched", [peers.DenseBlock, peers.DenseLayer, peers.Transition])
def test_class_that_was_patched(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known class may not do what its package gave it to do."""
    whole = patched.forward
    monkeypatch.setattr(patched, "forward", lambda module, x: 2 * whole(module, x))
    explanation = explain(fuse(network()))
    for kind, reports in (("Block", explanation.blocks), ("Transition", explanation.transitions)):
        expected = kind in patched.__name__ or (kind, patched) == ("Block", peers.DenseLayer)
        assert all(("computes something else" in " ".join(r.reasons)) == expected for r in reports)
        assert all(report.fused != expected for report in reports)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_network() -> None:
    model = torch.jit.script(network().float().eval())
    with pytest.raises(FallbackError, match=r"denseblock1: it is scripted; fuse the network before"):
        fuse(model, strict=True)
    assert {r.reasons[0] for r in explain(fuse(model)).transitions} == {
        "it is scripted; fuse the network before torch.jit.script"
    }


def test_network_without_dense_blocks(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with caplog.at_level(logging.WARNING, "fused_densenet"):
        assert fuse(model, strict=True) is model
    assert "Sequential: no dense block was found" in caplog.text


def test_wrapped_network() -> None:
    """What holds a reference to a block, like a wrapper around the network, has the fused one."""
    model = network()
    held = model.features.denseblock1
    wrapped = nn.DataParallel(model)
    fuse(wrapped)
    assert isinstance(held, FusedDenseBlock) and held is wrapped.module.features.denseblock1
    assert len(blocks(torch.optim.swa_utils.AveragedModel(model))) == 2


def test_around_a_block_is_no_block() -> None:
    kind = type("DenseBlockWithTransition", (nn.Sequential,), {})
    model = kind(peers.DenseBlock(*SIZE), peers.Transition(20, 10))
    assert isinstance(fuse(model, strict=True)[0], FusedDenseBlock)


@pytest.mark.parametrize(("model", "setting"), [("network", None), (nn.ReLU, None), (None, "yes"), (None, 1)])
def test_bad_arguments(model: Any, setting: Any) -> None:
    name = "model" if setting is None else "memory_efficient"
    with pytest.raises(TypeError, match=rf"{name}: expected .*got"):
        fuse(nn.Sequential() if model is None else model, memory_efficient=setting)


def test_unfuse_of_a_class_changed_afterwards() -> None:
    block = fuse(peers.DenseBlock(*SIZE))
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(RuntimeError, match="expected the class that fuse gave it, got Sharded"):
        unfuse(nn.Sequential(block))


def test_moved_and_converted() -> None:
    model = fuse(network().float()).to(memory_format=torch.channels_last).half().eval()
    with strict():
        assert model.features(images().half()).dtype == torch.float16
    assert next(model.to("meta").parameters()).device.type == "meta"
