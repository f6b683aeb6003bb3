"""A stem's pooling and its gradient, however the kernels are executed."""

import contextlib
from collections.abc import Iterator

import maxima
import pytest
import torch
import traffic
from emulated import Emulated, Executor, Host
from maxima import CASES, Case
from primitives import draw_norm
from ptx_launch import Ptx
from sanitized import Sanitized
from torch import Tensor

from fused_densenet.backends import eager
from fused_densenet.backends.contract import Norm, Owed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["runner", "PTX 75", "PTX 80", "PTX 90a", "thread", "address"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Every way of executing the kernels."""
    way, _, architecture = request.param.partition(" ")
    if way == "PTX":
        yield Ptx(architecture, measure=True)
    elif way == "runner":
        yield Host()
    else:
        with contextlib.closing(Sanitized(way)) as started:
            yield started


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_autograd(case: Case, multiprocessors: int, dtype: torch.dtype) -> None:
    maxima.run(case, dtype, Emulated(multiprocessors=multiprocessors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_narrow_parameters(case: Case, dtype: torch.dtype) -> None:
    maxima.run(case, dtype, Emulated(), narrow=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7], *CASES[9:]], ids=str)
def test_however_executed(case: Case, dtype: torch.dtype, executor: Executor) -> None:
    maxima.run(case, dtype, Emulated(executor, multiprocessors=1))
    if isinstance(executor, Ptx) and case.channels == 64:
        assert not any(machine.conflicts.total() for name, machine in executor.machines if "pool" in name)


def results(backend: object, x: Tensor, norm: Norm, grad: Tensor) -> list[Tensor]:
    out, dx, sums = torch.empty_like(grad), torch.empty_like(x), torch.empty(4, x.shape[-1])
    backend.norm_relu_pool(x, norm, out)  # type: ignore[attr-defined]
    backend.norm_relu_pool_backward(grad, x, norm, dx, Owed(sums[0], sums[1], sums[2:]))  # type: ignore[attr-defined]
    return [out, dx, sums]


@pytest.mark.parametrize("architecture", [None, "80"])
@pytest.mark.parametrize("what", ["equals", "NaN", "infinity"])
@pytest.mark.parametrize("sizes", [(1, 9, 8), (1, 1, 11), (4, 5, 6)], ids=str)
def test_equals_and_what_is_not_finite(sizes: tuple[int, ...], what: str, architecture: str | None) -> None:
    """As torch's own pooling: the first of equal maxima, NaN before every number; the same bits as its operators."""
    x = torch.randint(-1, 3, (2, *sizes, 12)).float()
    if what != "equals":
        x[torch.rand(x.shape) < 0.05] = float(what.removesuffix("inity"))
    norm = Norm(torch.zeros(12), torch.ones(12), torch.ones(12), torch.zeros(12), 0.0)
    grad = torch.randint(-4, 5, maxima.maxima(x, True).shape).float()
    backend = Emulated(None if architecture is None else Ptx(architecture))
    for ours, theirs in zip(results(backend, x, norm, grad), results(eager, x, norm, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_the_same_bits_every_run() -> None:
    x, norm, grad = torch.randn(3, 1, 35, 37, 70), draw_norm(70, torch.float32), torch.randn(3, 1, 18, 19, 70)
    first, *others = (results(Emulated(Host(seed=seed)), x, norm, grad) for seed in (0, 1, 2))
    for other in others:
        for ours, theirs in zip(other, first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sizes", [(1, 1, 256), (1, 32, 32), (8, 16, 16)], ids=str)
def test_bytes(sizes: tuple[int, int, int]) -> None:
    """All of x and of the gradient is read, and every result stored, once.

    A block's threads read x again for every window that it lies in, and a gradient for every pixel that has one of its
    eight maxima: out of the first-level cache, where a box of them is.
    """
    dims = sum(size > 1 for size in sizes)
    x, norm = torch.randn(1, *sizes, 64).bfloat16(), draw_norm(64, torch.bfloat16)
    grad = torch.randn(1, *((size + 1) // 2 for size in sizes), 64).bfloat16()
    ptx = Ptx("80")
    results(Emulated(ptx, multiprocessors=1), x, norm, grad)
    forward, backward, _ = (machine for _, machine in ptx.machines)
    found = traffic.by_name([forward], ["x", "mean", "var", "gamma", "beta", "out"])
    assert found["x"].read == x.numel() * 2 and found["x"].loaded <= 1.5**dims * found["x"].read
    assert found["out"].stored == found["out"].written == grad.numel() * 2
    found = traffic.by_name([backward], ["grad", "x", "mean", "var", "gamma", "beta", "dx"])
    assert found["x"].read == x.numel() * 2 and found["x"].loaded <= (1 + 1.5**dims * 1.25**dims) * found["x"].read
    assert found["grad"].loaded <= min(8, 3**dims) * found["grad"].read
    assert found["dx"].stored == found["dx"].written == x.numel() * 2
