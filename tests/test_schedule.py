"""The two loops and their operator, with the eager primitives: derivatives by finite differences, tracing, FLOPs."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import pytest
import releases
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from fused_densenet import FusedDenseBlock, use_backend
from fused_densenet.backends import eager
from fused_densenet.ops.block import Arguments, block

KINDS = ["bottleneck", "recomputed bottleneck", "plain"]
STATISTICS = ["batch", "running", "mixed"]


@dataclass
class Case:
    """Arguments of the operator: three layers on 3 channels, growth 2, bottleneck 4, away from the kinks of ReLU.

    Where ``rich``, some convolutions have a bias, activations are leaky, new features stand in front, dropout follows
    every convolution, and the last layer is wider than the others. Without norms all of that but dropout.
    """

    kind: str
    statistics: str = "batch"
    spatial_dims: int = 2
    dropout: bool = False
    rich: bool = False

    def __post_init__(self) -> None:
        draw = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(5)}
        inputs = 3
        growths, widths = ([2, 2, 3], [4, 5, 3]) if self.rich else ([2, 2, 2], [4, 4, 4])
        norms = self.statistics != "none"
        spatial = (3, 2, 4)[: self.spatial_dims]
        self.x = torch.randn(2, inputs, *spatial, **draw)
        self.per_layer = 1 if self.kind == "plain" else 2
        self.weights, self.gammas, self.betas, self.running = [], [], [], []
        self.batch_stats = []
        for i, (growth, width) in enumerate(zip(growths, widths, strict=True)):
            channels = inputs + sum(growths[:i])
            shapes = [(growth, channels, 3), (width, channels, 1), (growth, width, 3)]
            for out, source, kernel in shapes[:1] if self.kind == "plain" else shapes[1:]:
                self.weights.append(torch.randn(out, source, *[kernel] * self.spatial_dims, **draw))
                if not norms:
                    continue
                self.gammas.append(0.5 + torch.rand(source, **draw))
                self.betas.append(torch.randn(source, **draw))
                number = len(self.batch_stats)
                batch = self.statistics == "batch" or (self.statistics == "mixed" and number % 3 != 1)
                self.batch_stats.append(batch)
                if not batch:
                    self.running += [torch.randn(source, **draw), 0.5 + torch.rand(source, **draw)]
        self.keep = torch.rand(2, sum(growths), *spatial, **draw) > 0.3 if self.dropout else None
        inside = self.rich and self.dropout and self.per_layer == 2
        self.keep_inside = torch.rand(2, sum(widths), *spatial, **draw) > 0.4 if inside else None
        self.biased = [self.rich and i != 1 for i in range(len(self.weights))]
        self.biases = [
            torch.randn(len(w), **draw) for w, biased in zip(self.weights, self.biased, strict=True) if biased
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """The differentiable arguments."""
        return [t.requires_grad_() for t in (self.x, *self.weights, *self.gammas, *self.betas, *self.biases)]

    def arguments(self, tensors: list[Tensor]) -> Arguments:
        n, rest = len(self.gammas), iter(tensors[1:])
        weights, gammas, betas, biases = (
            list(itertools.islice(rest, len(of))) for of in (self.weights, self.gammas, self.betas, self.biases)
        )
        lists = (weights, biases, gammas, betas, self.running, self.keep, self.keep_inside)
        slopes = [(0.0, 0.2, 1.0)[i % 3] if self.rich else 0.0 for i in range(len(weights))]
        constants = (self.biased, slopes, [1e-5 * (1 + i) for i in range(n)], self.batch_stats)
        form = (self.per_layer, [1 / 0.6, 1 / 0.7], self.rich)
        return Arguments(tensors[0], *lists, *constants, *form, self.kind == "bottleneck", "eager", None)

    def function(self) -> Callable[..., Tensor]:
        return lambda *tensors: block(self.arguments(list(tensors))).out

    def operator(self) -> Callable[..., Tensor]:
        """The same through torch.library's operator."""
        return lambda *tensors: torch.ops.fused_densenet.dense_block(*self.arguments(list(tensors)))[0]


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, statistics: str, spatial_dims: int) -> None:
    case = Case(kind, statistics, spatial_dims)
    assert gradcheck(case.function(), case.tensors, fast_mode=spatial_dims != 1)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_with_dropout(kind: str, statistics: str) -> None:
    case = Case(kind, statistics, spatial_dims=1, dropout=True)
    assert gradcheck(case.function(), case.tensors, fast_mode=True)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck(kind: str, statistics: str) -> None:
    case = Case(kind, statistics, dropout=True)
    assert gradgradcheck(case.function(), case.tensors, fast_mode=True)


RICH = [*((kind, statistics, True) for kind in KINDS for statistics in STATISTICS), ("plain", "none", False)]


@pytest.mark.parametrize(("kind", "statistics", "dropout"), RICH)
def test_gradients_of_other_forms(kind: str, statistics: str, dropout: bool) -> None:
    case = Case(kind, statistics, dropout=dropout, rich=True)
    assert gradcheck(case.function(), case.tensors, fast_mode=True)
    assert gradgradcheck(case.function(), case.tensors, fast_mode=True)
    assert gradcheck(case.operator(), case.tensors, fast_mode=True)
    out = case.function()(*case.tensors)
    torch.testing.assert_close(out, block.by_operators(case.arguments(case.tensors)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_operator(kind: str) -> None:
    case = Case(kind, "mixed")
    assert gradcheck(case.operator(), case.tensors, fast_mode=True)
    assert gradgradcheck(case.operator(), case.tensors, fast_mode=True)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients(kind: str, statistics: str) -> None:
    """Those of several vectors at once, by vmap, are those of one after the other."""
    case = Case(kind, statistics, dropout=True)
    out = case.function()(*case.tensors)
    vectors = torch.randn(3, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, case.tensors, vectors, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, case.tensors, v, retain_graph=True) for v in vectors]
    for found, expected in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_sees_a_missing_debt(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the batch statistics owe, gradcheck fails: it depends on the deferred terms."""
    whole = eager.norm_relu_conv_backward

    def without_debt(*arguments: Any) -> None:
        *others, owed, dbias = arguments
        whole(*others, owed._replace(correction=torch.zeros_like(owed.correction)), dbias)

    monkeypatch.setattr(eager, "norm_relu_conv_backward", without_debt)
    case = Case(kind)
    with pytest.raises(GradcheckError):
        gradcheck(case.function(), case.tensors, fast_mode=True)


def test_gradcheck_of_the_module() -> None:
    module = FusedDenseBlock(2, 3, 2, 2).double()
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.bias)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        out = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
        assert isinstance(out, Tensor)
        return out

    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    with use_backend("eager"):
        assert gradcheck(function, (x, *parameters))


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, statistics: str) -> None:
    case = Case(kind, statistics, dropout=kind != "bottleneck")
    torch.library.opcheck(torch.ops.fused_densenet.dense_block.default, case.arguments(case.tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_backward(kind: str) -> None:
    case = Case(kind, "mixed")
    arguments = case.arguments(case.tensors)
    out, kept, constants = block(arguments)
    needed = [i % 2 == 0 for i in range(len(case.weights))]
    backward = (torch.randn_like(out), kept, constants, needed, *arguments._replace(x=out.detach()))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fused_densenet.dense_block_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_is_the_same(training: bool, memory_efficient: bool) -> None:
    block = FusedDenseBlock(2, 5, 2, 3, memory_efficient=memory_efficient).train(training)
    x = torch.randn(2, 5, 6, 7)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    results = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.load_state_dict(state)
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in block.parameters()), *(b.clone() for b in block.buffers())])
    for uncompiled, compiled in zip(*results, strict=True):
        assert releases.same(compiled, uncompiled)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_flops_are_torchvisions(memory_efficient: bool) -> None:
    sizes = (3, 8, 4, 6)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    counts = []
    for module in (peers.DenseBlock(*sizes, 0.0), FusedDenseBlock(*sizes, memory_efficient=memory_efficient)):
        with FlopCounterMode(display=False) as forward:
            out = module(x)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    (their_forward, their_backward), (forward_count, backward_count) = counts
    recomputed = 2 * x[:, 0].numel() * sum(24 * (8 + 6 * i) for i in range(3)) if memory_efficient else 0
    assert forward_count == their_forward > 0
    assert backward_count == their_backward + recomputed


def test_flops_without_the_weights_gradients() -> None:
    block = FusedDenseBlock(2, 8, 4, 6).requires_grad_(False)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    out = block(x)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    weights = sum(p.numel() for n, p in block.named_parameters() if "conv" in n)
    assert backward.get_total_flops() == 2 * 2 * 5 * 5 * weights
