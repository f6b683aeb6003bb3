"""The specification itself: against torchvision's DenseNet, and against autograd by finite differences."""

import peers
import pytest
import torch
from tolerances import assert_same
from torch import Tensor, nn

from fused_densenet import reference


def _results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    assert x.grad is not None
    grads = {f"{n}.grad": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x.grad": x.grad, **grads, **dict(module.named_buffers())}


@pytest.mark.parametrize("training", [True, False])
def test_dense_block_is_torchvisions(training: bool) -> None:
    theirs = peers.DenseBlock(3, 8, 4, 6, 0.0).double().train(training)
    ours = reference.DenseBlock(3, 8, 4, 6).double().train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    assert_same(_results(ours, x), _results(theirs, x), "float64 whole block")


def test_transition_is_torchvisions() -> None:
    theirs = peers.Transition(12, 6).double()
    ours = reference.Transition(12, 6).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 12, 8, 6, dtype=torch.float64)
    assert_same(_results(ours, x), _results(theirs, x), "float64 whole block")


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_densenet_is_torchvisions(drop_rate: float) -> None:
    size = {"growth_rate": 8, "block_config": (2, 3), "num_init_features": 12, "num_classes": 5}
    theirs = peers.DenseNet(**size, drop_rate=drop_rate).double()
    ours = reference.DenseNet(**size, drop_rate=drop_rate).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.manual_seed(3)
    expected = _results(theirs, x)
    torch.manual_seed(3)
    assert_same(_results(ours, x), expected, "float64 whole block")


def test_densenet121_has_its_parameters() -> None:
    with torch.device("meta"):
        model = reference.DenseNet()
        assert model.state_dict().keys() == peers.densenet121().state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == 7_978_856


def test_densenet_bc_100_12_has_its_parameters() -> None:
    with torch.device("meta"):
        bc = reference.DenseNet(12, (16, 16, 16), 24, num_classes=10, small_inputs=True)
        plain = reference.DenseNet(12, (12, 12, 12), 16, None, 1.0, num_classes=10, small_inputs=True)
    millions = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (bc, plain)]
    assert [round(m, 1) for m in millions] == [0.8, 1.0]  # the paper's table 2


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("bn_size", [2, None])
def test_gradient_is_the_difference_quotient(spatial_dims: int, bn_size: int | None) -> None:
    block = reference.DenseBlock(2, 3, bn_size, 2, spatial_dims=spatial_dims).double()
    x = torch.randn(2, 3, *(3, 4, 2)[:spatial_dims], dtype=torch.float64, requires_grad=True)
    assert block(x).shape == (2, 7, *x.shape[2:])
    assert torch.autograd.gradcheck(block, (x,))


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_densenet_of_every_dimension(spatial_dims: int) -> None:
    model = reference.DenseNet(4, (2, 2), 8, in_channels=1, num_classes=3, small_inputs=True, spatial_dims=spatial_dims)
    assert model(torch.randn(2, 1, *[8] * spatial_dims)).shape == (2, 3)
