"""``fuse`` and ``unfuse`` on torchvision's blocks and on networks built from them."""

import contextlib
import copy
import importlib
import io
import re
from typing import Any

import peers
import pytest
import torch
from networks import assert_same_step
from small_networks import SIZE, blocks, images, network, results
from tolerances import assert_largest, assert_same
from torch import Tensor, nn

import fused_densenet
from fused_densenet import (
    FallbackWarning,
    FusedDenseBlock,
    FusedFeatures,
    FusedTransition,
    explain,
    fuse,
    strict,
    unfuse,
)
from fused_densenet.ops.block import run_block


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
        fused_densenet.nn.block,
        "run_block",
        lambda *args: seen.append(args[3]) or run_block(*args),
    )
    block(torch.randn(2, 8, 4, 4))
    assert seen == [block.memory_efficient]
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


def allowed(file: io.BytesIO) -> Any:
    """Lets ``torch.load(weights_only=True)`` read a file, as torch's error tells its users to."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    places = [name.rpartition(".") for name in names]
    return torch.serialization.safe_globals([getattr(importlib.import_module(m), name) for m, _, name in places])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "weights only"])
def test_copies_of_a_fused_network(how: str) -> None:
    model = fuse(network(), memory_efficient=True)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        safely = how == "weights only"
        with allowed(file) if safely else contextlib.nullcontext():
            copied = torch.load(file, weights_only=safely)
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


def test_wrapped_network() -> None:
    """What holds a reference to a block, like a wrapper around the network, has the fused one."""
    model = network()
    held = model.features.denseblock1
    wrapped = nn.DataParallel(model)
    fuse(wrapped)
    assert isinstance(held, FusedDenseBlock) and held is wrapped.module.features.denseblock1
    assert len(blocks(torch.optim.swa_utils.AveragedModel(model))) == 2


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
