"""Over several processes: the same as one process with the whole batch, and what is sent for it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from blocks import bimodal, keep_clear_of_zero, step
from tolerances import tolerance
from torch import Tensor, nn

from fused_densenet import FallbackError, FallbackWarning, FusedDenseBlock, strict

SIZE = (4, 16, 4, 8)  # layers, features, bn_size, growth_rate
VARIANTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "kept": (SIZE, {}),
    "recomputed": (SIZE, {"memory_efficient": True}),
    "plain": ((3, 7, None, 5), {}),
    "volumes": ((2, 6, 2, 4), {"spatial_dims": 3}),
}


def sync(module: nn.Module, group: Any = None) -> nn.Module:
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    return converted


def variant(name: str, images: int, dtype: torch.dtype) -> tuple[FusedDenseBlock, Tensor]:
    size, options = VARIANTS[name]
    x = bimodal(images, size[1], *(5, 4, 3)[: options.get("spatial_dims", 2)])
    block = FusedDenseBlock(*size, **options)
    keep_clear_of_zero(block, x)
    return block.to(dtype), x.to(dtype)


def own_step(block: nn.Module, x: Tensor, own: slice, whole_output: Tensor) -> dict[str, Tensor]:
    """``blocks.step`` on this rank's images; the parameters' gradients summed over the ranks."""
    leaf = x[own].clone().requires_grad_()
    out = block(leaf)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(whole_output.shape, generator=generator, dtype=torch.float64)[own].to(x.dtype))
    assert leaf.grad is not None
    result = {"output": out.detach(), "input's gradient": leaf.grad}
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        result[f"{name}'s gradient"] = parameter.grad
    return result | dict(block.named_buffers())


def assert_relative(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float, what: str) -> None:
    """``|actual - expected| <= limit |expected|`` in norm, for each kind of tensor, all layers together."""
    kinds: dict[str, list[str]] = {}
    for name in expected:
        kinds.setdefault(name.partition(".")[2], []).append(name)
    for kind, names in kinds.items():
        found, wanted = (torch.cat([values[n].flatten().double() for n in names]) for values in (actual, expected))
        error = ((found - wanted).norm() / wanted.norm()).item() if wanted.numel() else 0.0
        assert error <= limit, f"{what}, {kind or names[0]}: {error:.2g}"


def synchronised(rank: int, split: tuple[int, ...]) -> None:
    own = slice(sum(split[:rank]), sum(split[: rank + 1]))
    for dtype in (torch.float64, torch.float32):
        for name in VARIANTS:
            block, x = variant(name, sum(split), dtype)
            expected = step(copy.deepcopy(block), x)
            with strict():
                actual = own_step(sync(block), x, own, expected["output"])
            expected |= {key: expected[key][own] for key in ("output", "input's gradient")}
            assert_relative(actual, expected, tolerance(f"{dtype} over ranks"), f"{name} in {dtype}")


@pytest.mark.parametrize("split", [(3, 2), (4, 0)], ids=str)
def test_statistics_over_all_ranks(split: tuple[int, ...]) -> None:
    """Unequal shares and an empty one, against one process with the whole batch."""
    processes.run(synchronised, split)


def one_value(rank: int) -> None:
    block = FusedDenseBlock(*SIZE)
    x = torch.randn(2, SIZE[1], 1, 1)
    expected = copy.deepcopy(block)(x)
    with pytest.raises(ValueError, match="more than one value per channel"):
        block(x[:1])
    torch.testing.assert_close(sync(block)(x[rank : rank + 1]), expected[rank : rank + 1])


def modes(rank: int) -> None:
    """What needs no communication does none: only the first rank calls the block, and does not wait."""
    block = FusedDenseBlock(*SIZE)
    x = torch.randn(2, SIZE[1], 4, 4)
    block(x)
    synced = sync(copy.deepcopy(block))
    if rank == 0:
        with strict():
            assert torch.equal(synced.eval()(x), block.eval()(x))
            alone = sync(copy.deepcopy(block), dist.group.WORLD).train()
            for norm in (m for m in alone.modules() if isinstance(m, nn.SyncBatchNorm)):
                norm.eval()
            assert torch.equal(alone(x), block(x))


def groups(rank: int) -> None:
    """A group of its own for each rank is no group; norms that differ in it run by themselves."""
    x = torch.randn(2, SIZE[1], 4, 4)
    single = [dist.new_group([other]) for other in range(2)]
    block = FusedDenseBlock(*SIZE)
    with strict():
        assert torch.equal(sync(copy.deepcopy(block), single[rank])(x), block(x))
    block.denselayer2.norm1 = sync(block.denselayer2.norm1)
    with strict(), pytest.raises(FallbackError, match="statistics over different processes"):
        block(x)
    # Operator by operator torch's own SyncBatchNorm runs, which is not made for the CPU.
    with pytest.warns(FallbackWarning), pytest.raises(ValueError, match="expected input tensor to be on GPU"):
        block(x)


def second_order(rank: int) -> None:
    block = sync(FusedDenseBlock(*SIZE))
    x = torch.randn(2, SIZE[1], 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"neither a fused block nor torch's SyncBatchNorm"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("check", [one_value, modes, groups, second_order])
def test_synchronised_block(check: Callable[[int], None]) -> None:
    processes.run(check)
