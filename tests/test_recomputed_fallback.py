"""A block with ``memory_efficient=True`` that runs operator by operator computes its bottlenecks again in backward."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from blocks import step
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.parametrizations import spectral_norm

from fused_densenet import FallbackWarning, FusedDenseBlock

pytestmark = pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")


def pair(*, bn_size: int | None = 2, drop_rate: float = 0.0) -> tuple[FusedDenseBlock, FusedDenseBlock]:
    """Blocks that run operator by operator, with and without ``memory_efficient``."""
    recomputing = FusedDenseBlock(3, 8, bn_size, 4, drop_rate, memory_efficient=True).double()
    recomputing.denselayer2.relu1.register_forward_hook(lambda *_: None)
    keeping = copy.deepcopy(recomputing)
    keeping.memory_efficient = False
    return recomputing, keeping


def images() -> Tensor:
    return torch.randn(2, 8, 5, 4, dtype=torch.float64)


@pytest.mark.parametrize("bn_size", [2, None])
@pytest.mark.parametrize("drop_rate", [0.0, 0.4])
@pytest.mark.parametrize("training", [True, False])
def test_step_is_the_same(training: bool, drop_rate: float, bn_size: int | None) -> None:
    """Gradients, and buffers: what a batch does to running statistics is done once."""
    recomputing, keeping = (block.train(training) for block in pair(bn_size=bn_size, drop_rate=drop_rate))
    x = images()
    results = []
    for block in (recomputing, keeping):
        torch.manual_seed(3)
        results.append(step(block, x, steps=2))
    assert all(torch.equal(results[0][name], expected) for name, expected in results[1].items())


def test_several_backward_passes_and_second_order() -> None:
    results = []
    for block in pair():
        torch.manual_seed(0)
        x = images().requires_grad_()
        inputs = [x, *block.parameters()]
        out = block(x).square().sum()
        twice = [torch.autograd.grad(out, inputs, retain_graph=True) for _ in range(2)]
        first = torch.autograd.grad(out, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([*twice[0], *twice[1], *first, *second, *block.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_hooks_are_called_again() -> None:
    block, _ = pair()
    calls = dict.fromkeys(("norm1", "norm2"), 0)
    for name in calls:

        def count(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> Tensor:
            calls[name] += 1
            return 2 * output

        block.denselayer1.get_submodule(name).register_forward_hook(count)
    block(images()).sum().backward()
    assert calls == {"norm1": 2, "norm2": 1}


def test_nothing_is_recomputed_where_operators_are_recorded() -> None:
    """torch.func, forward mode, tracing and compiling see a block without checkpoints; so does inference."""
    recomputing, keeping = (block.eval() for block in pair())
    x, tangent = images(), images()

    def results(block: FusedDenseBlock) -> list[Tensor]:
        gradient = torch.func.grad(lambda v: block(v).square().sum())(x)
        dual = torch.func.jvp(block, (x,), (tangent,))[1]
        traced = torch.jit.trace(copy.deepcopy(block), x)(x)
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(block).train(), fullgraph=True, backend="aot_eager")
        leaf = x.clone().requires_grad_()
        compiled(leaf).square().sum().backward()
        with torch.no_grad():
            return [gradient, dual, traced, leaf.grad, *compiled.buffers(), block(x)]

    for a, b in zip(results(recomputing), results(keeping), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_another_models_parameters() -> None:
    """torch.func.functional_call: those of the forward pass, which are gone when the backward pass runs."""
    x, results = images(), []
    for block in pair():
        torch.manual_seed(0)
        others = {name: torch.randn_like(p).requires_grad_() for name, p in block.named_parameters()}
        out = torch.func.functional_call(block, others, x)
        results.append(torch.autograd.grad(out.square().sum(), list(others.values())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parametrization_with_a_state() -> None:
    """spectral_norm iterates once in every forward pass, and not again for the backward pass."""
    results = []
    for block in pair():
        torch.manual_seed(0)
        spectral_norm(block.denselayer2.conv1)
        results.append(step(block, images(), steps=2))
        value, inputs = block(images()).square().sum(), list(block.parameters())
        once, again = (torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(torch.equal(results[0][name], expected) for name, expected in results[1].items())


def test_a_forward_of_the_instance() -> None:
    """It belongs to the module itself, of which a copy would write the same buffers again."""
    block, _ = pair()
    norm = block.denselayer1.norm1
    norm.forward = norm.forward  # as adapters do it
    block(images()).sum().backward()
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["conv1.weight", "norm1.weight"])
def test_a_change_in_place_is_an_error(name: str) -> None:
    """As it is where all is kept."""
    for block in pair():
        out = block(images())
        with torch.no_grad():
            block.denselayer2.get_parameter(name).add_(1)
        with pytest.raises(RuntimeError, match="inplace operation"):
            out.sum().backward()


def test_modes_and_statistics_are_those_of_the_forward_pass() -> None:
    x, results = images(), []
    for block, changes in zip(pair(), (True, False), strict=True):
        out = block.eval()(x)
        if changes:
            block.train()
            block.denselayer2.norm1.running_mean.add_(1)
        results.append(torch.autograd.grad(out.square().sum(), list(block.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads() -> None:
    """Backward passes leave the module alone."""
    block, _ = pair()
    buffers = dict(block.named_buffers())

    def steps(seed: int) -> None:
        for _ in range(20):
            block(images()).sum().backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(steps, range(4)))
    assert all(buffer is buffers[name] for name, buffer in block.named_buffers())
    assert block.denselayer1.norm1.num_batches_tracked == 80


def test_make_fx() -> None:
    recomputing, _ = (block.eval() for block in pair())
    x = images()
    graph = make_fx(lambda v: torch.autograd.grad(recomputing(v).square().sum(), v)[0])(x.requires_grad_())
    expected = torch.autograd.grad(recomputing(x).square().sum(), x)[0]
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)


def test_setting_is_the_layers() -> None:
    block = FusedDenseBlock(3, 8, 2, 4)
    assert not block.memory_efficient
    block.memory_efficient = True
    assert block.memory_efficient and all(layer.memory_efficient for layer in block.values())


def test_warns_as_without() -> None:
    with pytest.warns(FallbackWarning, match=r"denselayer2\.relu1 has hooks"):
        pair()[0](images())
