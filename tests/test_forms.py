"""Blocks and transitions with biases, leaky activations, dropout after both convolutions, or their new features alone."""

import contextlib
import copy
import warnings
from typing import Any

import peers
import pytest
import torch
from blocks import bimodal, keep_clear_of_zero, step
from networks import assert_same_step
from small_networks import results
from tolerances import assert_no_worse, assert_same
from torch import Tensor, nn

from fused_densenet import FusedDenseBlock, FusedTransition, fuse, reference, strict

FORMS: list[dict[str, Any]] = [
    {"bias": True},
    {"negative_slope": 0.2},
    {"return_new": True},
    {"bias": True, "negative_slope": 0.01, "return_new": True},
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)
SIZE = (3, 8, 2, 4)
PLAIN = (3, 8, None, 4)


def pair(size: tuple[int, int, int | None, int], form: dict[str, Any], **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    theirs = reference.DenseBlock(*size, **form).double()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    ours = FusedDenseBlock(*size, **form, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def without_zeros(exact: dict[str, Tensor], *others: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Without gradients that are nothing but rounding: of a bias before a norm that takes the batch's statistics."""
    zeros = {name for name, value in exact.items() if name.endswith("bias's gradient") and value.abs().max() < 1e-12}
    return [{name: value for name, value in one.items() if name not in zeros} for one in (exact, *others)]


@forms
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [SIZE, PLAIN], ids=["bottleneck", "plain"])
@pytest.mark.parametrize("training", [True, False])
def test_block(form: dict[str, Any], size: Any, training: bool) -> None:
    for memory_efficient in (False, True):
        ours, theirs = pair(size, form, memory_efficient=memory_efficient)
        x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
        with strict():
            found = step(ours.train(training), x)
        expected, compared = without_zeros(step(theirs.train(training), x), found)
        assert_same(compared, expected, "float64 whole block")
        assert all(value.abs().max() < 1e-12 for name, value in found.items() if name not in compared)


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(form: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = pair(SIZE, form)
    x = bimodal(2, 8, 9, 8).to(dtype)
    exact = step(copy.deepcopy(theirs), x.double())
    with strict():
        found = step(ours.float(), x, autocast=dtype)
    assert found["output"].dtype == dtype
    exact, *compared = without_zeros(exact, found, step(theirs.float(), x, autocast=dtype))
    assert_no_worse(*compared, exact)


@forms
def test_compiled(form: dict[str, Any]) -> None:
    ours, theirs = pair(SIZE, form)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x).items()}
    expected, compared = without_zeros(step(theirs, x), found)
    assert_same(compared, expected, "float64 whole block")


@forms
def test_operator_by_operator(form: dict[str, Any]) -> None:
    ours, theirs = pair(SIZE, form)
    ours.denselayer1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match="denselayer1 has hooks"):
        found = step(ours, x)
    expected, compared = without_zeros(step(theirs, x), found)
    assert_same(compared, expected, "float64 whole block")


@pytest.mark.parametrize("rates", [(0.0, 0.4), (0.3, 0.5), (0.3, 1.0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_dropout_of_bottlenecks(rates: tuple[float, float], training: bool, memory_efficient: bool) -> None:
    """The numbers that the unfused layers draw, in their order; operator by operator, too."""
    form = {"drop_rate": rates[0], "bottleneck_drop_rate": rates[1]}
    ours, theirs = pair(SIZE, form, memory_efficient=memory_efficient)
    by_operators = copy.deepcopy(ours)
    by_operators.denselayer2.conv2.register_forward_hook(lambda *_: None)
    x, results, states = torch.randn(2, 8, 5, 6, dtype=torch.float64), [], []
    for block in (theirs, ours, by_operators):
        torch.manual_seed(3)
        with contextlib.nullcontext() if block is not ours else strict(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(step(block.train(training), x))
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
    for found in results[1:]:
        assert_same(found, results[0], "float64 whole block")


def test_rate_of_bottlenecks_that_is_changed() -> None:
    ours, theirs = pair(SIZE, {"drop_rate": 0.2})
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    ours(x)
    for layer in (*ours.children(), *theirs.children()):
        layer.bottleneck_drop_rate = 0.6
    results = []
    for block in (ours, theirs):
        block.load_state_dict(theirs.state_dict())
        torch.manual_seed(3)
        with strict():
            results.append(step(block, x))
    assert_same(*results, "float64 whole block")


@pytest.mark.parametrize(("size", "value"), [(SIZE, -0.1), (SIZE, 1.5), (PLAIN, 0.5)])
def test_bad_rate_of_bottlenecks(size: Any, value: float) -> None:
    with pytest.raises(ValueError, match="bottleneck_drop_rate: expected "):
        FusedDenseBlock(*size, bottleneck_drop_rate=value)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_bad_slope(value: float) -> None:
    with pytest.raises(ValueError, match=f"negative_slope: expected a number between 0 and 1, got {value}"):
        FusedDenseBlock(*SIZE, negative_slope=value)


def test_statistics_of_new_features_go_on() -> None:
    """A transition that follows in a sequence takes those that the block took of what it returns."""
    block, follows = pair(SIZE, {"return_new": True})[1], reference.Transition(12, 6).double()
    theirs = nn.Sequential(block, follows)
    ours = nn.Sequential(FusedDenseBlock(*SIZE, return_new=True).double(), FusedTransition(12, 6).double())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with strict():
        assert_same_step(results(fuse(ours), x), results(theirs, x))


@pytest.mark.parametrize("change", ["bias", "leaky", "both"])
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("pool", [True, False])
def test_transition(change: str, pool: bool) -> None:
    theirs = reference.Transition(10, 6)
    if not pool:
        del theirs.pool
    if change != "leaky":
        theirs.conv = nn.Conv2d(10, 6, 1)
    if change != "bias":
        theirs.relu = nn.LeakyReLU(0.1)
    ours = FusedTransition(10, 6, pool=pool)
    ours.conv, ours.relu = copy.deepcopy(theirs.conv), copy.deepcopy(theirs.relu)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 10, 7, 5, dtype=torch.float64)
    with strict():
        assert_same(step(ours.double(), x), step(theirs.double(), x), "float64 whole block")


def test_a_bias_in_some_layers() -> None:
    theirs = peers.DenseBlock(3, 8, 2, 4, 0.0)
    theirs.denselayer2.conv1 = nn.Conv2d(12, 8, 1)
    theirs.denselayer3.relu2 = nn.LeakyReLU(0.3)
    ours = fuse(copy.deepcopy(theirs), strict=True).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    with strict():
        expected, compared = without_zeros(step(theirs.double(), x), step(ours, x))
    assert_same(compared, expected, "float64 whole block")


def test_pruned_layer(backend: str) -> None:
    """Layers of other widths than their neighbours, whatever the backend."""

    def prune(block: Any) -> nn.Module:
        torch.manual_seed(1)
        block.denselayer1.conv2 = nn.Conv2d(8, 3, 3, padding=1, bias=False)
        for layer, width in ((block.denselayer2, 11), (block.denselayer3, 15)):
            layer.norm1, layer.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 8, 1, bias=False)
        layer = block.denselayer3
        layer.conv1, layer.norm2 = nn.Conv2d(15, 5, 1, bias=False), nn.BatchNorm2d(5)
        layer.conv2 = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        return block

    theirs, ours = prune(reference.DenseBlock(*SIZE)), prune(FusedDenseBlock(*SIZE))
    x = bimodal(2, 8, 4, 5)
    keep_clear_of_zero(theirs, x)
    ours.load_state_dict(theirs.state_dict())
    exact = step(copy.deepcopy(theirs).double(), x.double())
    with strict():
        if backend != "triton":
            assert_same(step(copy.deepcopy(ours).double(), x.double()), exact, "float64 whole block")
        assert_same(step(ours, x), exact, "float32 whole block")
