"""The backward convolutions against float64, entry by entry, and against the operators' own error."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import CUBE, ONE, ROW, SQUARE
from emulated import Emulated
from hypothesis import given
from hypothesis import strategies as st
from primitives import (
    Debts,
    Guarded,
    Shape,
    backward_magnitude,
    clear_of_zero,
    draw_norm,
    exact_backward,
    load,
    loaded_gradient,
    make_weight,
    operators,
    scale_of,
    source,
)
from small import ARITHMETIC, LARGEST, any_case, no_conflicts
from tolerances import assert_entries, assert_error_ratio
from torch import Tensor

from fused_densenet.backends.contract import Gradient, Norm, Owed


@dataclass(frozen=True)
class Case:
    """Few ``multiprocessors``: large tiles and blocks that own many; little ``shared`` memory: two launches, passes."""

    shape: Shape
    multiprocessors: int
    accumulate: bool = True
    dweight: bool = True
    layout: str = "contiguous"
    weight_in_float32: bool = False
    before: int = 0
    after: int = 0
    shared: int = 227 << 10
    batch_stats: bool = True
    plain: bool = False


CASES = [
    Case(Shape((1, 1, 17, 19), 24, 48, ONE), 1),
    Case(Shape((2, 1, 13, 11), 150, 128, ONE), 2, True, True, "contiguous", True, 8, 2),
    Case(Shape((1, 1, 11, 13), 96, 192, ONE), 132, False, True, "strided", False, 4, 0),
    Case(Shape((1, 1, 1, 31), 36, 300, ONE), 4, True, True, "channels_last", True, 2, 1),
    Case(Shape((1, 1, 7, 5), 70, 600, ONE), 3, False, False, "contiguous", False, 1, 0, 64 << 10),
    Case(Shape((2, 1, 13, 11), 48, 12, SQUARE), 2, False, True, "contiguous", True),
    Case(Shape((1, 1, 23, 19), 128, 32, SQUARE), 2, False),
    Case(Shape((3, 1, 7, 7), 136, 48, SQUARE), 132, True, True, "channels_last", False, 4, 4),
    Case(Shape((1, 1, 9, 17), 72, 40, SQUARE), 1, True, False, "strided", False, 1, 2, 99 << 10),
    Case(Shape((1, 5, 6, 7), 48, 12, CUBE), 3, False, True, "contiguous", False, 0, 8),
    Case(Shape((1, 3, 4, 5), 20, 40, CUBE), 2, True, True, "contiguous", True),
    Case(Shape((3, 1, 1, 37), 33, 20, ROW), 4, True, True, "strided", True, 3, 1),
    Case(Shape((1, 1, 11, 3), 9, 5, (1, 5, 7)), 1, False),
    Case(Shape((2, 1, 9, 11), 150, 75, ONE, pool=True), 2, True, True, "contiguous", True),
    Case(Shape((1, 1, 14, 6), 64, 512, ONE, pool=True), 3, False, True, "channels_last", False, 0, 8),
    Case(Shape((2, 3, 4, 7), 20, 12, ONE, pool=True), 132, False, True, "contiguous", False, 1, 0),
    Case(Shape((3, 1, 1, 13), 33, 16, ONE, pool=True), 1, True, False),
    Case(Shape((1, 1, 1, 1), 5, 3, ONE), 132, False, True, "contiguous", True, 1, 1),
    Case(Shape((1, 1, 1, 1), 24, 12, SQUARE), 132),
    Case(Shape((2, 1, 7, 2), 12, 24, ONE, pool=True), 132, shared=64 << 10),
    Case(Shape((1, 4, 5, 4), 70, 36, ONE, pool=True), 1, shared=64 << 10),
    Case(Shape((2, 1, 13, 11), 48, 12, SQUARE), 2, False, batch_stats=False, plain=True),
    Case(Shape((2, 1, 13, 11), 70, 33, ONE), 2, True, batch_stats=False),
    Case(Shape((2, 1, 9, 11), 70, 300, ONE), 132, True, plain=True),
    Case(Shape((2, 1, 9, 11), 70, 35, ONE, pool=True), 2, False, plain=True),
    *[Case(Shape((1, *kernel[:2], 9), 20, 12, kernel), 1, shared=64 << 10) for kernel in LARGEST],
    *[Case(Shape((9, 1, 1, 1), 20, 12, kernel), 1, shared=64 << 10) for kernel in LARGEST],
]

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETIC)


@dataclass
class Problem:
    grad: Gradient
    x: Tensor
    norm: Norm
    weight: Tensor
    dx: Guarded
    dweight: Tensor | None
    debts: Debts

    def run(self, backend: Emulated, accumulate: bool) -> None:
        owed = self.debts.owed()
        backend.norm_relu_conv_backward(
            self.grad, self.x, self.norm, self.weight, self.dx.data, accumulate, self.dweight, owed
        )


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    shape = case.shape
    weight_dtype = torch.float32 if case.weight_in_float32 else dtype
    norm = draw_norm(shape.channels, dtype, weight_dtype)
    values = clear_of_zero(torch.randn(*shape.pixels, shape.channels).to(dtype), norm)
    weight = make_weight(shape, weight_dtype, case.layout)
    dx = Guarded(values.shape, dtype, case.after, case.before + 1)
    if not case.accumulate:
        dx.data.fill_(float("nan"))
    return Problem(
        loaded_gradient(shape.out_pixels, shape.out_channels, dtype, case.plain),
        source(values, case.before, case.after),
        norm,
        weight,
        dx,
        torch.full_like(weight, torch.nan) if case.dweight else None,
        Debts(norm, case.batch_stats),
    )


class Results(NamedTuple):
    """Of one name: ours, the exact one, and the magnitude of its terms."""

    ours: Tensor
    exact: Tensor
    magnitude: Tensor


@all_arithmetic
@all_cases
def test_backward(case: Case, arithmetic: str) -> None:
    dtype, tf32, _ = ARITHMETIC[arithmetic]
    problem, old, results = run(case, arithmetic)
    operands = problem.grad, problem.x, problem.norm, problem.weight, case.shape.pool
    theirs = exact_of_tf32(*operands) if tf32 else operators(*operands)[1]
    if case.accumulate:
        theirs["dx"] = old + theirs["dx"]
    for name in results.keys() & theirs.keys():
        ours, exact, magnitude = results[name]
        assert_error_ratio(ours, theirs[name], exact, dtype, name, magnitude)


@all_arithmetic
@given(
    case=any_case(
        Case, accumulate=st.booleans(), dweight=st.booleans(), batch_stats=st.booleans(), plain=st.booleans()
    ),
    seed=st.integers(0, 99),
)
def test_any_shape(arithmetic: str, case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    run(case, arithmetic)


def run(case: Case, arithmetic: str) -> tuple[Problem, Tensor, dict[str, Results]]:
    """Also what ``dx`` was before, and the results, of which each entry was compared with the exact one."""
    dtype, tf32, rounding = ARITHMETIC[arithmetic]
    problem = make_problem(case, dtype)
    old = problem.dx.data.clone()
    backend = Emulated(tf32=tf32, multiprocessors=case.multiprocessors, shared_per_block=case.shared)
    with no_conflicts(backend, case.shape.pixels):
        problem.run(backend, case.accumulate)
    operands = problem.grad, problem.x, problem.norm, problem.weight, case.shape.pool
    exact, magnitude = exact_backward(*operands), backward_magnitude(*operands)
    if case.accumulate:
        before = old.double()
        exact.dx, magnitude.dx = before + exact.dx, before.abs() + magnitude.dx
        of_old = torch.finfo(torch.float32).eps / torch.finfo(rounding).eps * problem.debts.old.abs()
        magnitude.constant, magnitude.slope = magnitude.constant + of_old[0], magnitude.slope + of_old[1]
    found = {"dx": problem.dx.data, **problem.debts.found(case.accumulate)}
    if problem.dweight is not None:
        found["dweight"] = problem.dweight
    results = {name: Results(t, getattr(exact, name), getattr(magnitude, name)) for name, t in found.items()}
    problem.dx.check("dx")
    for name, (ours, right, terms) in results.items():
        assert_entries(ours, right, terms, rounding, name)
    return problem, old, results


def exact_of_tf32(grad: Gradient, x: Tensor, norm: Norm, weight: Tensor, pool: bool) -> dict[str, Tensor]:
    """What is left of the results where only the operands of products are rounded, to 10 bits of mantissa."""
    scale, rstd = scale_of(norm), (norm.var.double() + norm.eps).rsqrt()
    z = torch.addcmul(norm.bias, x - norm.mean, scale.float())
    a = z.relu().double().permute(0, 4, 1, 2, 3).requires_grad_()
    averaged = F.avg_pool3d(a, [min(size, 2) for size in a.shape[2:]]) if pool else a
    left, w = _tf32(averaged.detach()).requires_grad_(), _tf32(weight).requires_grad_()
    out = F.conv3d(left, w, padding=[size // 2 for size in weight.shape[2:]])
    da, dweight = torch.autograd.grad(out, [left, w], _tf32(load(grad)).permute(0, 4, 1, 2, 3))
    (da,) = torch.autograd.grad(averaged, a, da) if pool else (da,)
    dz = da.permute(0, 2, 3, 4, 1).masked_fill(z <= 0, 0)
    dgamma = (dz * (x.double() - norm.mean)).sum((0, 1, 2, 3)) * rstd
    return {"dx": scale * dz, "dweight": dweight, "dgamma": dgamma, "dbeta": dz.sum((0, 1, 2, 3))}


def _tf32(x: Tensor) -> Tensor:
    return (x.float().contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32).double()


@all_arithmetic
@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[10]], ids=str)
def test_the_same_bits_in_any_order_of_warps(case: Case, arithmetic: str) -> None:
    dtype, tf32, _ = ARITHMETIC[arithmetic]
    problem = make_problem(case, dtype)
    old = problem.dx.data.clone()
    runs = []
    for seed in range(3):
        problem.dx.set(old)
        problem.debts = Debts(problem.norm, False)
        problem.run(Emulated(tf32=tf32, multiprocessors=case.multiprocessors, seed=seed), case.accumulate)
        assert problem.dweight is not None
        runs.append([t.clone() for t in (problem.dx.data, problem.dweight, *problem.debts.found(False).values())])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_statistics_of_more_pixels() -> None:
    """Those of several ranks: what they owe is shared among all their pixels."""
    problem, found = make_problem(Case(Shape((2, 1, 3, 4), 8, 5, ONE), 4), torch.float32), []
    operands = problem.x, problem.norm, problem.weight, torch.empty(problem.x.shape)
    for pixels in (None, torch.tensor([240.0])):
        owed = Owed(*torch.empty(2, 8), torch.empty(2, 8), pixels)
        Emulated().norm_relu_conv_backward(problem.grad, *operands, False, None, owed)
        found.append(owed)
    for first, second, times in zip(found[0][:3], found[1][:3], (1, 1, 10), strict=True):
        torch.testing.assert_close(second * times, first, rtol=1e-5, atol=0)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32"])
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("shape", [Shape((2, 1, 8, 16), 128, 128, ONE), Shape((2, 1, 16, 8), 64, 24, SQUARE)], ids=str)
def test_no_product_too_many(shape: Shape, multiprocessors: int, arithmetic: str) -> None:
    """Two products of pixels by channels by rows (tap, output), where all are whole tiles."""
    dtype, tf32, _ = ARITHMETIC[arithmetic]
    problem = make_problem(Case(shape, multiprocessors), dtype)
    backend = Emulated(tf32=tf32, multiprocessors=multiprocessors)
    backend.statistics()
    problem.run(backend, True)
    taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2]
    pixels = shape.pixels[0] * shape.pixels[1] * shape.pixels[2] * shape.pixels[3]
    sixteens, depth = -(-taps * shape.out_channels // 16), 8 if tf32 else 16
    data = pixels // 16 * (shape.channels // 8) * -(-taps * shape.out_channels // depth)
    weight = sixteens * (shape.channels // 8) * (pixels // depth)
    assert backend.statistics()["mma"] == data + weight
