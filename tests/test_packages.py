"""``fuse`` on DenseNet-121 of the packages that people have it from: the network is the same one, only faster."""

import copy
import io
import re
from typing import Any

import pytest
import torch
from blocks import step
from networks import assert_same_step
from packages import PACKAGES, build, dense_blocks, images, monai_densenet, segmentation_models_pytorch, timm
from tolerances import assert_largest
from torch import nn

from fused_densenet import FallbackWarning, FusedDenseBlock, FusedFeatures, explain, fuse, strict, unfuse

each_package = pytest.mark.parametrize("name", PACKAGES)


@each_package
def test_one_step(name: str) -> None:
    """Outputs, gradients and running statistics, in training and then in eval mode; and back again."""
    theirs, ours, x = build(name), build(name), images(name)
    keys = list(theirs.state_dict())
    assert fuse(ours, strict=True) is ours
    assert all(isinstance(block, FusedDenseBlock) for block in dense_blocks(ours, name))
    transitions = {type(m).__name__ for n, m in ours.named_modules() if re.search(r"transition\d$", n)}
    assert transitions == {"_Transition" if name.startswith("segmentation") else "FusedTransition"}
    assert isinstance(ours.get_submodule(PACKAGES[name].prefix[:-1]), FusedFeatures) != name.startswith("segmentation")
    with strict():
        assert_same_step(step(ours, x), step(theirs, x))
        assert_largest(ours.eval()(x), theirs.eval()(x), "float64 whole block", "output in eval mode")
    assert list(ours.state_dict()) == keys
    assert [type(m) for m in unfuse(ours).modules()] == [type(m) for m in theirs.modules()]
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))


@each_package
def test_checkpoints(name: str) -> None:
    """A checkpoint of either loads into the other, and both are the same file but for the values."""
    plain, fused, x = build(name).eval(), fuse(build(name)).eval(), images(name)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.01
    for source, target in ((plain, fused), (fused, build(name).eval())):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert list(state) == list(target.state_dict()) == list(plain.state_dict())
        target.load_state_dict(state, strict=True)
        with strict():
            assert_largest(target(x), plain(x), "float64 whole block", "output")


def test_monais_legacy_keys() -> None:
    """torchvision's published file, loaded into MONAI's network as MONAI's own loader renames it."""
    model = fuse(build("monai"))
    state = model.state_dict()
    legacy = {
        re.sub(r"(denselayer\d+)\.layers\.(norm|conv)([12])", r"\1.\2.\3", key): value + 1
        for key, value in state.items()
    }
    assert len(legacy.keys() - state.keys()) == 58 * 12
    model.load_state_dict(legacy)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), legacy.values(), strict=True))


@pytest.mark.parametrize(("dims", "shape"), [(1, (2, 2, 64)), (2, (2, 2, 64, 64)), (3, (1, 2, 32, 32, 32))])
def test_monais_dropout(dims: int, shape: tuple[int, ...]) -> None:
    """It drops single values in one dimension and whole feature maps in two and three."""
    torch.manual_seed(0)
    theirs = monai_densenet.DenseNet(dims, 2, 3, 8, 4, (2, 3), 2, dropout_prob=0.4).double()
    ours = fuse(copy.deepcopy(theirs), strict=True)
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    with strict():
        for model in (ours, theirs):
            torch.manual_seed(3)
            results.append(step(model, x))
    assert_same_step(*results)
    dropped = ours.features.denseblock1(torch.randn(2, 8, *shape[2:], dtype=torch.float64))[:, 8:]
    assert (dropped == 0).any()
    assert (dropped == 0).flatten(2).all(2).any() == (dims > 1)


@pytest.mark.filterwarnings("ignore:not every dense block:fused_densenet.FallbackWarning")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": "instance"}, "denselayer1.layers.norm1 is a InstanceNorm2d"),
        ({"norm": ("group", {"num_groups": 4})}, "norm2 is a GroupNorm"),
        ({"act": "prelu"}, "relu1 is a PReLU"),
        ({"act": ("relu", {"inplace": False})}, None),
    ],
)
def test_monais_norms_and_activations(options: dict[str, Any], reason: str | None) -> None:
    model = fuse(monai_densenet.DenseNet(2, 2, 3, 8, 4, (2, 3), 2, **options))
    blocks = explain(model).blocks
    assert [block.fused for block in blocks] == [reason is None] * 2
    if reason is not None:
        assert all(reason.removeprefix("denselayer1.layers.") in "; ".join(block.reasons) for block in blocks)
        assert not any(isinstance(m, FusedDenseBlock) for m in model.modules())


@pytest.mark.parametrize("architecture", ["densenet121", "densenetblur121d", "densenet161", "densenet264d"])
def test_timms_architectures(architecture: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(architecture)
        assert all(block.fused for block in explain(fuse(model, strict=True)).blocks)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.filterwarnings("ignore:not every dense block:fused_densenet.FallbackWarning")
def test_timms_own_switches() -> None:
    model = fuse(timm.create_model("densenet121", act_layer="relu", proj_drop_rate=0.1))
    blocks = dense_blocks(model, "timm")
    assert not any(block.memory_efficient for block in blocks)
    model.set_grad_checkpointing()
    assert all(block.memory_efficient for block in blocks)
    x = torch.randn(2, 3, 64, 64)
    with strict(), torch.no_grad():
        features = model.eval().forward_intermediates(x, intermediates_only=True)
        expected = unfuse(model).forward_intermediates(x, intermediates_only=True)
    for ours, theirs in zip(features, expected, strict=True):
        assert_largest(ours, theirs, "float32 whole block", "feature map")
    other = fuse(timm.create_model("densenet121", act_layer="silu"))
    assert explain(other).blocks[0].reasons[0] == "denselayer1.relu1 is a SiLU"


def test_timms_activation_dropped_by_torch() -> None:
    """torch's conversion to SyncBatchNorm loses timm's activation: what is left runs, and is not taken for a ReLU."""
    model = fuse(timm.create_model("densenet121"))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    x = torch.randn(1, 3, 64, 64)
    with pytest.warns(FallbackWarning, match=r"norm1? is followed by no activation"):
        out = model(x)
    assert torch.equal(out, unfuse(model)(x))
    kept = timm.layers.convert_sync_batchnorm(fuse(timm.create_model("densenet121"))).eval()
    with strict():
        kept(x)


@pytest.mark.parametrize("fused_first", [False, True])
def test_torchxrayvisions_pickled_modules(fused_first: bool) -> None:
    """Its weights are published as whole pickled networks; a fused one can be pickled as well."""
    model = build("torchxrayvision").eval()
    x = images("torchxrayvision")
    expected = model(x)
    file = io.BytesIO()
    torch.save(fuse(model) if fused_first else model, file)
    file.seek(0)
    loaded = fuse(torch.load(file, weights_only=False))
    assert all(isinstance(block, FusedDenseBlock) for block in dense_blocks(loaded, "torchxrayvision"))
    assert_largest(loaded(x), expected, "float64 whole block", "output")
    assert type(loaded.features.denseblock1).__mro__[1].__module__ == "torchxrayvision.models"


def test_segmentation_networks() -> None:
    """An encoder calls its transitions' parts one by one, so only blocks are replaced."""
    torch.manual_seed(0)
    model = segmentation_models_pytorch.Unet("densenet121", encoder_weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    with strict(), torch.no_grad():
        expected = model(x)
        assert_largest(fuse(model, strict=True)(x), expected, "float32 whole block", "mask")
        names = [f"encoder.features.denseblock{i}" for i in (1, 2, 3, 4)]
        explanation = explain(model, x)
    assert [(block.name, block.fused) for block in explanation.blocks] == [(name, True) for name in names]
    assert [report.reasons for report in explanation.transitions] == [["its owner calls its parts one by one"]] * 3
    assert [report.fused for report in explanation.stems] == [False]
