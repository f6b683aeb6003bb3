"""CSPDenseBlock and CSPDenseNet against their plain twins, and against DenseNet in what they cost."""

import copy
import io
import itertools
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from blocks import step
from hypothesis import given, settings
from networks import assert_same_step
from tolerances import assert_same, rms, tolerance
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_densenet import (
    CSPDenseBlock,
    CSPDenseNet,
    csp_densenet121,
    csp_densenet169,
    csp_densenet201,
    csp_densenet264,
    densenet121,
    reference,
)

FUSIONS = ("first", "last", "both")
SHAPES = {1: (3, 12, 9), 2: (3, 12, 6, 7), 3: (2, 12, 4, 5, 4)}


def pair(
    layers: int = 3, width: int = 12, bn_size: int | None = 4, k: int = 4, *, memory_efficient: bool = False, **keywords
) -> tuple[CSPDenseBlock, reference.CSPDenseBlock]:
    keywords.setdefault("num_output_features", 14)
    ours = CSPDenseBlock(layers, width, bn_size, k, 0.0, memory_efficient, **keywords)
    theirs = reference.CSPDenseBlock(layers, width, bn_size, k, **keywords)
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@torch.no_grad()
def randomise_norms(network: nn.Module) -> None:
    for name, tensor in network.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand_like(tensor) if not name.endswith("bias") else torch.randn_like(tensor) / 4)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_float64_forward_gradients_and_buffers(
    fusion: str, spatial_dims: int, pool: bool, memory_efficient: bool, backend: str
) -> None:
    ours, theirs = pair(fusion=fusion, spatial_dims=spatial_dims, pool=pool, memory_efficient=memory_efficient)
    x = torch.randn(SHAPES[spatial_dims], dtype=torch.float64)
    expected = step(theirs.double(), x, steps=2)
    assert_same_step(step(ours.double(), x, steps=2), expected)
    ours.eval()
    theirs.eval()
    assert_same_step(step(ours, x), step(theirs, x))


@pytest.mark.parametrize("split_ratio", [0.0, 0.1, 0.25, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_any_split_ratio(fusion: str, split_ratio: float) -> None:
    ours, theirs = pair(fusion=fusion, split_ratio=split_ratio, bn_size=None)
    x = torch.randn(SHAPES[2], dtype=torch.float64)
    assert_same_step(step(ours.double(), x), step(theirs.double(), x))
    assert ours.denseblock.num_input_features == 12 - int(12 * split_ratio)


@settings(max_examples=25)
@given(
    layers=st.integers(1, 3),
    width=st.integers(2, 9),
    growth_rate=st.integers(1, 5),
    out=st.integers(10, 16),
    split_ratio=st.floats(0, 0.99),
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    fusion=st.sampled_from(FUSIONS),
)
def test_any_shape(
    layers: int, width: int, growth_rate: int, out: int, split_ratio: float, sizes: list[int], fusion: str
) -> None:
    shape = {"num_output_features": out, "split_ratio": split_ratio, "fusion": fusion, "spatial_dims": len(sizes)}
    ours, theirs = pair(layers, width, 2, growth_rate, **shape)
    x = torch.randn(3, width, *sizes, dtype=torch.float64)
    # A batch norm over few values can divide by next to nothing: eval mode does not.
    assert_same_step(step(ours.double().eval(), x), step(theirs.double().eval(), x))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_float32_is_as_exact_as_operator_by_operator(fusion: str, backend: str) -> None:
    ours, theirs = pair(6, 32, 4, 8, fusion=fusion, num_output_features=40)
    x = torch.randn(8, 32, 10, 10)
    exact = step(copy.deepcopy(theirs).double(), x.double())
    found, expected = step(ours, x), step(theirs, x)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if value.is_floating_point():
            error, limit = rms(found[name].double() - value), rms(expected[name].double() - value)
            allowed = tolerance("error ratio") * limit + tolerance("flips") * rms(value)
            assert error <= allowed, f"{name}: error {error:.3g}, operator by operator {limit:.3g}"
        else:
            assert torch.equal(found[name], value), name


def test_dropout_draws_the_same_numbers() -> None:
    ours = CSPDenseBlock(3, 12, 4, 4, 0.3, num_output_features=14)
    theirs = reference.CSPDenseBlock(3, 12, 4, 4, 0.3, num_output_features=14)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(SHAPES[2], dtype=torch.float64)
    torch.manual_seed(1)
    expected = step(theirs.double(), x)
    torch.manual_seed(1)
    assert_same_step(step(ours.double(), x), expected)


def test_the_part_around_reaches_the_end_unchanged() -> None:
    """Fusion last: the result's last channels are the input's first ones, averaged; their gradient meets no weight."""
    block = CSPDenseBlock(2, 8, 4, 4, fusion="last", num_output_features=10).double()
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64, requires_grad=True)
    out = block(x)
    torch.testing.assert_close(out[:, -4:], nn.functional.avg_pool2d(x[:, :4], 2))
    out[:, -4:].sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[:, :4], torch.full_like(x[:, :4], 0.25))
    assert not x.grad[:, 4:].any()
    assert all(p.grad is None or not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"fusion": "middle"}, ValueError, "fusion: expected 'first', 'last' or 'both', got 'middle'"),
        ({"split_ratio": 1.0}, ValueError, "split_ratio: expected a share of at least 0 and below 1, got 1.0"),
        ({"split_ratio": -0.5}, ValueError, "split_ratio: expected"),
        ({"fusion": "last", "num_output_features": 6}, ValueError, "expected at least 7 for fusion 'last', got 6"),
        ({"num_output_features": 1}, ValueError, "num_output_features: expected at least 2 for fusion 'both', got 1"),
        ({"spatial_dims": 4}, ValueError, "spatial_dims: expected 1, 2 or 3, got 4"),
    ],
)
def test_bad_arguments(keywords: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CSPDenseBlock(2, 12, 4, 4, **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fusion", "least"), [("last", 9), ("both", 2)])
def test_compression_that_leaves_a_stage_too_little(fusion: str, least: int) -> None:
    with pytest.raises(ValueError, match=rf"^compression: expected a share that leaves {least} of 20 channels .*0.05"):
        CSPDenseNet(4, (1, 1), 16, fusion=fusion, compression=0.05)


def test_bad_input_leaves_the_buffers_alone() -> None:
    block = CSPDenseBlock(2, 12, 4, 4)
    before = copy.deepcopy(block.state_dict())
    for x, error in ((torch.randn(2, 11, 4, 4), ValueError), (torch.randn(2, 12, 4), ValueError)):
        with pytest.raises(error, match="expected"):
            block(x)
    with pytest.raises(TypeError, match="dtype"):
        block(torch.ones(2, 12, 4, 4, dtype=torch.long))
    assert_same(block.state_dict(), before, "float64 whole block")


def networks(**keywords: object) -> tuple[CSPDenseNet, reference.CSPDenseNet]:
    small = {"growth_rate": 4, "block_config": (2, 3, 2), "num_init_features": 8, "num_classes": 5, **keywords}
    ours, theirs = CSPDenseNet(**small), reference.CSPDenseNet(**small)  # type: ignore[arg-type]
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_network(fusion: str, spatial_dims: int) -> None:
    ours, theirs = networks(fusion=fusion, spatial_dims=spatial_dims, in_channels=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, 2, *[32] * spatial_dims, dtype=torch.float64)
    assert_same_step(step(ours.double(), x), step(theirs.double(), x))


@pytest.mark.parametrize("split_ratio", [0.25, 0.75])
def test_small_inputs_without_bottleneck(split_ratio: float) -> None:
    ours, theirs = networks(split_ratio=split_ratio, small_inputs=True, bn_size=None, compression=1.0)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert_same_step(step(ours.double(), x), step(theirs.double(), x))


@pytest.mark.parametrize(("fusion", "compiler"), [*((fusion, "aot_eager") for fusion in FUSIONS), ("both", "inductor")])
def test_compile(fusion: str, compiler: str) -> None:
    ours, _ = networks(fusion=fusion, small_inputs=True)
    eager = copy.deepcopy(ours)
    x = torch.randn(3, 3, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=compiler)
    expected = step(eager, x)
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x).items()}
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_autocast(fusion: str) -> None:
    ours, theirs = networks(fusion=fusion, small_inputs=True)
    x = torch.randn(16, 3, 16, 16)
    exact = output_and_gradients(copy.deepcopy(theirs).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = output_and_gradients(ours, x), output_and_gradients(theirs, x)
    assert found["output"].dtype == expected["output"].dtype == torch.bfloat16
    for name, value in exact.items():
        error, limit = rms(found[name].double() - value), rms(expected[name].double() - value)
        # Two bfloat16 runs differ by chance too: a tenth of what either loses to rounding, at this size.
        assert error <= 1.6 * limit, f"{name}: error {error:.3g}, operator by operator {limit:.3g}"


def output_and_gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out = network(x)
    (out.double().square().sum() / 2).backward()
    weights = [p.grad.flatten() for n, p in network.named_parameters() if p.grad is not None and "conv" in n]
    return {"output": out.detach(), "gradients of the convolutions": torch.cat(weights)}


def test_copy_pickle_and_state_dict() -> None:
    ours, _ = networks(fusion="both")
    x = torch.randn(2, 3, 32, 32)
    expected = ours.eval()(x)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other, _ = networks(fusion="both")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(copy.deepcopy(ours)(x), expected)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def parameters_with_both(layers: tuple[int, ...]) -> int:
    """By arithmetic: convolutions, two numbers for each channel that a norm reads, the classifier."""
    k, width, total = 32, 64, 3 * 64 * 49 + 2 * 64
    for i, count in enumerate(layers, 1):
        whole = width + count * k
        out, around = whole if i == len(layers) else whole // 2, width // 2
        for channels in range(width - around, whole - around, k):
            total += 2 * channels + channels * 4 * k + 2 * 4 * k + 4 * k * k * 9
        for channels, result in ((whole - around, out // 2), (out // 2 + around, out)):
            total += 2 * channels + channels * result
        width = out
    return total + 2 * width + 1000 * (width + 1)


@pytest.mark.parametrize(
    ("build", "layers", "millions"),
    [
        (csp_densenet121, (6, 12, 24, 16), "7.977"),
        (csp_densenet169, (6, 12, 32, 32), "15.008"),
        (csp_densenet201, (6, 12, 48, 32), "20.975"),
        (csp_densenet264, (6, 12, 64, 48), "35.942"),
    ],
)
def test_constructors(build: Callable[..., CSPDenseNet], layers: tuple[int, ...], millions: str) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build().parameters())
        assert parameters == parameters_with_both(layers)
        assert f"{parameters / 1e6:.3f}" == millions
        small = build(num_classes=10, in_channels=1, spatial_dims=3, block_config=(1, 1))
    assert small.classifier.out_features == 10
    assert small.features.conv0.weight.shape == (64, 1, 7, 7, 7)


def flops(network: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return counter.get_total_flops()


def kept(network: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps besides parameters and buffers, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(network.parameters(), network.buffers())}
    seen: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(x)
    return sum(seen.values())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fewer_multiply_adds_than_densenet(fusion: str) -> None:
    """At 224²: 7.3 % fewer with fusion first, 11.8 % with fusion last, 12.1 % with both."""
    with torch.device("meta"):
        x = torch.empty(1, 3, 224, 224)
        ours, dense = flops(reference.CSPDenseNet(fusion=fusion), x), flops(reference.DenseNet(), x)
    saved = {"first": 0.0725, "last": 0.1178, "both": 0.1212}[fusion]
    assert ours / dense == pytest.approx(1 - saved, abs=1e-4)


def test_fused_network_multiplies_pooled_features() -> None:
    """What its twin counts, but for three quarters of the convolutions that pooling follows, of 8x8 and 4x4 pixels."""
    ours, theirs = networks(fusion="both")
    x = torch.randn(1, 3, 32, 32)
    pooled = [theirs.get_submodule(f"features.stage{stage}.dense_transition.conv") for stage in (1, 2)]
    saved = sum(2 * conv.weight.numel() * pixels * 3 // 4 for conv, pixels in zip(pooled, (64, 16), strict=True))
    assert flops(ours, x) == flops(theirs, x) - saved


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize(("fusion", "most"), [("last", 1.0), ("both", 1.02)])
def test_keeps_no_more_than_densenet(fusion: str, most: float, memory_efficient: bool) -> None:
    """Per pixel the same at every image size, but for the vectors of the batch norms.

    Fused, a DenseNet keeps nothing but its blocks and its stem; "both" has the concatenation between its transitions too.
    """
    x = torch.randn(1, 3, 128, 128)
    ours = kept(csp_densenet121(fusion=fusion, memory_efficient=memory_efficient), x)
    assert ours < most * kept(densenet121(memory_efficient=memory_efficient), x)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_plain_twin_keeps_a_tenth_less(fusion: str) -> None:
    x = torch.randn(1, 3, 128, 128)
    assert kept(reference.CSPDenseNet(fusion=fusion), x) < 0.9 * kept(reference.DenseNet(), x)
