"""DenseNet on fused blocks against torchvision's and the reference."""

import copy
import pathlib
import pickle
import re
from collections.abc import Callable

import peers
import pytest
import torch
from blocks import step
from networks import assert_same_step

import fused_densenet
from fused_densenet import DenseNet, reference
from fused_densenet.nn import densenet as models


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (fused_densenet.densenet121, 7_978_856),
        (fused_densenet.densenet161, 28_681_000),
        (fused_densenet.densenet169, 14_149_480),
        (fused_densenet.densenet201, 20_013_928),
        (fused_densenet.densenet264, 33_337_704),
    ],
)
def test_parameters_to_the_last_digit(build: Callable[..., DenseNet], parameters: int) -> None:
    """torchvision's counts; it has no 264."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == parameters


CIFAR = [
    (fused_densenet.densenet_cifar, 40, 12, 1_019_722, "1.0"),
    (fused_densenet.densenet_cifar, 100, 12, 6_979_642, "7.0"),
    (fused_densenet.densenet_cifar, 100, 24, 27_249_082, "27.2"),
    (fused_densenet.densenet_bc, 100, 12, 769_162, "0.8"),
    (fused_densenet.densenet_bc, 250, 24, 15_324_406, "15.3"),
    (fused_densenet.densenet_bc, 190, 40, 25_624_430, "25.6"),
]


@pytest.mark.parametrize(("build", "depth", "growth_rate", "parameters", "millions"), CIFAR)
def test_parameters_of_the_papers_cifar_networks(
    build: Callable[..., DenseNet], depth: int, growth_rate: int, parameters: int, millions: str
) -> None:
    """arXiv 1608.06993, table 2; torchvision's network has another stem: a 7x7 convolution and a norm."""
    per_layer = 6 if build is fused_densenet.densenet_bc else 3
    with torch.device("meta"):
        network = build(depth, growth_rate)
        width = network.features.conv0.weight.shape[0]
        count = sum(p.numel() for p in network.parameters())
        if per_layer == 6:
            theirs = peers.DenseNet(growth_rate, ((depth - 4) // 6,) * 3, width, 4, num_classes=10)
            assert count == sum(p.numel() for p in theirs.parameters()) - width * (3 * (7 * 7 - 3 * 3) + 2)
    assert f"{count / 1e6:.1f}" == millions
    assert count == parameters
    assert width == (2 * growth_rate if per_layer == 6 else 16)
    assert len([m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]) == depth


@pytest.mark.parametrize("depth", [4, 41, 100.0])
def test_depths_that_no_network_has(depth: int) -> None:
    for build in (fused_densenet.densenet_bc, fused_densenet.densenet_cifar):
        with pytest.raises((ValueError, TypeError), match="depth: expected"):
            build(depth, 12)


def test_same_seed_same_network_as_torchvision() -> None:
    torch.manual_seed(3)
    theirs = peers.DenseNet(8, (2, 3, 2), 16, 4, num_classes=7)
    torch.manual_seed(3)
    ours = DenseNet(8, (2, 3, 2), 16, 4, num_classes=7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_densenet121_has_torchvisions_keys() -> None:
    with torch.device("meta"):
        ours, theirs = fused_densenet.densenet121().state_dict(), peers.densenet121().state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert len(ours) == 727


SMALL = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8}


@pytest.fixture
def small_121(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Makes densenet121 a small network; a state dict for it, of torchvision's."""
    monkeypatch.setitem(models.CONFIGURATIONS, "121", SMALL)
    return peers.DenseNet(**SMALL, num_classes=7).state_dict()


@pytest.mark.parametrize("form", ["state dict", "checkpoint", "DistributedDataParallel's", "torchvision's first keys"])
def test_weights_from_a_file(form: str, tmp_path: pathlib.Path, small_121: dict[str, torch.Tensor]) -> None:
    first_keys = {
        re.sub(r"(norm|conv)(\d\.)", r"\1.\2", k) if "denselayer" in k else k: v for k, v in small_121.items()
    }
    assert first_keys.keys() != small_121.keys()
    held = {
        "state dict": small_121,
        "checkpoint": {"epoch": 3, "state_dict": small_121, "optimizer": {"state": {}}},
        "DistributedDataParallel's": {"model": {f"module.{key}": value for key, value in small_121.items()}},
        "torchvision's first keys": first_keys,
    }[form]
    torch.save(held, tmp_path / "weights.pth")
    network = fused_densenet.densenet121(weights=tmp_path / "weights.pth")
    assert network.state_dict().keys() == small_121.keys()
    assert all(torch.equal(network.state_dict()[key], value) for key, value in small_121.items())
    with pytest.raises(ValueError, match="num_classes: expected 7, as the weights have, got 8"):
        fused_densenet.densenet121(weights=str(tmp_path / "weights.pth"), num_classes=8)


def test_weights_of_torchvisions_enum(monkeypatch: pytest.MonkeyPatch, small_121: dict[str, torch.Tensor]) -> None:
    enum = peers.DenseNet121_Weights
    asked = []
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **keywords: asked.append(keywords) or small_121)
    network = fused_densenet.densenet121(weights=enum.DEFAULT, progress=False)
    assert asked == [{"progress": False, "check_hash": True}]
    assert torch.equal(network.classifier.weight, small_121["classifier.weight"])
    with pytest.raises(TypeError, match="weights: expected a path or a member of torchvision's DenseNet169_Weights"):
        fused_densenet.densenet169(weights=enum.DEFAULT)


def test_files_that_are_no_weights(tmp_path: pathlib.Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="weights: expected a state dict"):
        fused_densenet.densenet121(weights=tmp_path / "list.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        fused_densenet.densenet121(weights=tmp_path / "module.pth")
    with pytest.raises(TypeError, match="weights: expected a path"):
        fused_densenet.densenet121(weights=True)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_step_equals_torchvisions(memory_efficient: bool) -> None:
    theirs = peers.DenseNet(8, (2, 3, 2), 16, 4, 0.2, 7).double()
    ours = DenseNet(8, (2, 3, 2), 16, 4, 0.2, 7, memory_efficient).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 3, 64, 48, dtype=torch.float64)
    torch.manual_seed(1)
    expected = step(theirs, x, steps=2)
    torch.manual_seed(1)
    assert_same_step(step(ours, x, steps=2), expected)


@pytest.mark.parametrize("small_inputs", [False, True])
@pytest.mark.parametrize("bn_size", [None, 4])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_step_equals_references(spatial_dims: int, bn_size: int | None, small_inputs: bool) -> None:
    shape = {
        "growth_rate": 4,
        "block_config": (2, 3),
        "num_init_features": 6,
        "bn_size": bn_size,
        "compression": 0.7,
        "in_channels": 2,
        "num_classes": 5,
        "small_inputs": small_inputs,
        "spatial_dims": spatial_dims,
    }
    ours, theirs = DenseNet(**shape), reference.DenseNet(**shape)  # type: ignore[arg-type]
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, *[16] * spatial_dims, dtype=torch.float64)
    assert_same_step(step(ours.double(), x), step(theirs.double(), x))
    assert_same_step(step(ours.eval(), x), step(theirs.eval(), x))


def test_compile_without_graph_breaks() -> None:
    ours = DenseNet(4, (2, 3), 6, in_channels=2, num_classes=5).double()
    eager = copy.deepcopy(ours)
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = step(eager, x)
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x).items()}
    assert_same_step(found, expected)
