"""A whole dense block on interpreted kernels against the reference: every result of a training step, and of eval."""

import copy

import blocks
import networks
import pytest
import tolerances
import torch
import triton_cpu
from cases import float32_products

from fused_densenet import FusedDenseBlock, reference, use_backend
from fused_densenet.backends.triton import affine, launch

SIZES = {1: (2, 67), 2: (2, 7, 5), 3: (1, 3, 5, 3)}
SHAPES = [(5, None), (12, 4)]  # growth rate, bn_size


def pair(
    spatial_dims: int, growth: int, bn_size: int | None, memory_efficient: bool = False
) -> tuple[reference.DenseBlock, FusedDenseBlock, torch.Tensor]:
    channels = 7
    theirs = reference.DenseBlock(2, channels, bn_size, growth, spatial_dims=spatial_dims)
    n, *spatial = SIZES[spatial_dims]
    x = blocks.bimodal(n, channels, *spatial)
    blocks.keep_clear_of_zero(theirs, x)
    ours = FusedDenseBlock(2, channels, bn_size, growth, memory_efficient=memory_efficient, spatial_dims=spatial_dims)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, x


def run(block: FusedDenseBlock, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with use_backend("triton"), triton_cpu.watch(), float32_products("ieee"):
        return blocks.step(block, x)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize(("growth", "bn_size"), SHAPES, ids=["plain", "bottleneck"])
def test_float32(spatial_dims: int, growth: int, bn_size: int | None) -> None:
    theirs, ours, x = pair(spatial_dims, growth, bn_size, memory_efficient=spatial_dims == 3)
    expected = blocks.step(theirs.double(), x.double())
    tolerances.assert_same(run(ours, x), expected, "float32 whole block")


def test_float32_in_eval() -> None:
    theirs, ours, x = pair(1, 12, 4)
    expected = blocks.step(theirs.double().eval(), x.double())
    tolerances.assert_same(run(ours.eval(), x), expected, "float32 whole block")


@pytest.mark.parametrize(("spatial_dims", "growth", "bn_size"), [(1, 12, 4), (2, 5, None), (2, 12, 4), (3, 12, 4)])
def test_bfloat16(spatial_dims: int, growth: int, bn_size: int | None) -> None:
    theirs, ours, x = pair(spatial_dims, growth, bn_size)
    exact_block = copy.deepcopy(theirs).bfloat16().double()
    exact = blocks.step(exact_block, x.bfloat16().double())
    operators = blocks.step(theirs.bfloat16(), x.bfloat16())
    for name, value in run(ours.bfloat16(), x.bfloat16()).items():
        if value.is_floating_point():
            tolerances.assert_error_ratio(value, operators[name], exact[name], torch.bfloat16, name)


def test_deterministic() -> None:
    _, ours, x = pair(1, 12, 4)
    again = copy.deepcopy(ours)
    first, second = run(ours, x), run(again, x)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_network_as_one(training: bool) -> None:
    x, model = torch.randn(2, 8, 9, 10), networks.sequence().train(training)

    def result(model: torch.nn.Module, x: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
        with use_backend(backend), triton_cpu.watch(), float32_products("ieee"), torch.set_grad_enabled(training):
            return networks.pooled(blocks.step(model, x) if training else {"output": model(x)})

    mine = result(copy.deepcopy(model), x, "triton")
    tolerances.assert_same(mine, result(model.double(), x.double(), "eager"), "float32 whole block")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_a_launch_has_one_dtype_for_each_tensor(default: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch's default is: a launch keeps what was compiled for the first tensors."""
    theirs, ours, x = pair(2, 12, 4)
    expected = blocks.step(theirs.double(), x.double())
    seen: dict[launch.Launch, set[tuple[torch.dtype | None, ...]]] = {}
    execute = launch.execute

    def note(it: launch.Launch, tensors: tuple[torch.Tensor | None, ...]) -> None:
        seen.setdefault(it, set()).add(tuple(None if tensor is None else tensor.dtype for tensor in tensors))
        execute(it, tensors)

    affine._constants.cache_clear()
    monkeypatch.setattr(launch, "execute", note)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        with use_backend("triton"), float32_products("ieee"):
            actual = blocks.step(ours, x)
    finally:
        torch.set_default_dtype(before)
    tolerances.assert_same(actual, expected, "float32 whole block")
    assert seen and all(len(dtypes) == 1 for dtypes in seen.values())
