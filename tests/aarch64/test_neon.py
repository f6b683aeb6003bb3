"""aarch64's kernels against float64, entry by entry, on processors with and without bfloat16's dot products."""

import contextlib
import ctypes
from collections.abc import Iterator

import cross
import pytest
import torch
from arena import Arena
from cases import CUBE, NAN, ONE, SQUARE, Case, run_nan
from cross import Aarch64
from forms import FORMS, Form, check_form
from forms import SHAPES as SHAPES_OF_FORMS
from primitives import Guarded, Shape, check_moments, load, load_magnitude, loaded_gradient, vector
from problems import Place
from served import ProgramError
from stem_cases import STEMS, StemCase, run_stem, run_stem_nan
from strided_cases import STRIDED, StridedCase, run_strided
from test_cpu_primitives import check_backward, check_forward
from tolerances import assert_entries, tolerance, ulp

from fused_densenet.backends import BACKENDS
from fused_densenet.backends.contract import Norm

OLD, NEW = "cortex-a72", "max"
"""Processors without and with bfloat16's dot products."""
WAYS = {
    "float64": (OLD, torch.float64),
    "float32": (OLD, torch.float32),
    "float16": (OLD, torch.float16),
    "bfloat16": (OLD, torch.bfloat16),
    "bfloat16-dot-products": (NEW, torch.bfloat16),
}
SHAPES = [
    Shape((2, 1, 5, 7), 36, 24, ONE),
    Shape((1, 1, 9, 15), 33, 20, SQUARE),
    Shape((1, 1, 1, 131), 130, 9, ONE),
    Shape((1, 1, 13, 11), 20, 35, (1, 5, 1)),
    Shape((3, 1, 6, 8), 16, 70, SQUARE),
    Shape((1, 3, 4, 5), 11, 12, CUBE),
    Shape((2, 1, 1, 1), 17, 5, SQUARE),
    Shape((2, 1, 9, 6), 70, 35, ONE, pool=True),
    Shape((1, 3, 5, 4), 7, 130, ONE, pool=True),
]


@pytest.fixture(scope="module")
def processors() -> Iterator[dict[str, Aarch64]]:
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(contextlib.closing(Aarch64(name))) for name in (OLD, NEW)}


@pytest.fixture(params=WAYS)
def way(
    request: pytest.FixtureRequest, processors: dict[str, Aarch64], monkeypatch: pytest.MonkeyPatch
) -> tuple[Aarch64, torch.dtype]:
    """A backend, which the tests of the CPU's kernels know by the name of "aarch64", and a dtype."""
    processor, dtype = WAYS[request.param]
    monkeypatch.setitem(BACKENDS, "aarch64", processors[processor])
    return processors[processor], dtype


@pytest.mark.parametrize(
    ("processor", "capability", "expected"),
    [
        (OLD, None, ["neon", "neon"]),
        (NEW, None, ["neon", "neon_bf16"]),
        (NEW, "default", ["neon", "neon"]),
    ],
)
def test_instruction_sets(processor: str, capability: str | None, expected: list[str]) -> None:
    assert cross.instruction_sets(processor, capability) == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", [0, 1], ids=["plain", "other"])
def test_convolutions(way: tuple[Aarch64, torch.dtype], shape: Shape, variant: int) -> None:
    """Forward with and without moments; backward stored and added, with and without what is owed."""
    _, dtype = way
    other = bool(variant)
    layout = "strided" if other else "contiguous"
    check_forward("aarch64", shape, dtype, layout, other, 3 * variant, 1, not other)
    check_backward("aarch64", shape, dtype, layout, other, 2, 3 * variant, other, True, not other, other)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms(way: tuple[Aarch64, torch.dtype], form: Form) -> None:
    """Biases, slopes and no norm."""
    backend, dtype = way
    for number, shape in enumerate(SHAPES_OF_FORMS):
        check_form(backend, form, shape, dtype, accumulate=bool(number % 2))


@pytest.mark.parametrize("layout", ["channels first", "channels last", "expanded"])
def test_place(way: tuple[Aarch64, torch.dtype], layout: str) -> None:
    backend, dtype = way
    n, d, h, w, c = 2, 3, 5, 11, 37
    x = {
        "channels first": torch.randn(n, c, d, h, w).permute(0, 2, 3, 4, 1),
        "channels last": torch.randn(n, d, h, w, c),
        "expanded": torch.randn(1, d, 1, w, c).expand(n, d, h, w, c),
    }[layout].to(dtype)
    out, mean, var = Guarded(x.shape, dtype, 1, 2), vector(c, dtype), vector(c, dtype)
    backend.place(x, out.data, mean.data, var.data)
    assert torch.equal(out.data, x)
    out.check("out")
    check_moments(x, mean, var)
    grad = loaded_gradient(x.shape[:-1], c, dtype)
    expected, magnitude = load(grad), load_magnitude(grad)
    gradient = torch.empty_like(x)
    backend.place_backward(grad, gradient)
    assert_entries(gradient, expected, magnitude, dtype, "gradient")
    backend.place_backward(grad, grad.stored)
    assert_entries(grad.stored, expected, magnitude, dtype, "gradient in place")


@pytest.mark.parametrize("case", STEMS, ids=str)
def test_stems(way: tuple[Aarch64, torch.dtype], case: StemCase) -> None:
    backend, dtype = way
    if dtype != torch.float64:
        run_stem(case, dtype, backend)


@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_strided_convolutions(way: tuple[Aarch64, torch.dtype], case: StridedCase) -> None:
    backend, dtype = way
    run_strided(case, dtype, backend, 2, 1)
    run_strided(case, dtype, backend)


def test_halves_are_rounded_to_even(way: tuple[Aarch64, torch.dtype]) -> None:
    """As torch does; every other result lies halfway between two numbers of 16 bits."""
    backend, dtype = way
    x = (1 + torch.arange(48) * ulp(dtype) / 2).to(dtype).repeat(3, 1)[None, None, None]
    zeros, ones = torch.zeros(48, dtype=x.dtype), torch.ones(48, dtype=x.dtype)
    half = ones * ulp(dtype) / 2
    out = torch.empty_like(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    backend.norm_relu_pool(x, Norm(*(t.to(wide) for t in (zeros, ones, ones, half)), 0.0), out)
    assert torch.equal(out, (x.to(wide) + half.to(wide)).to(dtype))


@pytest.mark.parametrize("case", NAN, ids=str)
def test_nan(processors: dict[str, Aarch64], case: Case) -> None:
    run_nan(case, torch.float32, processors[OLD])


def test_nan_in_a_stem(processors: dict[str, Aarch64]) -> None:
    run_stem_nan(StemCase((2, 1, 5, 6), 24), processors[OLD])


def test_nan_of_products(processors: dict[str, Aarch64]) -> None:
    """Narrowed and multiplied in bfloat16 a NaN stays one."""
    x = torch.randn(1, 1, 3, 5, 9).bfloat16()
    x[0, 0, 1, 2, 8] = torch.nan
    out = torch.empty(1, 1, 3, 5, 7, dtype=torch.bfloat16)
    norm = Norm(torch.zeros(9), torch.ones(9), torch.ones(9), torch.zeros(9), 0.0)
    for backend in processors.values():
        backend.norm_relu_conv(x, norm, torch.randn(7, 9, 1, 1, 1), out, None, None)
        assert torch.equal(out.isnan().any(-1), x.isnan().any(-1)) and out[0, 0, 1, 2].isnan().all()


def test_long_sums_round_seldom(processors: dict[str, Aarch64]) -> None:
    """4096 equal terms, which one chain of additions would round the same way over and over: off by 300 ulp."""
    ones = torch.ones(4096)
    x, weight = torch.full((1, 1, 1, 16, 4096), 0.9), torch.ones(32, 4096, 1, 1, 1)
    out = torch.empty(1, 1, 1, 16, 32)
    processors[OLD].norm_relu_conv(x, Norm(ones * 0, ones, ones, ones * 0, 0.0), weight, out, None, None)
    exact = torch.full_like(out, 4096 * x[0, 0, 0, 0, 0].double().item(), dtype=torch.float64)
    assert_entries(out, exact, exact, torch.float32, "output")


def test_variance_of_a_distant_channel(processors: dict[str, Aarch64]) -> None:
    x = torch.randn(8, 1, 9, 9, 16) + 1000
    out, mean, var = torch.empty_like(x), torch.empty(16), torch.empty(16)
    processors[OLD].place(x, out, mean, var)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 1, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=tolerance("variance"), atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=tolerance("mean") * ulp(torch.float32), atol=0)


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize("writes", [True, False], ids=["written", "read"])
def test_bad_accesses_are_found(writes: bool, behind: bool) -> None:
    """One pixel that lies an element too far, or before the first: the program dies of it."""

    class Lying(Aarch64):
        def execute(self, name: str, problem: ctypes.Structure, dtype: torch.dtype, arena: Arena) -> None:
            assert isinstance(problem, Place)
            if writes:
                problem.out.ld = problem.out.ld + 1 if behind else -1
            else:
                problem.x.stride[3] = problem.x.stride[3] + 1 if behind else -1
            super().execute(name, problem, dtype, arena)

    x = torch.randn(1, 1, 1, 2, 7)
    with contextlib.closing(Lying(OLD)) as backend, pytest.raises(ProgramError, match="signal 11"):
        backend.place(x, torch.empty_like(x), None, None)
