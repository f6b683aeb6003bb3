"""Neighbours of a network that run as one: their results, what keeps them apart, what is seen between two calls, memory."""

import copy
import functools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from networks import assert_same_step, torchvisions
from tolerances import assert_largest, assert_no_worse
from torch import Tensor, nn

from fused_densenet import DenseNet, FusedDenseBlock, FusedFeatures, FusedTransition, fuse, use_backend
from fused_densenet.fallback.standing import known_of
from fused_densenet.nn import chain
from fused_densenet.nn.stem import MAX_POOLS
from fused_densenet.ops import network
from fused_densenet.ops.program import Context

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
from allocator import step_memory

NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture
def chained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many modules each program that ran was for."""
    runs: list[int] = []
    whole = chain.Chain.run

    def run(self: chain.Chain, *arguments: Any) -> Tensor | None:
        out = whole(self, *arguments)
        if out is not None:
            runs.append(len(self.links))
        return out

    monkeypatch.setattr(chain.Chain, "run", run)
    return runs


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing runs as one, until it is undone."""
    monkeypatch.setattr(chain.Chain, "run", lambda *_: None)
    return monkeypatch


def randomised(model: nn.Module) -> Any:
    """In double precision and evaluation, with norms that do something and do not blow up what is constant."""
    for module in model.double().eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 0.1
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Any, Tensor, int]:
    """Norms, alone or with ReLU and perhaps pooling, blocks and transitions in any order; an image; how many there are."""
    torch.manual_seed(draw(st.integers(0, 99)))
    dims, width = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    modules: list[nn.Module] = []
    first, count = width, draw(st.integers(2, 5))
    for _ in range(count):
        kind = draw(st.sampled_from(["norm", "relu", "pool", "block", "transition", "flat transition"]))
        if kind in ("norm", "relu", "pool"):
            modules += [NORM[dims](width), *([] if kind == "norm" else [nn.ReLU()])]
            modules += [MAX_POOLS[dims - 1](3, 2, 1)] if kind == "pool" else []
        elif kind == "block":
            layers, bn_size, k = draw(st.integers(1, 3)), draw(st.sampled_from([None, 1, 2])), draw(st.integers(1, 5))
            options: Any = {"bias": draw(st.booleans()), "negative_slope": draw(st.sampled_from([0.0, 0.2]))}
            options["memory_efficient"] = draw(st.booleans())
            modules.append(FusedDenseBlock(layers, width, bn_size, k, spatial_dims=dims, **options))
            modules[-1].prepends = draw(st.booleans())
            width += layers * k
        else:
            out = draw(st.integers(1, 9))
            modules.append(FusedTransition(width, out, spatial_dims=dims, pool=kind == "transition"))
            width = out
    size = draw(st.tuples(*[st.integers(1, (40, 17, 9)[dims - 1])] * dims))
    return randomised(FusedFeatures(*modules)), torch.randn(draw(st.integers(1, 3)), first, *size).double(), count


@pytest.mark.parametrize("name", ["eager", "cpu"])
@hypothesis.given(drawn=sequences())
def test_result_is_that_of_the_modules(name: str, drawn: tuple[nn.Module, Tensor, int]) -> None:
    features, x, count = drawn
    parts = parts_of(features)
    assert len(parts) == count
    with use_backend(name), torch.no_grad():
        if network.sizes(parts, tuple(x.shape[2:])) is None:
            with pytest.raises((ValueError, RuntimeError)):
                features(x)
            return
        ours = features(x)
    assert_largest(ours, reference_of(features, x), "float64 whole block", "output")


@pytest.mark.parametrize("name", ["eager", "cpu"])
@hypothesis.given(drawn=sequences())
def test_training_step_is_that_of_the_modules(name: str, drawn: tuple[Any, Tensor, int]) -> None:
    features, x, _ = drawn
    features.train()
    theirs = copy.deepcopy(features)
    pixels = network.sizes(parts_of(features), tuple(x.shape[2:]))
    hypothesis.assume(pixels is not None and len(x) * min(map(math.prod, pixels)) > 1)
    with use_backend(name):
        ours = step(features, features, x)
    assert_same_step(ours, step(theirs, functools.partial(reference_of, theirs), x))


def step(features: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """What a forward and a backward pass of ``run`` leave, ``features`` having the parameters."""
    x = x.clone().requires_grad_()
    out = run(x)
    torch.manual_seed(1)
    (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
    gradients = {f"{n} gradient": p.grad for n, p in features.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "x gradient": x.grad, **gradients, **dict(features.named_buffers())}  # type: ignore[dict-item]


def parts_of(features: Any) -> Any:
    (found,) = features.work_out()[0].chains.values()
    return found.parts


def reference_of(features: nn.Module, x: Tensor) -> Tensor:
    for module in features.children():
        if isinstance(module, FusedDenseBlock):
            for layer in module.values():
                new: Any = layer(x)
                x = torch.cat([new, x] if module.prepends else [x, new], dim=1)
        elif isinstance(module, FusedTransition):
            for part in module.children():
                x = part(x)
        else:
            x = module(x)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_network(dtype: torch.dtype, chained: list[int]) -> None:
    """From the stem's norm to the last block in one program, with the modules' own bits."""
    model, x = fuse(torchvisions()).eval().to(dtype), torch.randn(2, 3, 40, 64, dtype=dtype)
    model.features.norm5 = nn.Identity()
    module_by_module = model(x).detach()
    assert not chained
    with torch.no_grad():
        at_once = model(x)
    assert chained == [4]
    assert torch.equal(at_once, module_by_module)
    with torch.inference_mode():
        assert torch.equal(model(x), module_by_module)


def test_the_last_norm_is_part_of_it(chained: list[int]) -> None:
    """Which torch's own operator computes where it is alone, rounding otherwise."""
    model, x = fuse(torchvisions()).eval().float(), torch.randn(2, 3, 40, 64)
    with torch.no_grad():
        assert_largest(model(x), model.double()(x.double()), "float32 whole block", "output")
    assert chained == [5, 5]


def test_autocast(chained: list[int]) -> None:
    model, x = fuse(torchvisions()).eval().float(), torch.randn(1, 3, 40, 40)
    model.features.norm5 = nn.Identity()
    with torch.autocast("cpu", torch.bfloat16):
        module_by_module = model(x).detach()
        with torch.no_grad():
            assert torch.equal(model(x), module_by_module)
    assert chained == [4]


def small() -> tuple[Any, Tensor]:
    model = randomised(DenseNet(2, (2, 2), 4, num_classes=3))
    return model, torch.randn(1, 3, 32, 32, dtype=torch.float64)


def in_training(model: Any) -> None:
    model.features.denseblock2.denselayer1.norm2.train()


def hooked(model: Any) -> None:
    model.features.transition1.conv.register_forward_hook(lambda *_: None)


def hooked_block(model: Any) -> None:
    model.features.denseblock1.register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    model.features.denseblock1.denselayer1.relu2 = nn.Tanh()


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@pytest.mark.parametrize("change", [in_training, hooked, hooked_block, replaced])
def test_one_that_cannot_is_not_in_it(change: Callable[[Any], None], chained: list[int]) -> None:
    model, x = small()
    with torch.no_grad():
        model(x)
        assert chained.pop() == 5
        change(model)
        changed = model(x)
        assert 5 not in chained
    assert_largest(changed, model(x), "float64 whole block", "output")


def other_values(model: Any) -> None:
    model.features.denseblock1.denselayer2.conv2.weight.data.mul_(-1)


def other_storage(model: Any) -> None:
    model.features.transition1.norm.running_var.data = torch.full((8,), 3.0, dtype=torch.float64)


def other_strides(model: Any) -> None:
    model.features.norm0.weight.data = torch.randn(8, dtype=torch.float64)[::2]


def other_parameter(model: Any) -> None:
    model.features.denseblock2.denselayer1.norm1.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))


def other_buffer(model: Any) -> None:
    model.features.denseblock2.denselayer1.norm1.running_mean = torch.ones(4, dtype=torch.float64)


def other_state(model: Any) -> None:
    model.load_state_dict(
        {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}, assign=True
    )


def single(model: Any) -> None:
    model.float()


CHANGES = [other_values, other_storage, other_strides, other_parameter, other_buffer, other_state, single]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_is_seen(change: Callable[[Any], None]) -> None:
    model, x = small()
    with torch.no_grad():
        before = model(x)
        change(model)
        x = x.to(model.classifier.weight.dtype)
        after = model(x)
    assert change is single or not torch.allclose(before, after)
    precision = "float32" if change is single else "float64"
    assert_largest(after, copy.deepcopy(model)(x), f"{precision} whole block", "output")


def test_statistics_of_another_dtype_are_read_anew() -> None:
    """They are converted for a program, and change in place between two."""
    model, x = small()
    model, x = model.bfloat16(), x.bfloat16()
    model.features.norm5 = nn.Identity()
    with torch.no_grad():
        before = model(x)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(1)
        after = model(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, model(x))


def test_a_hook_that_changes_what_comes_later(chained: list[int]) -> None:
    model, x = small()
    with torch.no_grad():
        model(x)
        assert chained.pop() == 5
        block = model.features.denseblock2
        model.features.conv0.register_forward_hook(lambda *_: block.denselayer1.norm1.train() and None)
        untouched = block.denselayer1.norm1.running_mean.clone()
        model(x)
    assert not torch.equal(block.denselayer1.norm1.running_mean, untouched)


def test_other_tensors_go_to_the_modules(chained: list[int]) -> None:
    class Image(Tensor):
        pass

    model, x = small()
    with torch.no_grad():
        assert type(model(x.as_subclass(Image))) is Image
    assert not chained


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_profiler_shows_it(training: bool) -> None:
    model, x = small()
    model.train(training)
    with torch.set_grad_enabled(training), torch.profiler.profile() as profile:
        out = model(x)
        if training:
            out.sum().backward()
    names = {event.name.removeprefix("fused_densenet::") for event in profile.events()}
    assert names >= {"network", "norm_relu_conv", "norm_relu_pool"} | ({"network_backward"} if training else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_step_of_a_network(dtype: torch.dtype, apart: pytest.MonkeyPatch) -> None:
    """Under autocast for 16 bits; as exact as module by module."""
    model = fuse(torchvisions()).float()
    x = torch.randn(4, 3, 40, 64)

    def result(double: bool = False) -> dict[str, Tensor]:
        ours = copy.deepcopy(model).double() if double else copy.deepcopy(model)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and not double):
            found = step(ours, ours, x.double() if double else x)
        return {name: t for name, t in found.items() if t.is_floating_point()}

    module_by_module, exact = result(), result(double=True)
    apart.undo()
    assert_no_worse(result(), module_by_module, exact)


def test_what_is_kept_is_let_go_of(apart: pytest.MonkeyPatch) -> None:
    """A step of a network as one keeps as much for backward as its modules do, and needs no more at its peak."""
    model, x = fuse(torchvisions()).float(), torch.randn(2, 3, 64, 64)
    release = functools.partial(model.zero_grad, set_to_none=True)
    modules = step_memory(lambda: model(x).sum(), release, torch.device("cpu"))
    apart.undo()
    at_once = step_memory(lambda: model(x).sum(), release, torch.device("cpu"))
    assert at_once.saved_bytes <= modules.saved_bytes
    assert at_once.peak_bytes <= modules.peak_bytes


def test_backward_twice_and_second_order(chained: list[int]) -> None:
    theirs = randomised(torchvisions()).train()
    ours, x = fuse(copy.deepcopy(theirs)), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for model in (theirs, ours):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
    assert chained == [5, 5]
    first, second = ([p.grad for p in model.parameters()] for model in (ours, theirs))
    largest = max(g.abs().max() for g in second)
    for mine, expected in zip(first, second, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9 * float(largest))


def test_saved_tensors_pass_through_hooks(chained: list[int]) -> None:
    model, x = small()
    model.train()
    packed = list[int]()

    def pack(t: Tensor) -> tuple[Tensor]:
        packed.append(t.numel())
        return (t.clone(),)

    expected = step(copy.deepcopy(model), copy.deepcopy(model), x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t[0]):
        found = step(model, model, x)
    assert chained == [5, 5, 5] or chained == [5, 5]
    assert max(packed) >= 8 * 8 * 8
    assert found["output"].equal(expected["output"])
    assert found["x gradient"].equal(expected["x gradient"])


def frozen_first(model: Any) -> None:
    for module in (model.features.conv0, model.features.norm0, model.features.denseblock1):
        module.requires_grad_(False)


def frozen_norms(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def dropout(model: Any) -> None:
    for layer in model.features.denseblock2.children():
        layer.drop_rate = 0.3


@pytest.mark.parametrize("change", [frozen_first, frozen_norms, dropout])
def test_modules_that_do_not_take_part_in_training(change: Callable[[Any], None], chained: list[int]) -> None:
    """What needs no gradient keeps nothing for a backward pass; frozen norms and dropouts are the modules' own."""
    model, x = small()
    change(model.train())
    model(x)
    assert 5 not in chained


def test_gradients_leave_early_where_others_wait_for_them(chained: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model.train()(x).sum().backward()
    assert not chained


def test_memory_efficient_is_seen_between_two_steps(chained: list[int]) -> None:
    model, x = fuse(torchvisions()), torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def kept() -> int:
        sizes = list[int]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(x)
        return sum(sizes)

    before = kept()
    model.features.denseblock1.memory_efficient = True
    assert kept() < before
    assert chained == [5, 5]


def test_errors_are_those_of_the_modules() -> None:
    model, x = small()
    with torch.no_grad():
        with pytest.raises(ValueError, match="at least 2"):
            model(x[..., :4, :4])
        with pytest.raises(RuntimeError, match="input"):
            model(x[:, :2])
        features = FusedFeatures(*list(model.features.children())[1:])
        for wrong in (torch.randn(4, dtype=torch.float64), x[:, :2], x[..., 0]):
            with pytest.raises((ValueError, RuntimeError)):
                features(wrong)


def test_one_value_per_channel(chained: list[int]) -> None:
    """Behind a transition that leaves one pixel: as the modules refuse it."""
    block = {"bn_size": 2, "growth_rate": 4, "drop_rate": 0.0}
    parts = FusedDenseBlock(2, 8, **block), FusedTransition(16, 8), FusedDenseBlock(2, 8, **block)
    features = FusedFeatures(*parts).double()
    x = torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="more than one value per channel"):
        features(x)
    assert not chained
    features(x.repeat(2, 1, 1, 1)).sum().backward()
    assert chained == [3]


def test_two_buffers_are_there_at_a_time() -> None:
    """A program's memory: the two largest buffers; a block's bottlenecks are where the buffers before and behind it are."""
    model = DenseNet(8, (3, 3, 3), 16)
    parts = parts_of(model.features.eval())
    layout = network._layout(parts, (2, 16, 64, 64))
    assert layout is not None
    pixels = [2 * 32 * 32, 2 * 16 * 16]
    first, second = pixels[0] * (16 + 24), pixels[1] * 48  # 20 + 24, padded
    assert layout.entries == (max(pixels[0] * 32, second), first)
    assert layout.result == ((2, 46, 8, 8), 46)
    assert layout.context == Context(None, 2 * 64 * 64, 2 * 8 * 8)


def test_sizes_that_were_seen_are_remembered_up_to_a_bound() -> None:
    model, _ = small()
    features = model.features
    with torch.no_grad():
        for size in range(16, 16 + 160):
            features(torch.randn(1, 3, size, 16, dtype=torch.float64))
    (found,) = known_of(features, features.work_out).plan.chains.values()
    kept = found._network._layout_of.cache_info()
    assert kept.currsize == kept.maxsize
