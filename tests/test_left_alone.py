"""What looks like a dense block or a transition and does something else stays as it is, and the reason is the true one."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import peers
import pytest
import torch
import torch.nn.functional as F
from rebuilt_networks import GROWTH, FunctionalTransition, conv
from small_networks import blocks
from tolerances import assert_largest
from torch import Tensor, nn

from fused_densenet import FallbackWarning, FusedTransition, explain, fuse, strict


class Layer(nn.Module):
    """torchvision's names and arithmetic; ``inside`` may do something to the new features, ``around`` to all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(width), nn.ReLU(), conv(width, 8, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(8), nn.ReLU(), conv(8, GROWTH, 3)

    def inside(self, new: Tensor) -> Tensor:
        return new

    def around(self, features: Tensor) -> Tensor:
        return features

    def forward(self, x: Tensor) -> Tensor:
        x = self.around(x)
        new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        return torch.cat([x, self.inside(new)], 1)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Detached(Layer):
    def around(self, features: Tensor) -> Tensor:
        return features.detach()


class WithoutGradient(Layer):
    def around(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            return features.contiguous()


class GradientReversed(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return Reversed.apply(new)


class GradientHooked(Layer):
    def inside(self, new: Tensor) -> Tensor:
        new.register_hook(lambda gradient: 2 * gradient)
        return new


class WideGate(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return new if new.shape[-1] <= 8 else 0 * new


class BatchGate(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return new if len(new) < 100 else 0 * new


class TypeGate(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return new if new.dtype == torch.float64 else 0 * new


class ValueGate(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return new if new.mean() < 1e6 else 0 * new


class GradientGate(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return new if torch.is_grad_enabled() else 0 * new


class LeafGate(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return new if new.grad_fn is not None or not new.requires_grad else 0 * new


class OwnScale(Layer):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(()))

    def inside(self, new: Tensor) -> Tensor:
        return self.scale * new


class OwnShift(OwnScale):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.zeros(1))

    def inside(self, new: Tensor) -> Tensor:
        return new.add_(self.scale)


class OwnMask(OwnScale):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.scale
        self.register_buffer("scale", torch.ones(GROWTH, 1, 1))


class OwnNumber(OwnScale):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.scale
        self.scale = 1.0


class Unused(Layer):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.auxiliary = nn.Linear(2, 2)


class StochasticDepth(Layer):
    """With probability 0.1 the layer adds nothing, by torch's random numbers."""

    def inside(self, new: Tensor) -> Tensor:
        return torch.zeros_like(new) if self.training and torch.rand(()) < 0.1 else new


class PythonsStochasticDepth(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return 0 * new if self.training and random.random() < 1e-9 else new


class NumpysStochasticDepth(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return 0 * new if self.training and numpy.random.rand() < 1e-9 else new


class Noise(Layer):
    def inside(self, new: Tensor) -> Tensor:
        return new + 1e-12 * torch.randn_like(new)


class Counting(Layer):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.calls = 0

    def inside(self, new: Tensor) -> Tensor:
        self.calls += 1
        return new


class OwnMode(Layer):
    """Its norm follows the mode of the layer, not its own."""

    def settings(self) -> tuple[bool, float, float]:
        """Training or not, momentum and eps of its first norm."""
        return self.training, self.norm1.momentum, self.norm1.eps

    def forward(self, x: Tensor) -> Tensor:
        n, (training, momentum, eps) = self.norm1, self.settings()
        x1 = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, training, momentum, eps)
        if training:
            n.num_batches_tracked.add_(1)
        new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(x1)))))
        return torch.cat([x, new], 1)


class OwnEps(OwnMode):
    def settings(self) -> tuple[bool, float, float]:
        return self.norm1.training, self.norm1.momentum, 2 * self.norm1.eps


class OwnMomentum(OwnMode):
    def settings(self) -> tuple[bool, float, float]:
        return self.norm1.training, self.norm1.momentum / 2, self.norm1.eps


class Collecting(Layer):
    """It keeps what it computed in a list."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.kept: list[Any] = []

    def inside(self, new: Tensor) -> Tensor:
        self.kept.append(None)
        return new


class Keeping(Layer):
    def inside(self, new: Tensor) -> Tensor:
        self.kept = new
        return new


class SharedNorm(Layer):
    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu1(self.norm1(x)))
        new = self.conv2(self.relu2(self.norm2(self.norm2(new))))
        return torch.cat([x, new], 1)


class NormTwice(Layer):
    def around(self, features: Tensor) -> Tensor:
        self.norm1(features)
        return features


class Grouped(Layer):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv2 = conv(8, GROWTH, 3, groups=4)


class Cropped(Layer):
    """HoVerNet's: features are cut to the size that the convolution leaves."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv2 = nn.Conv2d(8, GROWTH, 3, groups=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        return torch.cat([x[:, :, 1:-1, 1:-1], new], 1)


class Shuffled(Layer):
    """CondenseNet's: grouped convolutions, channels shuffled between them."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv1, self.conv2 = conv(width, 8, 1, groups=4), conv(8, GROWTH, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu1(self.norm1(x)))
        new = new.unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat([x, self.conv2(self.relu2(self.norm2(new)))], 1)


class Residual(Layer):
    """DPN's: part of the features are added, the others put beside."""

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        added, beside = x[:, :2] + new[:, :2], x[:, 2:]
        return torch.cat([added, beside, new], 1)


class Instance(Layer):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm1 = nn.InstanceNorm2d(width, affine=True)


class LayerNorms(nn.Module):
    """RDNet's layers: depthwise convolution, LayerNorm, GELU; no batch normalisation at all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv, self.norm = conv(width, width, 3, groups=width), nn.GroupNorm(1, width)
        self.pwconv = conv(width, GROWTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.pwconv(F.gelu(self.norm(self.dwconv(x))))], 1)


class DenseBlock(nn.Sequential):
    def __init__(self, layer: Callable[[int], nn.Module]) -> None:
        super().__init__(*(layer(8 + GROWTH * i) for i in range(2)))


LAYERS: dict[type[nn.Module], str] = {
    Detached: "0 calls detach",
    WithoutGradient: "0 calls set_grad_enabled",
    GradientReversed: "0 calls something that is no function of torch|0 calls view_as",
    GradientHooked: "0 looks at the register_hook of a tensor",
    WideGate: "0 looks at the shape of a tensor",
    BatchGate: "0 looks at the shape of a tensor",
    TypeGate: "0 looks at the dtype of a tensor",
    ValueGate: "0 calls mean",
    GradientGate: "computes something else than a FusedDenseBlock: its result in training without gradients",
    LeafGate: "0 looks at the grad_fn of a tensor",
    OwnScale: "0 calls mul",
    OwnShift: "0 calls add_",
    OwnMask: "0 calls mul",
    OwnNumber: "0 calls mul",
    Unused: "0.auxiliary has parameters or buffers that are no part of a layer",
    StochasticDepth: "0 calls rand",
    PythonsStochasticDepth: "its forward draws random numbers that are not torch's",
    NumpysStochasticDepth: "its forward draws random numbers that are not torch's",
    Noise: "0 calls randn_like",
    Counting: "its forward sets attributes of its own",
    OwnMode: "computes something else than a FusedDenseBlock: its result in training of some modules",
    OwnEps: "computes something else than a FusedDenseBlock: its result in training",
    OwnMomentum: "computes something else than a FusedDenseBlock: the buffer",
    Collecting: "its forward sets attributes of its own",
    Keeping: "its forward sets attributes of its own",
    SharedNorm: "its layers|more than once|besides|neither",
    NormTwice: "0.norm1 calls batch_norm besides",
    Grouped: "0.conv2 is grouped, strided or dilated",
    Cropped: "0 calls __getitem__",
    Shuffled: "0 calls unflatten",
    Residual: "0 calls __getitem__",
    Instance: "0.norm1 is a InstanceNorm2d",
    LayerNorms: "it does not begin with a norm|0.norm is a GroupNorm",
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.filterwarnings("ignore:not every dense block can be fused")
def test_block(layer: type[nn.Module]) -> None:
    """It is alone, and in a network of others that run fused."""
    model = nn.ModuleList([DenseBlock(layer), DenseBlock(Layer), nn.Sequential(layer(8), layer(8 + GROWTH))])
    state = copy.deepcopy(model.state_dict())
    fuse(model)
    odd, plain, *unnamed = explain(model).blocks
    assert plain.fused and len(blocks(model)) == 1 and bool(unnamed) == (layer is not LayerNorms)
    for report in (odd, *unnamed):
        reasons = "; ".join(report.reasons)
        if report.name.count("."):  # of layers that nothing keeps together, each by itself
            reasons = reasons.replace("its forward", "0")
        assert not report.fused and any(part in reasons for part in LAYERS[layer].split("|")), reasons
    assert type(model[0]) is DenseBlock and type(model[0][0]) is layer and type(model[2]) is nn.Sequential
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


class TransitionDetached(FunctionalTransition):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class TransitionScaled(FunctionalTransition):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


class TransitionGated(FunctionalTransition):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.size(-1) <= 8 else x * 0)


class TransitionReversed(FunctionalTransition):
    def forward(self, x: Tensor) -> Tensor:
        return Reversed.apply(super().forward(x))


class TransitionOfLargerWindow(FunctionalTransition):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 3, stride=2, padding=1)


class TransitionWithRandomness(FunctionalTransition):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if random.random() > 0 else x


TRANSITIONS: dict[type[nn.Module], str] = {
    TransitionDetached: "its forward calls detach",
    TransitionScaled: "its forward calls mul",
    TransitionGated: "its forward looks at the shape of a tensor",
    TransitionReversed: "its forward calls",
    TransitionOfLargerWindow: "its pooling is not of window and stride 2",
    TransitionWithRandomness: "its forward draws random numbers that are not torch's",
}


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_transition(kind: type[nn.Module]) -> None:
    model = nn.ModuleList([kind(8, 4), FunctionalTransition(8, 4)])
    fuse(model)
    odd, plain = explain(model).transitions
    assert plain.fused and isinstance(model[1], FusedTransition)
    assert type(model[0]) is kind and TRANSITIONS[kind] in odd.reasons[0]


class Deaf(peers.DenseBlock):
    """What nothing that is noted shows, the trial does: a gradient that its own backward leaves out."""

    def forward(self, init_features: Tensor) -> Tensor:
        out: Tensor = super().forward(init_features)
        with torch._C.DisableTorchFunction():
            node = out.grad_fn
        assert node is None or node.register_prehook(lambda gradients: (2 * gradients[0],))
        return out


def test_trial_compares_gradients() -> None:
    model = nn.ModuleList([Deaf(2, 8, 2, 4, 0.0), peers.DenseBlock(2, 8, 2, 4, 0.0)])
    with pytest.warns(UserWarning, match="not every dense block can be fused"):
        fuse(model)
    odd, plain = explain(model).blocks
    assert plain.fused and "Deaf computes something else than a FusedDenseBlock: the gradient by" in odd.reasons[0]


def test_hooks_take_no_part_in_the_trial() -> None:
    block = DenseBlock(Layer)
    expected = copy.deepcopy(block)
    handle = block[0].conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert len(blocks(fuse(block, strict=True))) == 1
    x = torch.randn(2, 8, 5, 6)
    with pytest.warns(FallbackWarning, match=r"0\.conv1 has hooks"):
        block.eval()(x)
    handle.remove()
    with strict():
        assert_largest(block(x), expected.eval()(x), "float32 whole block", "output")


def test_survey_changes_nothing() -> None:
    random_ones = (DenseBlock(PythonsStochasticDepth), DenseBlock(NumpysStochasticDepth), DenseBlock(Noise))
    model: Any = nn.Sequential(DenseBlock(Layer), DenseBlock(OwnScale), FunctionalTransition(16, 8), *random_ones)
    model[0][1].train(False)
    model[0][0].conv1.weight.requires_grad_(False)
    model[1][0].scale.grad = torch.ones(())
    model[0][0].conv2.register_forward_hook(lambda *_: None)
    modules = list(model.modules())
    before = [
        {name: value.clone() if isinstance(value, Tensor) else copy.copy(value) for name, value in vars(m).items()}
        for m in modules
    ]
    state = copy.deepcopy(model.state_dict())
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    numbers = torch.get_rng_state(), random.getstate(), [str(part) for part in numpy.random.get_state()]
    enabled = torch.is_grad_enabled()
    explain(model)
    assert torch.equal(torch.get_rng_state(), numbers[0]) and random.getstate() == numbers[1]
    assert [str(part) for part in numpy.random.get_state()] == numbers[2] and torch.is_grad_enabled() == enabled
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == grads
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    for module, attributes in zip(modules, before, strict=True):
        assert {name: value for name, value in vars(module).items() if not isinstance(value, Tensor)} == attributes
