"""FusedDenseBlock computes what torchvision's block and the reference compute: values, gradients, statistics."""

import copy
import functools
import io
import pickle
from typing import Any

import peers
import pytest
import torch
from blocks import bimodal, keep_clear_of_zero, step
from tolerances import assert_no_worse, assert_same, rms, tolerance
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_densenet import FallbackWarning, FusedDenseBlock, FusedTransition, reference, use_backend

SIZES = [(6, 64, 32), (16, 512, 32), (24, 256, 32), (6, 96, 48), (16, 24, 12)]
SMALL = (3, 8, 2, 4)  # layers, input channels, bn_size, growth rate

sizes = pytest.mark.parametrize("size", SIZES, ids=str)
both_memory_modes = pytest.mark.parametrize("memory_efficient", [False, True], ids=["kept", "recomputed"])


def assert_parity(ours: nn.Module, theirs: nn.Module, x: Tensor, *, steps: int = 1) -> None:
    """In float64 and in float32 against ``theirs`` in float64; both blocks hold the same state before."""
    exact = step(theirs.double(), x.double(), steps=steps)
    assert_same(step(copy.deepcopy(ours).double(), x.double(), steps=steps), exact, "float64 whole block")
    assert_same(step(ours, x, steps=steps), exact, "float32 whole block")


def pair(x: Tensor, size: tuple[int, int, int | None, int], **options: Any) -> tuple[FusedDenseBlock, nn.Module]:
    """Our block and the reference, equal, their ReLUs' inputs clear of zero."""
    dims = x.dim() - 2
    theirs = reference.DenseBlock(*size, spatial_dims=dims)
    keep_clear_of_zero(theirs, x)
    ours = FusedDenseBlock(*size, spatial_dims=dims, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def small(**options: Any) -> tuple[FusedDenseBlock, nn.Module, Tensor]:
    x = bimodal(2, SMALL[1], 4, 5)
    return *pair(x, SMALL, **options), x


@functools.cache
def torchvision_results(size: tuple[int, int, int], clear: bool) -> tuple[Any, ...]:
    """State, input, the step in float64 and in float32; channels-last, as ours sums in that order too."""
    layers, features, growth = size
    block = peers.DenseBlock(layers, features, 4, growth, 0.0)
    x = bimodal(2, features, 5, 4) if clear else torch.randn(2, features, 9, 7)
    if clear:
        keep_clear_of_zero(block, x)
    state = copy.deepcopy(block.state_dict())
    exact = step(copy.deepcopy(block).double(), x.double())
    return state, x, exact, step(block, x.contiguous(memory_format=torch.channels_last))


@sizes
@both_memory_modes
def test_torchvisions_block(size: tuple[int, int, int], memory_efficient: bool, backend: str) -> None:
    layers, features, growth = size
    state, x, exact, expected = torchvision_results(size, clear=True)
    block = FusedDenseBlock(layers, features, 4, growth, memory_efficient=memory_efficient)
    block.load_state_dict(state)
    actual = step(block, x)
    assert_same(actual, exact, "float32 whole block")
    assert_no_worse(actual, expected, exact)


@sizes
def test_torchvisions_block_as_it_is_initialised(size: tuple[int, int, int], backend: str) -> None:
    """Inputs of ReLU lie on both sides of zero; some are within rounding of it, and change the gradients a little."""
    layers, features, growth = size
    state, x, exact, _ = torchvision_results(size, clear=False)
    block = FusedDenseBlock(layers, features, 4, growth)
    block.load_state_dict(state)
    actual = step(block, x)
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        if name.endswith("gradient"):
            assert rms(actual[name] - value) <= tolerance("flips") * rms(value), name
        else:
            assert_same({name: actual[name]}, {name: value}, "float32 whole block")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("spatial", [(40,), (5, 8), (3, 4, 5), (2, 4, 4)], ids=str)
def test_every_dimension(spatial: tuple[int, ...], bn_size: int | None, training: bool, backend: str) -> None:
    x = bimodal(2, 20, *spatial)
    ours, theirs = pair(x, (4, 20, bn_size, 12))
    assert_parity(ours.train(training), theirs.train(training), x)


@both_memory_modes
@pytest.mark.parametrize("frozen", ["all", "norm1", "norm2", "denselayer2"])
def test_frozen_norms(frozen: str, memory_efficient: bool, backend: str) -> None:
    ours, theirs, x = small(memory_efficient=memory_efficient)
    for block in (ours, theirs):
        for name, module in block.named_modules():
            if isinstance(module, nn.BatchNorm2d) and (frozen == "all" or frozen in name):
                module.eval()
    assert_parity(ours, theirs, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": None},
        {"momentum": 0.3, "eps": 0.01},
        {"momentum": 0.0},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_settings_of_the_norms(settings: dict[str, Any], training: bool, backend: str) -> None:
    """Over two steps. Without a bias nothing keeps ReLU's inputs clear of zero: there, in float64."""
    ours, theirs, x = small()
    for block in (ours, theirs):
        for layer in block.children():
            for name in ("norm1", "norm2"):
                old = getattr(layer, name)
                norm = nn.BatchNorm2d(old.num_features, **settings)
                norm.load_state_dict({k: v for k, v in old.state_dict().items() if k in norm.state_dict()})
                setattr(layer, name, norm)
        block.train(training)
    if settings.get("affine", True):
        assert_parity(ours, theirs, x, steps=2)
    else:
        x = x.double()
        assert_same(step(ours.double(), x, steps=2), step(theirs.double(), x, steps=2), "float64 whole block")


def test_statistics_are_updated_once_where_the_bottleneck_is_recomputed(backend: str) -> None:
    results = []
    for memory_efficient in (False, True):
        torch.manual_seed(1)
        block = FusedDenseBlock(*SMALL, memory_efficient=memory_efficient)
        results.append(step(block, torch.randn(2, 8, 6, 6)))
    kept, recomputed = results
    assert kept.keys() == recomputed.keys()
    for name, value in kept.items():
        assert torch.equal(recomputed[name], value), name
        assert not name.endswith("num_batches_tracked") or value == 1


@pytest.mark.parametrize("drop_rate", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("training", [True, False])
@both_memory_modes
def test_dropout(memory_efficient: bool, training: bool, drop_rate: float, backend: str) -> None:
    """The same numbers from the same seed as torchvision's block, and the generator left in the same state."""
    theirs = peers.DenseBlock(*SMALL, drop_rate, False).train(training)
    ours = FusedDenseBlock(*SMALL, drop_rate, memory_efficient).train(training)
    ours.load_state_dict(theirs.state_dict())
    results, states = [], []
    for block in (ours, theirs):
        torch.manual_seed(3)
        results.append(step(block, torch.randn(2, 8, 5, 6)))
        states.append(torch.get_rng_state())
    actual, expected = results
    assert torch.equal(*states)
    assert torch.equal(actual["output"] == 0, expected["output"] == 0)
    assert_same(actual, expected, "float32 whole block")


@both_memory_modes
@pytest.mark.parametrize("wanted", ["", "denselayer2.conv1", "norm", "conv", "norm1.bias", "denselayer3", "weight"])
@pytest.mark.parametrize("input_wanted", [True, False])
def test_gradients_of_a_subset(wanted: str, input_wanted: bool, memory_efficient: bool, backend: str) -> None:
    ours, theirs, x = small(memory_efficient=memory_efficient)
    for block in (ours, theirs):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(bool(wanted) and wanted in name)
    gradients: list[dict[str, Tensor]] = []
    for block in (ours, theirs):
        leaf = x.clone().requires_grad_(input_wanted)
        out = block(leaf)
        assert out.requires_grad == (bool(wanted) or input_wanted)
        if out.requires_grad:
            out.square().sum().backward()
        assert (leaf.grad is not None) == input_wanted
        found = {"x": leaf.grad, **{name: p.grad for name, p in block.named_parameters()}}
        gradients.append({"out": out.detach(), **{k: g for k, g in found.items() if g is not None}})
    assert_same(*gradients, "float32 whole block")


def make_layout(layout: str, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((n + 1, c + 3, h, 2 * w), float("nan"), dtype=x.dtype)
        wide[1:, 2:-1, :, ::2] = x
        return wide[1:, 2:-1, :, ::2]
    if layout == "sliced channels last":
        wide = torch.full((n, h, w, c + 5), float("nan"), dtype=x.dtype).permute(0, 3, 1, 2)
        wide[:, :c] = x
        return wide[:, :c]
    if layout == "expanded over the batch":
        return x[:1].expand(n, c, h, w)
    if layout == "expanded over channels":
        return x[:, :1].expand(n, c, h, w)
    return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


@pytest.mark.parametrize(
    "layout",
    [
        "channels last",
        "sliced",
        "sliced channels last",
        "expanded over the batch",
        "expanded over channels",
        "reversed",
    ],
)
def test_input_layouts(layout: str, backend: str) -> None:
    ours, theirs, x = small()
    ours, theirs, x = ours.double(), theirs.double(), x.double()
    given = make_layout(layout, x)
    results = []
    for block, leaf in ((ours, given), (theirs, given.contiguous())):
        leaf = leaf.detach().requires_grad_()
        out = block(leaf)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        results.append({"out": out.detach(), "grad": grad})
    assert_same(*results, "float64 whole block")


@pytest.mark.parametrize("layout", ["channels last", "sliced", "expanded over the batch", "reversed"])
def test_gradient_layouts(layout: str, backend: str) -> None:
    ours, theirs, x = small()
    ours, theirs, x = ours.double(), theirs.double(), x.double()
    dout = make_layout(layout, torch.randn(2, 20, 4, 5, dtype=torch.float64))
    results = []
    for block in (ours, theirs):
        leaf = x.clone().requires_grad_()
        grads = torch.autograd.grad(block(leaf), [leaf, *block.parameters()], dout)
        results.append({str(i): g for i, g in enumerate(grads)})
    assert_same(*results, "float64 whole block")


@pytest.mark.parametrize(("training", "batch", "side"), [(True, 1, 4), (True, 3, 1), (False, 1, 1), (False, 2, 3)])
def test_smallest_images(training: bool, batch: int, side: int, backend: str) -> None:
    x = bimodal(3, SMALL[1], side, side)
    ours, theirs = pair(x, SMALL)
    x, ours, theirs = x[:batch].double(), ours.train(training), theirs.train(training).double()
    exact = step(theirs, x)
    assert_same(step(copy.deepcopy(ours).double(), x), exact, "float64 whole block")
    assert_same(step(ours, x.float()), exact, "float32 few pixels")


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 8, 0, 5)], ids=str)
def test_empty_inputs(shape: tuple[int, ...], training: bool) -> None:
    """What torchvision does; where that is an error, one that leaves the statistics alone."""
    theirs = peers.DenseBlock(*SMALL, 0.0).train(training)
    ours = FusedDenseBlock(*SMALL).train(training)
    ours.load_state_dict(theirs.state_dict())
    try:
        expected = step(theirs, torch.zeros(shape))
    except RuntimeError:
        before = copy.deepcopy(ours.state_dict())
        with pytest.raises(ValueError, match="init_features: expected sizes of at least 1"):
            step(ours, torch.zeros(shape))
        assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
        return
    actual = step(ours, torch.zeros(shape))
    assert actual["output"].shape == (shape[0], 20, *shape[2:])
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, equal_nan=True, rtol=0, atol=0)


def test_copies(backend: str) -> None:
    ours, _, x = small(memory_efficient=True, drop_rate=0.5)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), _saved_and_loaded(ours)):
        results = []
        for block in (copy.deepcopy(ours), copied):
            torch.manual_seed(2)
            results.append(step(block, x))
        assert all(torch.equal(results[1][name], value) for name, value in results[0].items())
        assert copied.memory_efficient and copied["denselayer1"].drop_rate == 0.5


def _saved_and_loaded(block: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def test_state_dict_both_ways() -> None:
    theirs, ours = peers.DenseBlock(*SMALL, 0.0), FusedDenseBlock(*SMALL)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    step(theirs, torch.randn(2, 8, 4, 4))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    step(ours, torch.randn(2, 8, 4, 4))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert ours.state_dict()["denselayer1.norm1.num_batches_tracked"] == 2


def test_same_initialisation_from_the_same_seed() -> None:
    states = []
    for make in (peers.DenseBlock, FusedDenseBlock):
        torch.manual_seed(4)
        states.append(make(*SMALL, 0.0).state_dict())
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


@both_memory_modes
@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool, memory_efficient: bool, backend: str) -> None:
    """An input in bfloat16, as the convolution before the block makes it: torchvision's dtypes, and no more error."""
    x = bimodal(4, 32, 6, 6).bfloat16()
    ours, theirs = pair(x.float(), (5, 32, 4, 12), memory_efficient=memory_efficient)
    ours, theirs = ours.train(training), theirs.train(training)
    exact = step(copy.deepcopy(theirs).double(), x.double())
    actual, expected = (step(block, x, autocast=torch.bfloat16) for block in (ours, theirs))
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in expected.items()}
    assert_no_worse(actual, expected, exact)


@both_memory_modes
def test_autocast_of_a_float32_input(memory_efficient: bool, backend: str) -> None:
    """Concatenation would make the output float32; the block computes in float32 too, as without autocast."""
    ours, theirs, x = small(memory_efficient=memory_efficient)
    plain = step(copy.deepcopy(ours), x)
    actual, expected = (step(block, x, autocast=torch.bfloat16) for block in (ours, theirs))
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in expected.items()}
    assert_same(actual, plain, "float32 whole block")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_parameters(dtype: torch.dtype, backend: str) -> None:
    x = bimodal(2, 32, 5, 4).to(dtype)
    ours, theirs = pair(x.float(), (5, 32, 4, 12))
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    exact = step(copy.deepcopy(theirs).double(), x.double())
    expected, actual = step(theirs, x), step(ours, x)
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in expected.items()}
    assert_no_worse(actual, expected, exact)


@both_memory_modes
def test_two_backward_passes(memory_efficient: bool, backend: str) -> None:
    block, _, x = small(memory_efficient=memory_efficient)
    x.requires_grad_()
    loss = block(x).square().sum()
    inputs = [x, *block.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(training: bool, backend: str) -> None:
    ours, _, x = small()
    results = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        block = copy.deepcopy(ours).train(training)
        with context():
            out = block(x)
        assert out.requires_grad == (context is torch.enable_grad)
        results.append([out.detach(), *block.buffers()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@both_memory_modes
def test_change_of_the_output_is_noticed(memory_efficient: bool, backend: str) -> None:
    block, _, x = small(memory_efficient=memory_efficient)
    out = block(x.requires_grad_())
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_input_may_change_after_the_block(backend: str) -> None:
    """The block holds a copy: torch.cat would too."""
    block, _, x = small()
    block.eval()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(block(leaf).square().sum(), leaf)
    leaf = x.clone().requires_grad_()
    moved = leaf * 1
    loss = block(moved).square().sum()
    moved.zero_()
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(gradient, expected)


@both_memory_modes
@pytest.mark.parametrize("training", [True, False])
def test_double_backward(training: bool, memory_efficient: bool, backend: str) -> None:
    """A gradient penalty, against torchvision's."""
    theirs = peers.DenseBlock(*SMALL, 0.0).double().train(training)
    ours = FusedDenseBlock(*SMALL, memory_efficient=memory_efficient).double().train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    results = []
    for block in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
        wanted = [leaf, *block.parameters()]
        second = torch.autograd.grad(gradient.square().sum(), wanted)
        results.append({str(i): g for i, g in enumerate(second)})
    assert_same(*results, "float64 whole block")


def test_two_calls_before_one_backward(backend: str) -> None:
    ours, theirs, x = small()
    results = []
    for block in (ours.double(), theirs.double()):
        leaf = x.double().requires_grad_()
        loss = block(leaf).square().sum() + block(leaf.flip(0) * 2).sum()
        grads = torch.autograd.grad(loss, [leaf, *block.parameters()])
        results.append({**{str(i): g for i, g in enumerate(grads)}, **dict(block.named_buffers())})
    assert_same(*results, "float64 whole block")


def test_output_is_channels_last_and_named_by_logical_shape(backend: str) -> None:
    block = FusedDenseBlock(2, 8, 2, 4)
    out = block(torch.randn(2, 8, 3, 5))
    assert out.shape == (2, 16, 3, 5)
    assert out.is_contiguous(memory_format=torch.channels_last)


class Copies(TorchDispatchMode):
    """The shapes that are copied inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default):
            self.shapes.append(args[0].shape)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_weights_are_not_copied(layout: torch.memory_format, backend: str) -> None:
    """They have the strides of their weights: autograd's accumulation takes them as they are."""
    network = nn.Sequential(FusedDenseBlock(2, 16, 4, 8), FusedTransition(32, 16)).to(memory_format=layout)
    out = network(torch.randn(2, 16, 7, 5)).sum()
    with Copies() as copies:
        out.backward()
    weights = [parameter for parameter in network.parameters() if parameter.dim() == 4]
    for weight in weights:
        assert weight.grad is not None and weight.grad.stride() == weight.stride()
    assert not set(copies.shapes) & {weight.shape for weight in weights}


@pytest.mark.parametrize("threads", [1, 2])
@both_memory_modes
def test_two_runs_give_the_same_bits(memory_efficient: bool, threads: int, backend: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block = FusedDenseBlock(4, 33, 4, 12, memory_efficient=memory_efficient)
        x = torch.randn(2, 33, 15, 17)
        first, second = (step(copy.deepcopy(block), x) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize("threads", [3, 7])
def test_many_threads(threads: int) -> None:
    """More parts than two of everything that is summed up."""
    ours, theirs = FusedDenseBlock(2, 16, 4, 8), reference.DenseBlock(2, 16, 4, 8)
    x = bimodal(4, 16, 24, 20)
    keep_clear_of_zero(ours, x)
    theirs.load_state_dict(ours.state_dict())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {dtype: step(copy.deepcopy(ours).to(dtype), x.to(dtype)) for dtype in (torch.float32, torch.float64)}
    finally:
        torch.set_num_threads(before)
    expected = step(theirs.double(), x.double())
    assert_same(found[torch.float64], expected, "float64 whole block")
    assert_same(found[torch.float32], expected, "float32 whole block")


def test_backend_of_the_forward_pass_serves_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    block = FusedDenseBlock(*SMALL)
    with use_backend("eager"):
        out = block(torch.randn(2, 8, 4, 4))
    called = []
    whole = torch.ops.aten.convolution_backward

    def counted(*args: Any) -> Any:
        called.append(args)
        return whole(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", counted)
    with use_backend("cpu"):
        out.sum().backward()
    assert len(called) == 6


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_an_eps_that_torch_refuses(eps: float) -> None:
    ours, theirs, x = small()
    for block in (ours, theirs):
        block.get_submodule("denselayer2.norm2").eps = eps
    with pytest.raises(ValueError, match="eps"):
        theirs(x)
    with pytest.raises(ValueError, match="eps"), pytest.warns(FallbackWarning, match="norm2 has an eps of"):
        ours(x)
