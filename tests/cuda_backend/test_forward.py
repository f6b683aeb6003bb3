"""The forward convolutions against float64, entry by entry, and against the operators' own error."""

from dataclasses import dataclass

import pytest
import torch
from emulated import Emulated
from primitives import (
    Guarded,
    Shape,
    affine,
    check_moments,
    clear_of_zero,
    exact_forward,
    forward_magnitude,
    loaded_gradient,
    make_weight,
    operators,
    source,
    vector,
)
from tolerances import assert_entries, assert_error_ratio
from torch import Tensor

from fused_densenet.backends.contract import Norm

POINT = (1, 1, 1)


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
    Case(Shape((1, 1, 17, 19), 24, 48, POINT), 1),
    Case(Shape((2, 1, 23, 29), 96, 48, POINT), 2, "contiguous", True, 8, 8),
    Case(Shape((1, 1, 13, 53), 64, 128, POINT), 2, "channels_last", False, 0, 64),
    Case(Shape((1, 1, 7, 7), 512, 128, POINT), 132, "contiguous", True),
    Case(Shape((1, 1, 37, 29), 41, 192, POINT), 2, "strided", False, 1, 0),
    Case(Shape((1, 5, 7, 11), 100, 160, POINT), 3, "contiguous", False, 4, 4),
    Case(Shape((1, 1, 1, 31), 36, 300, POINT), 4, "contiguous", False, 2, 1),
    Case(Shape((1, 1, 1, 1), 5, 3, POINT), 132, "contiguous", True),
    Case(Shape((1, 1, 1, 1), 2100, 12, POINT), 1, "contiguous", False, 0, 4, 64 << 10),
]
ARITHMETIC = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETIC)


@dataclass
class Problem:
    x: Tensor
    arguments: tuple
    out: Guarded
    mean: Guarded
    var: Guarded

    def run(self, backend: Emulated) -> None:
        backend.norm_relu_conv(self.x, *self.arguments, self.out.data, self.mean.data, self.var.data)


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    shape = case.shape
    norm = affine(shape.channels, dtype)
    values = clear_of_zero(torch.randn(*shape.pixels, shape.channels).to(dtype), norm)
    weight = make_weight(shape, torch.float32 if case.weight_in_float32 else dtype, case.layout)
    out = Guarded((*shape.pixels, shape.out_channels), dtype, case.after, case.before + 1)
    out.data.fill_(float("nan"))
    mean, var = (vector(shape.out_channels, dtype) for _ in range(2))
    return Problem(source(values, case.before, case.after), (norm, weight), out, mean, var)


@all_arithmetic
@all_cases
def test_forward(case: Case, arithmetic: str) -> None:
    dtype, tf32 = ARITHMETIC[arithmetic]
    problem = make_problem(case, dtype)
    backend = Emulated(tf32=tf32, multiprocessors=case.multiprocessors, shared_per_block=case.shared)
    backend.statistics()
    problem.run(backend)
    assert backend.statistics()["ldmatrix_conflicts"] == 0
    x, out, (norm, weight) = problem.x, problem.out.data, problem.arguments
    exact, magnitude = exact_forward(x, norm, weight), forward_magnitude(x, norm, weight)
    if tf32:
        theirs = exact_of_tf32(x, norm, weight)
    else:
        assert_entries(out, exact, magnitude, dtype, "out")
        theirs, _, _ = operators(loaded_gradient(case.shape.pixels, out.shape[-1], dtype), x, norm, weight)
    assert_error_ratio(out, theirs, exact, dtype, "out", magnitude)
    check_moments(out, problem.mean, problem.var)
    problem.out.check("out")


def exact_of_tf32(x: Tensor, norm: Norm, weight: Tensor) -> Tensor:
    """What is left of the result where only the operands of products are rounded, to 10 bits of mantissa."""
    activation = torch.addcmul(norm.shift, x - norm.mean, norm.scale).relu()
    return exact_of_products(
        *((t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for t in (activation, weight))
    )


def exact_of_products(activation: Tensor, weight: Tensor) -> Tensor:
    zero, one = torch.zeros(activation.shape[-1]), torch.ones(activation.shape[-1])
    return exact_forward(activation, Norm(zero, one, zero), weight)


@all_arithmetic
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_the_same_bits_in_any_order_of_warps(case: Case, arithmetic: str) -> None:
    dtype, tf32 = ARITHMETIC[arithmetic]
    problem = make_problem(case, dtype)
    runs = []
    for seed in range(3):
        problem.run(Emulated(tf32=tf32, multiprocessors=case.multiprocessors, seed=seed))
        runs.append([t.data.clone() for t in (problem.out, problem.mean, problem.var)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
