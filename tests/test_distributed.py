"""Over several processes: the same as one process with the whole batch, and what is sent for it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import peers
import processes
import pytest
import releases
import report
import sync_batch_norm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from blocks import bimodal, keep_clear_of_zero, step
from networks import assert_same_step, images, torchvisions
from tolerances import assert_same, tolerance
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

from fused_densenet import FallbackError, FallbackWarning, FusedDenseBlock, FusedFeatures, FusedTransition, fuse, strict
from fused_densenet.fallback.reasons import quiet

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
        # torch's own SyncBatchNorm has no gradients for an empty batch.
        gradient = torch.zeros_like(parameter) if parameter.grad is None and not len(leaf) else parameter.grad
        assert gradient is not None, name
        dist.all_reduce(gradient)
        result[f"{name}'s gradient"] = gradient.detach()
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
    with pytest.raises(RuntimeError, match=r"neither a fused module nor torch's SyncBatchNorm"):
        gradient.square().sum().backward()


class Undefined(torch.autograd.Function):
    """The identity, which sends no gradient back, as torch's SyncBatchNorm does for an empty batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


def undefined_gradient(rank: int) -> None:
    """The other rank waits for this one's sums: none is sent back as zeros are."""
    channels = SIZE[1]
    stem = FusedFeatures(nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    for module in map(sync, (FusedDenseBlock(*SIZE), FusedTransition(channels, 4), stem)):
        x = torch.randn(2, channels, 4, 4)[rank : rank + 1].requires_grad_()
        inputs = [x, *module.parameters()]
        zeros, undefined = (
            torch.autograd.grad((module(x) if rank == 0 else last(module(x))).square().sum(), inputs)
            for last in (lambda out: 0 * out, Undefined.apply)
        )
        assert all(torch.equal(a, b) for a, b in zip(zeros, undefined, strict=True))
        assert undefined[0].any()


def compiled(rank: int) -> None:
    block = sync(FusedDenseBlock(2, 8, 2, 4))
    x = torch.randn(2, 8, 4, 4)
    with strict():
        expected = step(copy.deepcopy(block), x)
        actual = step(torch.compile(block, fullgraph=True, backend="aot_eager"), x)
    assert all(releases.same(a, b) for a, b in zip(actual.values(), expected.values(), strict=True))


@pytest.mark.parametrize("check", [one_value, modes, groups, second_order, undefined_gradient, compiled])
def test_synchronised_modules(check: Callable[[int], None]) -> None:
    processes.run(check)


def train(network: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for x in batches:
        optimizer.zero_grad()
        target = (1000 * x[:, 0, 0, 0]).long() % 5  # whatever batch an image is in
        F.cross_entropy(network(x), target).backward()
        optimizer.step()


def own_batches(rank: int, count: int = 3) -> list[Tensor]:
    return list(torch.stack([images(3) for _ in range(2 * count)])[rank::2])


def data_parallel(rank: int, options: dict[str, Any]) -> None:
    theirs = torchvisions()
    ours = fuse(copy.deepcopy(theirs))
    batches = own_batches(rank)
    with strict():
        for network in (theirs, ours):
            train(nn.parallel.DistributedDataParallel(network, **options), batches)
    assert_same(ours.state_dict(), theirs.state_dict(), "float64 whole block")


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel(options: dict[str, Any]) -> None:
    processes.run(data_parallel, options)


def data_parallel_synchronised(rank: int, memory_efficient: bool) -> None:
    """Equal shares and a mean over the batch: the averaged gradients are those of one process with everything."""
    block = FusedDenseBlock(*SIZE, memory_efficient=memory_efficient)
    pool = nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(nn.Conv2d(3, SIZE[1], 7, 4), block, pool, nn.Flatten(), nn.Linear(48, 5)).double()
    whole = copy.deepcopy(network)
    shares = [own_batches(0), own_batches(1)]
    train(whole, [torch.cat(pair) for pair in zip(*shares, strict=True)])
    parallel = nn.parallel.DistributedDataParallel(network)
    sync(network)  # only now: for torch's own implementation, DistributedDataParallel refuses the CPU
    with strict():
        train(parallel, shares[rank])
    assert_same(network.state_dict(), whole.state_dict(), "float64 whole block")


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_synchronised_under_distributed_data_parallel(memory_efficient: bool) -> None:
    processes.run(data_parallel_synchronised, memory_efficient)


def fully_sharded(rank: int) -> None:
    theirs = torchvisions()
    ours = fuse(copy.deepcopy(theirs))
    mesh = init_device_mesh("cpu", (2,))
    for block in [module for module in ours.modules() if isinstance(module, FusedDenseBlock) and not releases.OLD]:
        fully_shard(block, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    batches = own_batches(rank)
    train(nn.parallel.DistributedDataParallel(theirs), batches)
    with strict():
        train(ours, batches)
    assert all(isinstance(parameter, DTensor) for parameter in ours.parameters())
    gathered = {name: parameter.full_tensor() for name, parameter in ours.named_parameters()}
    assert_same(gathered, dict(theirs.named_parameters()), "float64 whole block")


def test_fully_shard() -> None:
    processes.run(fully_sharded)


def sharded_input(rank: int) -> None:
    """Tensor parallelism's tensors: the module's own operators, in training and evaluation."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torchvisions().features.denseblock1
    x = torch.randn(4, whole.denselayer1.norm1.num_features, 6, 6, dtype=torch.float64)
    for training in (True, False):
        theirs, ours = (
            distribute_module(copy.deepcopy(module), mesh) for module in (whole, fuse(copy.deepcopy(whole)))
        )
        results = []
        for module in (theirs, ours):
            leaf = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
            with quiet():
                out = module.train(training)(leaf)
            out.sin().sum().backward()
            assert leaf.grad is not None
            results.append({"output": out.full_tensor(), "input's gradient": leaf.grad.full_tensor()})
        assert_same(*reversed(results), "float64 whole block")
        with pytest.raises(FallbackError, match="the input is a DTensor"), strict():
            ours(distribute_tensor(x, mesh, [Shard(0)]))


@pytest.mark.skipif(releases.OLD, reason="torch has no batch norm of sharded tensors yet")
def test_sharded_input() -> None:
    processes.run(sharded_input)


def hooked_on_one_rank(rank: int) -> None:
    """Only said: the other rank would wait."""
    block = sync(variant("kept", 2, torch.float64)[0])
    block.denselayer1.conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(FallbackError, match="where one rank runs operator by operator, all have to"), strict():
        block(torch.randn(2, 16, 4, 4, dtype=torch.float64))
    with pytest.raises(FallbackError, match=r"has hooks$"), strict():
        block.eval()(torch.randn(2, 16, 4, 4, dtype=torch.float64))


def test_a_fallback_on_one_rank() -> None:
    processes.run(hooked_on_one_rank)


def whole_network(rank: int, fused_first: bool, memory_efficient: bool) -> None:
    """torchvision's DenseNet, converted before or after ``fuse``; the second rank has its share, one image, or none."""
    whole, x = torchvisions(), images(5)
    expected = step(copy.deepcopy(whole), x)
    for share in (2, 1, 0):
        network = copy.deepcopy(whole)
        if fused_first:
            sync(fuse(network, memory_efficient=memory_efficient))
        else:
            fuse(sync(network), memory_efficient=memory_efficient)
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in network.modules()) == 11
        own = slice(0, 5 - share) if rank == 0 else slice(5 - share, 5)
        with sync_batch_norm.on_cpu(), strict():
            actual = own_step(network, x, own, expected["output"])
        wanted = expected | {key: expected[key][own] for key in ("output", "input's gradient")}
        some = {name for name, value in wanted.items() if value.numel()}
        assert_same_step({name: actual[name] for name in some}, {name: wanted[name] for name in some})


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_synchronised_network(fused_first: bool, memory_efficient: bool) -> None:
    processes.run(whole_network, fused_first, memory_efficient)


def messages_of_a_step(rank: int, fused: bool) -> tuple[int, int]:
    """How many messages the dense blocks and transitions of DenseNet-121 send in a training step, and their bytes."""
    network = sync(peers.densenet121())
    if fused:
        fuse(network)
    parts = nn.Sequential(*list(network.features.children())[4:-1])
    sizes = []

    def counted(whole: Callable[..., Any], sent: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            sizes.append(arguments[sent].nbytes)
            return whole(*arguments, **options)

        return call

    with (
        mock.patch.multiple(dist, all_reduce=counted(dist.all_reduce, 0), all_gather=counted(dist.all_gather, 1)),
        sync_batch_norm.on_cpu(),
        strict(),
    ):
        parts(torch.randn(1, 64, 16, 16, requires_grad=True)).sum().backward()
    return len(sizes), sum(sizes)


def test_messages_of_a_step() -> None:
    """As many messages as torch sends, one for each convolution and direction, and smaller: of new channels only."""
    (count, size), (torchs_count, torchs_size) = (processes.run(messages_of_a_step, fused) for fused in (True, False))
    report.sections["statistics over ranks, DenseNet-121's blocks and transitions, each rank, one training step"] += [
        f"fused: {count} messages, {size / 1e6:.2f} MB",
        f"torch.nn.SyncBatchNorm: {torchs_count} messages, {torchs_size / 1e6:.2f} MB",
    ]
    assert count <= torchs_count + 4  # each block's input
    assert size < torchs_size / 2
