"""The forward convolutions against float64, entry by entry, and against the operators' own error."""

from dataclasses import dataclass

import pytest
import torch
from cases import CUBE, ONE, ROW, SQUARE
from emulated import Emulated
from hypothesis import given
from hypothesis import strategies as st
from primitives import (
    Guarded,
    Shape,
    check_moments,
    clear_of_zero,
    draw_norm,
    exact_forward,
    forward_magnitude,
    loaded_gradient,
    make_weight,
    operators,
    scale_of,
    source,
    vector,
)
from small import ARITHMETIC, LARGEST, any_case, no_conflicts
from tolerances import assert_entries, assert_error_ratio, tolerance, ulp
from torch import Tensor

from fused_densenet.backends.contract import Norm


@dataclass(frozen=True)
class Case:
    """``multiprocessors`` decides whether tiles are large and persistent (1 to 4), small, or split over channels."""

    shape: Shape
    multiprocessors: int
    layout: str = "contiguous"
    weight_in_float32: bool = False
    before: int = 0
    after: int = 0
    shared: int = 227 << 10


CASES = [
    Case(Shape((1, 1, 17, 19), 24, 48, ONE), 1),
    Case(Shape((2, 1, 23, 29), 96, 48, ONE), 2, "contiguous", True, 8, 8),
    Case(Shape((1, 1, 13, 53), 64, 128, ONE), 2, "channels_last", False, 0, 64),
    Case(Shape((1, 1, 7, 7), 512, 128, ONE), 132, "contiguous", True),
    Case(Shape((1, 1, 37, 29), 41, 192, ONE), 2, "strided", False, 1, 0),
    Case(Shape((1, 5, 7, 11), 100, 160, ONE), 3, "contiguous", False, 4, 4),
    Case(Shape((1, 1, 1, 31), 36, 300, ONE), 4, "contiguous", False, 2, 1),
    Case(Shape((1, 1, 1, 1), 5, 3, ONE), 132, "contiguous", True),
    Case(Shape((1, 1, 1, 1), 2100, 12, ONE), 1, "contiguous", False, 0, 4, 64 << 10),
    Case(Shape((1, 1, 7, 11), 600, 208, ONE), 1, shared=64 << 10),
    Case(Shape((3, 1, 15, 17), 100, 50, ONE, pool=True), 1, "contiguous", False, 4, 4),
    Case(Shape((2, 5, 4, 7), 35, 17, ONE, pool=True), 132, "contiguous", True, 1),
    Case(Shape((2, 1, 17, 19), 48, 12, SQUARE), 1, "contiguous", False, 4, 4),
    Case(Shape((2, 1, 17, 19), 96, 24, SQUARE), 2, "strided", True, 3, 2),
    Case(Shape((1, 1, 31, 29), 64, 32, SQUARE), 1, "channels_last"),
    Case(Shape((3, 1, 7, 7), 192, 48, SQUARE), 2, "contiguous", True, 0, 96),
    Case(Shape((1, 1, 7, 7), 128, 32, SQUARE), 132),
    Case(Shape((1, 1, 37, 29), 33, 50, SQUARE), 2, "strided", False, 1),
    Case(Shape((5, 1, 1, 1), 160, 40, SQUARE), 132),
    Case(Shape((1, 1, 2, 3), 5, 3, SQUARE), 1),
    Case(Shape((2, 1, 1, 67), 48, 12, ROW), 2, "contiguous", True),
    Case(Shape((1, 1, 1, 131), 20, 7, ROW), 1, "channels_last", False, 2, 2),
    Case(Shape((2, 5, 6, 7), 48, 12, CUBE), 2),
    Case(Shape((1, 3, 11, 5), 24, 16, CUBE), 1, "channels_last", False, 0, 0, 99 << 10),
    Case(Shape((1, 2, 5, 7), 24, 12, (3, 1, 5)), 2),
    Case(Shape((1, 1, 13, 17), 128, 32, SQUARE), 1, shared=64 << 10),
    *[Case(Shape((1, *kernel[:2], 9), 20, 12, kernel), 1, shared=64 << 10) for kernel in LARGEST],
    *[Case(Shape((9, 1, 1, 1), 20, 12, kernel), 1, shared=64 << 10) for kernel in LARGEST],
]

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETIC)


@dataclass
class Problem:
    x: Tensor
    norm: Norm
    weight: Tensor
    out: Guarded
    mean: Guarded
    var: Guarded

    def run(self, backend: Emulated) -> None:
        backend.norm_relu_conv(self.x, self.norm, self.weight, self.out.data, self.mean.data, self.var.data)


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    shape = case.shape
    weight_dtype = torch.float32 if case.weight_in_float32 else dtype
    norm = draw_norm(shape.channels, dtype, weight_dtype)
    values = clear_of_zero(torch.randn(*shape.pixels, shape.channels).to(dtype), norm)
    weight = make_weight(shape, weight_dtype, case.layout)
    out = Guarded((*shape.out_pixels, shape.out_channels), dtype, case.after, case.before + 1)
    out.data.fill_(float("nan"))
    mean, var = (vector(shape.out_channels, dtype) for _ in range(2))
    return Problem(source(values, case.before, case.after), norm, weight, out, mean, var)


@all_arithmetic
@all_cases
def test_forward(case: Case, arithmetic: str) -> None:
    dtype, tf32, _ = ARITHMETIC[arithmetic]
    problem, exact, magnitude = run(case, arithmetic)
    x, norm, weight, pool = problem.x, problem.norm, problem.weight, case.shape.pool
    if tf32:
        theirs = exact_of_tf32(x, norm, weight, pool)
    else:
        grad = loaded_gradient(case.shape.out_pixels, case.shape.out_channels, dtype)
        theirs, _ = operators(grad, x, norm, weight, pool)
    assert_error_ratio(problem.out.data, theirs, exact, dtype, "out", magnitude)


@all_arithmetic
@given(case=any_case(Case), seed=st.integers(0, 99))
def test_any_shape(arithmetic: str, case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    run(case, arithmetic)


def run(case: Case, arithmetic: str) -> tuple[Problem, Tensor, Tensor]:
    """Also the exact result and the magnitude of its terms, by which each entry was compared."""
    dtype, tf32, rounding = ARITHMETIC[arithmetic]
    problem = make_problem(case, dtype)
    backend = Emulated(tf32=tf32, multiprocessors=case.multiprocessors, shared_per_block=case.shared)
    with no_conflicts(backend, case.shape.pixels):
        problem.run(backend)
    operands = problem.x, problem.norm, problem.weight, case.shape.pool
    exact, magnitude = exact_forward(*operands), forward_magnitude(*operands)
    assert_entries(problem.out.data, exact, magnitude, rounding, "out")
    check_moments(problem.out.data, problem.mean, problem.var)
    problem.out.check("out")
    return problem, exact, magnitude


def exact_of_tf32(x: Tensor, norm: Norm, weight: Tensor, pool: bool) -> Tensor:
    """What is left of the result where only the operands of products are rounded, to 10 bits of mantissa."""
    activation = torch.addcmul(norm.bias, x - norm.mean, scale_of(norm).float()).relu()
    rounded = ((t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for t in (activation, weight.contiguous()))
    identity = Norm(*(torch.full((x.shape[-1],), value) for value in (0.0, 1.0, 1.0, 0.0)), 0.0)
    activation, weight = rounded
    return exact_forward(activation, identity, weight, pool)


@all_arithmetic
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13], CASES[16]], ids=str)
def test_the_same_bits_in_any_order_of_warps(case: Case, arithmetic: str) -> None:
    dtype, tf32, _ = ARITHMETIC[arithmetic]
    problem = make_problem(case, dtype)
    runs = []
    for seed in range(3):
        problem.run(Emulated(tf32=tf32, multiprocessors=case.multiprocessors, seed=seed))
        runs.append([t.data.clone() for t in (problem.out, problem.mean, problem.var)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize(
    ("shape", "products", "copies"),
    [
        # 16-byte chunks of x once, and of the weight once in each of the blocks: two tiles of 256 pixels, one of 128
        (Shape((2, 1, 16, 16), 48, 48, ONE), 512 // 16 * 6 * 3, 512 * 6 + 2 * 48 * 6),
        (Shape((1, 1, 16, 16), 128, 128, ONE), 256 // 16 * 16 * 8, 256 * 16 + 2 * 128 * 16),
        # boxes of 16 x 16 pixels and their halo, and for each the weight's fragments of 32 chunks
        (Shape((1, 1, 32, 32), 128, 32, SQUARE), 1024 // 16 * 4 * 9 * 8, 4 * (18 * 18 * 16 + 32 * 2 * 9 * 8)),
        (Shape((1, 1, 16, 16), 48, 12, SQUARE), 256 // 16 * 2 * 9 * 3, 18 * 18 * 6 + 32 * 9 * 3),
    ],
    ids=str,
)
def test_no_product_and_no_copy_too_many(shape: Shape, products: int, copies: int) -> None:
    problem = make_problem(Case(shape, 1), torch.bfloat16)
    backend = Emulated(multiprocessors=1)
    backend.statistics()
    problem.run(backend)
    statistics = backend.statistics()
    assert statistics["mma"] == products
    assert statistics["cp_async"] == copies


@pytest.mark.parametrize("kernel", [ONE, SQUARE], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_variance_of_a_distant_output(kernel: tuple[int, int, int], multiprocessors: int) -> None:
    x = torch.randn(4, 1, 20, 20, 8)
    norm = Norm(torch.zeros(8), torch.ones(8), torch.ones(8), torch.full((8,), 1000.0), 0.0)
    weight = torch.zeros(24, 8, *kernel)
    weight[torch.arange(24), torch.arange(24) % 8, 0, kernel[1] // 2, kernel[2] // 2] = 1
    out, mean, var = torch.empty(4, 1, 20, 20, 24), torch.empty(24), torch.empty(24)
    Emulated(multiprocessors=multiprocessors).norm_relu_conv(x, norm, weight, out, mean, var)
    exact_var, exact_mean = torch.var_mean(out.double(), (0, 1, 2, 3), correction=0)
    assert exact_var.min() > 0.8 and exact_mean.min() > 999
    torch.testing.assert_close(var.double(), exact_var, rtol=tolerance("variance"), atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=tolerance("mean") * ulp(torch.float32), atol=0)


@all_arithmetic
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_nan_passes_through(arithmetic: str, multiprocessors: int) -> None:
    """A NaN in one pixel reaches every output of its neighbourhood and no other: ReLU does not turn it into zero."""
    dtype, tf32, _ = ARITHMETIC[arithmetic]
    x = torch.randn(1, 1, 5, 5, 16).to(dtype)
    x[0, 0, 2, 2, 3] = float("nan")
    out = torch.empty(1, 1, 5, 5, 8, dtype=dtype)
    backend = Emulated(tf32=tf32, multiprocessors=multiprocessors)
    for kernel, reach in (((1, 1, 1), 0), ((1, 3, 3), 1)):
        backend.norm_relu_conv(x, draw_norm(16, dtype), torch.randn(8, 16, *kernel).to(dtype), out, None, None)
        expected = torch.zeros(5, 5, dtype=torch.bool)
        expected[2 - reach : 3 + reach, 2 - reach : 3 + reach] = True
        assert torch.equal(out[0, 0].isnan().all(-1), expected)
        assert torch.equal(out[0, 0].isnan().any(-1), expected)


def test_kernels_that_no_device_has_shared_memory_for_are_refused() -> None:
    problem = make_problem(Case(Shape((1, 9, 9, 9), 16, 8, (9, 9, 9)), 1), torch.bfloat16)
    with pytest.raises(RuntimeError, match="801"):
        problem.run(Emulated(shared_per_block=64 << 10))
