"""What training and fine-tuning use around a network: on a fused torchvision DenseNet, against the unfused one."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import step
from networks import assert_same_step, images, torchvisions
from packages import timm
from tolerances import assert_largest, assert_same, rms, tolerance
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_densenet import FallbackWarning, FusedDenseBlock, explain, fuse, strict


def pair(**options: Any) -> tuple[Any, Any]:
    """A fused network and the same one as torchvision made it."""
    theirs = torchvisions(**options)
    return fuse(copy.deepcopy(theirs)), theirs


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("rest", [nn.Identity(), nn.Tanh()])
def test_checkpoint_leaves_the_statistics_right(rest: nn.Module, use_reentrant: bool) -> None:
    """Once, not twice, whether or not the second pass gets past the block."""
    plain = FusedDenseBlock(2, 8, 2, 4)
    checkpointed = copy.deepcopy(plain)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    for _ in range(2):
        rest(plain(x)).square().sum().backward()
        checkpoint(lambda v: rest(checkpointed(v)), x, use_reentrant=use_reentrant).square().sum().backward()
    assert_same(checkpointed.state_dict(), plain.state_dict(), "float32 whole block")
    assert checkpointed.get_buffer("denselayer2.norm1.num_batches_tracked") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_with_scaled_gradients(dtype: torch.dtype) -> None:
    """Dtypes are eager's, norms keep float32, no more error than eager's, and a step with infinities is left out."""
    ours, theirs = pair()
    x, target = images(8), torch.arange(8) % 5
    exact = copy.deepcopy(theirs)
    F.cross_entropy(exact(x), target).backward()
    errors, dtypes = [], []
    for network in (ours, theirs):
        network.float()
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        with torch.autocast("cpu", dtype), strict():
            features = network.features(x.float())
            out = network(x.float())
            loss = F.cross_entropy(out, target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = [p.grad for p in network.parameters()]
        wanted = [p.grad for p in exact.parameters()]
        errors.append(sum(rms(g.double() - w) / rms(w) for g, w in zip(grads, wanted, strict=True)))
        dtypes.append([features.dtype, out.dtype, *(t.dtype for t in (*grads, *network.buffers()))])
        before = network.classifier.weight.clone()
        scaler.step(optimizer)
        scaler.update()
        assert not torch.equal(before, network.classifier.weight)
        before = network.classifier.weight.clone()
        optimizer.zero_grad()
        scaler.scale(network(x.float()).sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, network.classifier.weight) and scaler.get_scale() == 128.0
    assert dtypes[0] == dtypes[1]
    assert errors[0] <= tolerance("error ratio") * errors[1]


def test_gradient_penalty() -> None:
    results = []
    x = images(2)
    for network in pair():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(leaf).square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        second = {f"{n}'s gradient": p.grad for n, p in network.named_parameters() if p.grad is not None}
        results.append({"input's gradient": leaf.grad, **second})
    assert_same_step(*results)


def test_frozen_norms() -> None:
    """Fine-tuning with the statistics and the affine part of every norm as they were trained."""
    ours, theirs = pair()
    x = images(4)
    for network in (ours, theirs):
        step(network, x)
        for module in network.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
    with strict():
        actual = step(ours, x, steps=2)
    expected = step(theirs, x, steps=2)
    assert "features.denseblock1.denselayer1.norm1.weight's gradient" not in expected
    assert_same_step(actual, expected)


def test_some_parameters_frozen() -> None:
    """The first half frozen: its block is not differentiated, and keeps nothing."""
    ours, theirs = pair()
    x = images(4)
    for network in (ours, theirs):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("denseblock2" in name or "classifier" in name)
    with strict(), FlopCounterMode(display=False) as counter:
        out = ours(x)
        out.square().sum().backward()
    operators = counter.get_flop_counts()["Global"]
    blocks = torch.ops.fused_densenet
    assert 0 < operators[blocks.dense_block_backward] < operators[blocks.dense_block]
    theirs(x).square().sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, theirs)]
    assert list(gradients[0]) == list(gradients[1]) and all("denseblock1" not in n for n in gradients[0])
    limit = tolerance("float64 whole block") * max(g.abs().max().item() for g in gradients[1].values())
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=0, atol=limit)


def test_inference_mode() -> None:
    ours, theirs = pair()
    x = images(3)
    step(theirs, x)
    ours.load_state_dict(theirs.state_dict())
    with torch.inference_mode(), strict():
        out = ours.eval()(x)
    assert out.is_inference()
    assert_largest(out, theirs.eval()(x), "float64 whole block", "output")


@pytest.mark.parametrize("training", [True, False])
def test_gradients_enabled_in_inference_mode(training: bool) -> None:
    """There autograd records nothing; what was kept of it must serve a training step."""
    ours, theirs = (network.train(training) for network in pair())
    x = images(3)
    with torch.inference_mode(), torch.enable_grad(), strict():
        out, expected = ours(x), theirs(x)
    assert out.is_inference() and not out.requires_grad
    assert_largest(out, expected, "float64 whole block", "output")
    ours.train(), theirs.train()
    assert_same_step(step(ours, x), step(theirs, x))


def test_deterministic_algorithms() -> None:
    """Nothing in a step has to be replaced or refused, and it gives the same bits again."""
    assert torch.are_deterministic_algorithms_enabled()
    network, _ = pair()
    x = images(3)
    first, second = step(copy.deepcopy(network), x), step(copy.deepcopy(network), x)
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_flops() -> None:
    counts = []
    for network in pair():
        with FlopCounterMode(display=False) as counter:
            network(images(2)).sum().backward()
        counts.append(counter.get_total_flops())
    pooled_first = 3 * (1 - 1 / 4) * 2 * (2 * 8 * 8) * 32 * 16  # transition, of 8x8 pixels: three products of a quarter
    assert counts[0] == counts[1] - pooled_first > 0


def test_profiler_names() -> None:
    block = FusedDenseBlock(2, 8, 2, 4)
    with profile() as profiler:
        block(torch.randn(2, 8, 4, 4)).sum().backward()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["fused_densenet::dense_block"] == 1
    assert counts["fused_densenet::dense_block_backward"] == 1
    assert counts["fused_densenet::norm_relu_conv"] == counts["fused_densenet::norm_relu_conv_backward"] == 4
    assert counts["fused_densenet::place"] == 2  # the input, and the gradient of the output
    assert counts["fused_densenet::place_backward"] == 1


def test_weights_only() -> None:
    ours, theirs = pair()
    step(ours, images(2))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    assert_same(theirs.state_dict(), ours.state_dict(), "float64 whole block")


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(use_buffers: bool) -> None:
    """Exponential and stochastic weight averaging, then ``update_bn``: cumulative statistics from scratch."""
    networks = pair()
    batches = [images(count) for count in (2, 4, 3)]
    averages = []
    for network in networks:
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        average = swa_utils.AveragedModel(network, use_buffers=use_buffers)
        ema = swa_utils.AveragedModel(
            network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
        )
        for x in batches:
            optimizer.zero_grad()
            network(x).logsumexp(1).sum().backward()
            optimizer.step()
            average.update_parameters(network)
            ema.update_parameters(network)
        with strict(network is networks[0]):
            swa_utils.update_bn(batches, average)
        averages.append(average.state_dict() | {f"ema.{name}": value for name, value in ema.state_dict().items()})
    assert_same(*averages, "float64 whole block")
    assert averages[0]["module.features.denseblock1.denselayer1.norm1.num_batches_tracked"] == 3


def test_functional_call() -> None:
    """Other parameters for one call, and their gradients, without a fallback."""
    ours, theirs = pair()
    x = images(2)
    gradients: list[dict[str, Tensor]] = []
    for network in (ours, theirs):
        values = {name: (0.9 * value).detach().requires_grad_() for name, value in network.named_parameters()}
        with strict():
            out = torch.func.functional_call(network, values, (x,))
        found = torch.autograd.grad(out.logsumexp(1).sum(), list(values.values()))
        gradients.append({f"{name}'s gradient": g for name, g in zip(values, found, strict=True)})
    assert_same_step(*gradients)


@pytest.mark.parametrize("fused_first", [True, False])
def test_converters_and_timms_norms(fused_first: bool) -> None:
    """timm's own converter keeps the activation inside its norms, torch's loses it: fused, and an answer that says so."""
    x = torch.randn(2, 3, 32, 32)
    network = timm.models.densenet.DenseNet(8, (2, 2), 5).eval()
    expected = network(x)

    def converted(convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
        copied = copy.deepcopy(network)
        return convert(fuse(copied)) if fused_first else fuse(convert(copied))

    with strict():
        assert_largest(converted(timm.layers.convert_sync_batchnorm)(x), expected, "float32 whole block", "output")
    with pytest.warns(FallbackWarning, match="no activation"):
        converted(nn.SyncBatchNorm.convert_sync_batchnorm)(x)
    assert "drops that of timm's norms" in str(explain(converted(nn.SyncBatchNorm.convert_sync_batchnorm)))
