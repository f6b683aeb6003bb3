"""What the rest of torch does around a block: checkpointing, saved-tensor hooks, higher orders, replicas, odd modules."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_densenet import FallbackWarning, FusedDenseBlock, reference

SIZE = (2, 6, 2, 4)  # layers, features, bn_size, growth_rate


def twins(*, training: bool = True) -> tuple[FusedDenseBlock, reference.DenseBlock]:
    """A block and the reference with the same float64 parameters, all away from ReLU's kink."""
    ours, theirs = FusedDenseBlock(*SIZE).double(), reference.DenseBlock(*SIZE).double()
    for key, value in theirs.state_dict().items():
        if "norm" in key and value.dtype == torch.float64:
            value.uniform_(0.3, 1.0)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


def images() -> Tensor:
    return torch.randn(3, SIZE[1], 5, 4, dtype=torch.float64, requires_grad=True)


def gradients(call: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(x).square().sum(), [x, *block.parameters()]))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_checkpoint(use_reentrant: bool, memory_efficient: bool) -> None:
    block, _ = twins()
    block.memory_efficient = memory_efficient
    x = images()
    expected = gradients(block, block, x)
    call = x.clone()
    checkpoint(block, call, use_reentrant=use_reentrant).square().sum().backward()
    actual = [x.grad, *(p.grad for p in block.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True) if a is not None)
    assert all(a is not None for a in actual)


@pytest.mark.parametrize("pack", [lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t.clone()])
def test_saved_tensor_hooks(pack: Callable[[Tensor], Tensor]) -> None:
    block, _ = twins()
    x = images()
    expected = gradients(block, block, x)
    unpacked: list[int] = []

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        actual = gradients(block, block, x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(unpacked) == len(set(unpacked))


class _Norm(nn.BatchNorm2d):
    """Of elementary operators: torch's batch_norm is differentiable twice only, from torch 2.15 on."""

    def forward(self, input: Tensor) -> Tensor:
        pixels = input.transpose(0, 1).flatten(1)
        mean, var = pixels.mean(1), pixels.var(1, correction=0)
        if not self.training:
            assert self.running_mean is not None and self.running_var is not None
            mean, var = self.running_mean, self.running_var
        normed = (input.movedim(1, -1) - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias
        return normed.movedim(-1, 1)


@pytest.mark.parametrize("training", [True, False])
def test_third_order(training: bool) -> None:
    ours, theirs = twins(training=training)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = _Norm
    x = images()

    def third(block: nn.Module) -> Tensor:
        inputs = [x, *block.parameters()]
        value = block(x).sin().sum()
        for _ in range(2):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((g.square().sum() for g in grads), torch.zeros((), dtype=torch.float64))
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, inputs)])

    actual, expected = third(ours), third(theirs)
    assert (actual - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_image_in_eval(value: float) -> None:
    block, _ = twins(training=False)
    x = images()
    with torch.no_grad():
        x[1, 0, 2, 2] = value
    out = block(x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out[[0, 2]].isfinite().all()
    assert grad[[0, 2]].isfinite().all()


def test_replica() -> None:
    """DataParallel's copies hold plain tensors where the module holds parameters."""
    block, _ = twins()
    replica = copy.deepcopy(block)
    for module in replica.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            setattr(module, name, None if parameter is None else parameter.detach().clone())
    assert not list(replica.parameters())
    x = images()
    assert torch.equal(replica(x), block(x))


def norm_without_weight(norm: Any) -> None:
    norm.weight = None


def norm_without_bias(norm: Any) -> None:
    norm.bias = None


def uncounted(norm: Any) -> None:
    norm.num_batches_tracked = None


def strided(norm: Any) -> None:
    norm.bias = nn.Parameter(norm.bias.detach().repeat_interleave(2)[::2])
    norm.running_mean = norm.running_mean.repeat_interleave(2)[::2]


@pytest.mark.parametrize("change", [norm_without_weight, norm_without_bias, uncounted, strided])
@pytest.mark.parametrize("training", [True, False])
def test_unusual_norms(change: Callable[[Any], None], training: bool) -> None:
    ours, theirs = twins(training=training)
    for block in (ours, theirs):
        change(block.get_submodule("denselayer1.norm1"))
        change(block.get_submodule("denselayer2.norm2"))
    x = images()
    for a, b in zip(gradients(ours, ours, x), gradients(theirs, theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_replaced_modules_fall_back() -> None:
    """The first layer's convolution inside another module (as adapters do), and a norm of another kind."""
    for name, wrap in (("conv1", nn.Sequential), ("norm1", lambda norm: nn.GroupNorm(2, norm.num_features).double())):
        ours, theirs = twins()
        for block in (ours, theirs):
            layer = block.get_submodule("denselayer1")
            setattr(layer, name, wrap(getattr(layer, name)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            for x in (images(), torch.randn(2, SIZE[1], 1, 1, dtype=torch.float64)):
                torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_training_step_between_frozen_forward_and_backward() -> None:
    block, _ = twins(training=False)
    x = images()
    expected = gradients(block, block, x)
    value = block(x).square().sum()
    block.train()(x)
    actual = torch.autograd.grad(value, [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_meta_device() -> None:
    block = FusedDenseBlock(*SIZE).to("meta")
    out = block(torch.empty(2, SIZE[1], 5, 4, device="meta", requires_grad=True))
    assert out.shape == (2, SIZE[1] + SIZE[0] * SIZE[3], 5, 4)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in block.parameters())
