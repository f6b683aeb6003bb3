"""DenseNet on fused blocks against torchvision's and the reference."""

import copy
from collections.abc import Callable

import peers
import pytest
import torch
from blocks import step
from networks import assert_same_step

import fused_densenet
from fused_densenet import DenseNet, reference


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


@pytest.mark.parametrize(
    ("depth", "growth_rate", "bottleneck", "millions"),
    [
        (40, 12, False, "1.0"),
        (100, 12, False, "7.0"),
        (100, 24, False, "27.2"),
        (100, 12, True, "0.8"),
        (250, 24, True, "15.3"),
        (190, 40, True, "25.6"),
    ],
)
def test_parameters_of_the_papers_cifar_networks(depth: int, growth_rate: int, bottleneck: bool, millions: str) -> None:
    """arXiv 1608.06993, table 2."""
    with torch.device("meta"):
        network = DenseNet(
            growth_rate,
            ((depth - 4) // (6 if bottleneck else 3),) * 3,
            2 * growth_rate if bottleneck else 16,
            4 if bottleneck else None,
            num_classes=10,
            compression=0.5 if bottleneck else 1.0,
            small_inputs=True,
        )
    assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}" == millions


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
    ours = DenseNet(4, (2, 3), 6, in_channels=2, num_classes=5, small_inputs=True).double()
    eager = copy.deepcopy(ours)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = step(eager, x)
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x).items()}
    assert_same_step(found, expected)
