"""FusedTransition against the paper's, written operator by operator, and against torchvision's own."""

import copy
import warnings
from collections import OrderedDict

import peers
import pytest
import releases
import torch
from blocks import bimodal, step
from tolerances import assert_no_worse, assert_same
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_densenet import FallbackError, FallbackWarning, FusedTransition, reference, strict
from fused_densenet.ops.statistics import channel_moments, statistics_of
from fused_densenet.ops.transition import Arguments
from fused_densenet.ops.transition import transition as transition_op


def pair(spatial_dims: int, channels: int = 10, out: int = 6) -> tuple[FusedTransition, reference.Transition]:
    """Ours and the reference's with the same, not trivial, parameters and running statistics."""
    ours, theirs = (kind(channels, out, spatial_dims=spatial_dims) for kind in (FusedTransition, reference.Transition))
    with torch.no_grad():
        for tensor in (ours.norm.weight, ours.norm.bias, ours.norm.running_mean, ours.norm.running_var):
            tensor.uniform_(0.5, 1.5)
        ours.norm.weight[::3] *= -1
        ours.norm.bias -= 1
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(*sizes: int, channels: int = 10) -> Tensor:
    """``sizes`` are the batch's and the image's."""
    batch, *spatial = sizes
    return bimodal(batch, channels, *spatial)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "sizes", [(3, 7), (2, 2), (2, 5, 8), (1, 2, 2), (1, 9, 2), (2, 3, 3, 3), (1, 2, 5, 4)], ids=str
)
def test_step_equals_references(sizes: tuple[int, ...], training: bool) -> None:
    ours, theirs = pair(len(sizes) - 1)
    x = images(*sizes).double()
    ours, theirs = ours.double().train(training), theirs.double().train(training)
    assert_same(step(ours, x, steps=2), step(theirs, x, steps=2), "float64 whole block")


def test_step_equals_torchvisions() -> None:
    theirs = peers.Transition(24, 12)
    ours = FusedTransition(24, 12)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_children()] == ["norm", "relu", "conv", "pool"]
    ours.load_state_dict(theirs.state_dict())
    x = images(4, 10, 6, channels=24)
    assert_same(step(ours, x), step(theirs, x), "float32 whole block")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_are_no_less_exact(dtype: torch.dtype, autocast: bool) -> None:
    ours, theirs = pair(2, 64, 32)
    x = images(4, 9, 12, channels=64).to(dtype)
    if not autocast:
        ours, theirs = ours.to(dtype), theirs.to(dtype)
    exact = step(copy.deepcopy(theirs).double(), x.double())
    found, expected = (step(m, x, autocast=dtype if autocast else None) for m in (ours, theirs))
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert_no_worse(found, expected, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_of_float32(dtype: torch.dtype) -> None:
    """The result has the convolution's dtype, as in eager."""
    ours, theirs = pair(2)
    x = images(2, 4, 4)
    found, expected = (step(m, x, autocast=dtype) for m in (ours, theirs))
    assert found["output"].dtype == expected["output"].dtype == dtype
    assert found["input's gradient"].dtype == torch.float32
    torch.testing.assert_close(found["output"], expected["output"], rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [(5,), (4, 3), (2, 3, 2)], ids=str)
def test_gradients_of_first_and_second_order(sizes: tuple[int, ...], training: bool) -> None:
    ours, _ = pair(len(sizes), 3, 2)
    ours = ours.double().train(training)
    ours.norm.track_running_stats = False  # the same function at every call
    names = ["conv.weight", "norm.weight", "norm.bias"]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))

    inputs = [images(2, *sizes, channels=3).double(), *(ours.get_parameter(name).detach() for name in names)]
    inputs = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.usefixtures("backend")
def test_without_pooling() -> None:
    ours = FusedTransition(10, 6, pool=False).double()
    theirs = nn.Sequential(OrderedDict(list(reference.Transition(10, 6).named_children())[:3])).double()
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 5, 3).double()
    assert_same(step(ours, x), step(theirs, x), "float64 whole block")


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_any_layout(layout: str) -> None:
    ours, theirs = pair(2)
    x = images(2, 6, 5).double()
    x = {"contiguous": x, "channels last": x.to(memory_format=torch.channels_last)}.get(layout, x.mT.contiguous().mT)
    assert_same(step(ours.double(), x), step(theirs.double(), x), "float64 whole block")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None, affine: bool) -> None:
    ours, theirs = FusedTransition(6, 4).double(), reference.Transition(6, 4).double()
    for module in (ours, theirs):
        module.norm = nn.BatchNorm2d(6, momentum=momentum, affine=affine, eps=1e-3).double()
    theirs.conv.load_state_dict(ours.conv.state_dict())
    for _ in range(3):
        x = images(2, 4, 4, channels=6).double()
        torch.testing.assert_close(ours(x), theirs(x))
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "float64 whole block")


def test_frozen_norm_while_training() -> None:
    ours, theirs = pair(2)
    for module in (ours, theirs):
        module.double().norm.eval().requires_grad_(False)
    x = images(2, 4, 5).double()
    assert_same(step(ours, x), step(theirs, x), "float64 whole block")
    ours.conv.requires_grad_(False)
    out = ours(x.requires_grad_())
    out.sum().backward()
    assert ours.conv.weight.grad is not None  # of the step before
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), out)


def test_flops_are_those_of_pooled_features() -> None:
    ours = FusedTransition(10, 6)
    with FlopCounterMode(display=False) as forward:
        out = ours(torch.randn(2, 10, 7, 8, requires_grad=True))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 2 * 3 * 4 * 10 * 6
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("training", [True, False])
def test_compile_and_export(training: bool) -> None:
    ours = pair(2)[0].double().train(training)
    eager, x = copy.deepcopy(ours), images(3, 6, 5).double()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x).items()}
    assert_same(found, step(eager, x), "float64 whole block")
    exported = torch.export.export(eager.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), eager(x))


@pytest.mark.parametrize("batch_stats", [True, False])
def test_operators(batch_stats: bool) -> None:
    x = images(2, 5, 4).double().requires_grad_()
    weight = torch.randn(6, 10, 1, 1, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.rand(10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    moments, pixels, _ = statistics_of(x, "eager", None)
    bias = torch.rand(6, dtype=torch.float64, requires_grad=True)
    constants = (1e-5, 0.2, batch_stats, True, "eager", None)
    arguments = Arguments(x, [weight], [bias], [gamma], [beta], list(moments), pixels, *constants)
    operators = torch.ops.fused_densenet
    torch.library.opcheck(channel_moments, (x.detach(), "eager", None))
    torch.library.opcheck(operators.transition.default, arguments)
    dout = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    traced = ("test_aot_dispatch_dynamic",) if not releases.OLD else ()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", *traced)
    torch.library.opcheck(operators.transition_backward.default, (dout, [], [], [True], *arguments), test_utils=tests)


REASONS = {
    "norm is a GroupNorm": lambda t: t.register_module("norm", nn.GroupNorm(2, 10)),
    "relu is a SiLU": lambda t: t.register_module("relu", nn.SiLU()),
    "relu has a slope of -0.1 for negative numbers": lambda t: t.register_module("relu", nn.LeakyReLU(-0.1)),
    "conv is no 1x1 convolution": lambda t: t.register_module("conv", nn.Conv2d(10, 6, 3, padding=1, bias=False)),
    "pool is no average pooling of window and stride 2": lambda t: t.register_module("pool", nn.MaxPool2d(2)),
    "norm has hooks": lambda t: t.norm.register_forward_hook(lambda *_: None),
    "more is no part of a transition": lambda t: t.register_module("more", nn.Tanh()),
}


@pytest.mark.parametrize("reason", REASONS)
def test_fallback_computes_the_same_and_says_why(reason: str) -> None:
    ours = pair(2)[0].double()
    REASONS[reason](ours)
    ours.double()
    x = images(2, 4, 4).double()
    expected = nn.Sequential(*copy.deepcopy(list(ours.children())))(x)
    with pytest.warns(FallbackWarning, match=f"FusedTransition runs operator by operator.*{reason}"):
        torch.testing.assert_close(ours(x), expected)
    with strict(), pytest.raises(FallbackError, match=reason):
        ours(x)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, 2),
        nn.AvgPool2d(2, padding=1),
        nn.AvgPool2d(2, divisor_override=3),
    ],
)
def test_other_pooling_is_not_taken_for_ours(pool: nn.Module) -> None:
    ours = pair(2)[0].double()
    ours.pool = pool
    x = images(2, 5, 5).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        torch.testing.assert_close(ours(x), pool(ours.conv(ours.relu(ours.norm(x)))))


def test_bad_input() -> None:
    ours = FusedTransition(10, 6)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="input: expected 10 channels, got 9"):
        ours(torch.randn(2, 9, 4, 4))
    with pytest.raises(ValueError, match=r"input: expected 4 dimensions \(N, C, H, W\), got 3"):
        ours(torch.randn(10, 4, 4))
    with pytest.raises(TypeError, match="input: expected a Tensor, got list"):
        ours([torch.randn(2, 10, 4, 4)])
    with pytest.raises(
        TypeError, match=r"input: expected torch.float32, the dtype of the parameters, got torch.float64"
    ):
        ours(torch.randn(2, 10, 4, 4).double())
    with pytest.raises(ValueError, match="input: expected sizes of at least 2 to pool"):
        ours(torch.randn(2, 10, 1, 4))
    with pytest.raises(ValueError, match="input: expected more than one value per channel in training"):
        FusedTransition(10, 6, pool=False)(torch.randn(1, 10, 1, 1))
    with pytest.raises(ValueError, match="num_output_features: expected at least 1, got 0"):
        FusedTransition(10, 0)
    with pytest.raises(ValueError, match="spatial_dims: expected 1, 2 or 3, got 4"):
        FusedTransition(10, 6, spatial_dims=4)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_empty_batch() -> None:
    """By itself as in eager; beside other ranks' batches through the operator, which adds nothing."""
    ours, theirs = (m.double().eval() for m in pair(2))
    x = torch.empty(0, 10, 4, 6, dtype=torch.float64)
    assert ours(x).shape == theirs(x).shape == (0, 6, 2, 3)
    (moments,) = channel_moments(x, "eager", None)
    gamma, beta, weight = (p.detach().requires_grad_() for p in (ours.norm.weight, ours.norm.bias, ours.conv.weight))
    ones = torch.ones_like(moments)
    out = transition_op(
        Arguments(x, [weight], [], [gamma], [beta], list(ones), None, 1e-5, 0.0, True, True, "eager", None)
    ).out
    out.sum().backward()
    assert out.shape == (0, 6, 2, 3)
    for gradient in (weight.grad, gamma.grad, beta.grad):
        assert gradient is not None and not gradient.any()
