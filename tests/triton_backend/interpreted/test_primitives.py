"""Every kernel under the interpreter, its accesses checked, against autograd in float64."""

import pathlib

import cases
import numpy as np
import pytest
import torch
import triton_cpu
from cases import CASES, IN_OTHER_FORMS, NAN, NARROW_WEIGHTS, ONE, POOLED, Case
from stem_cases import STEMS, StemCase, run_stem, run_stem_nan

from fused_densenet.backends import triton
from fused_densenet.backends.contract import Gradient, Norm, Owed
from fused_densenet.backends.triton import plans, tiles_on_disk, tuning


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, torch.float16), (torch.bfloat16, None)], ids=["tf32", "bfloat16"]
)
@pytest.mark.parametrize("case", [*CASES, *POOLED, *NARROW_WEIGHTS, *IN_OTHER_FORMS], ids=str)
def test_norm_relu_conv(case: Case, dtype: torch.dtype, rounding: torch.dtype | None) -> None:
    with triton_cpu.watch(), cases.float32_products("tf32"):
        cases.run_case(case, dtype, rounding=rounding)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[9], *POOLED[:2], *IN_OTHER_FORMS[3:7]], ids=str)
def test_ieee_float32(case: Case) -> None:
    """The data gradient and the weight gradient are kernels of their own."""
    with triton_cpu.watch(), cases.float32_products("ieee"):
        cases.run_case(case, torch.float32)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("case", NAN, ids=str)
def test_nan_reaches_what_it_reaches_in_torch(case: Case, precision: str) -> None:
    with triton_cpu.watch(), cases.float32_products(precision):
        cases.run_nan(case, torch.float32)


@pytest.mark.parametrize("slope", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("normed", [True, False])
def test_infinity_and_nan_before_an_activation(slope: float, normed: bool) -> None:
    """A slope of 0 makes 0 of minus infinity, as ReLU does, and NaN stays NaN."""
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, -2.0]).reshape(1, 1, 1, 4, 1)
    ones, zeros = torch.ones(1), torch.zeros(1)
    norm = Norm(zeros, ones, ones, zeros, 0.0, slope) if normed else None
    out = torch.empty_like(x)
    invalid = np.errstate(invalid="ignore")  # infinity by the zeros of outputs that there are not
    with triton_cpu.watch(), cases.float32_products("ieee"), invalid:
        triton.norm_relu_conv(x, norm, torch.ones(1, 1, 1, 1, 1), out, None, None, None, 1.0 if normed else slope)
    expected = [0.0 if slope == 0 else -torch.inf, torch.inf, torch.nan, -2 * slope]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_stem(case: StemCase, dtype: torch.dtype) -> None:
    with triton_cpu.watch():
        first, second = (run_stem(case, dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", STEMS, ids=str)
def test_nan_in_a_stem(case: StemCase) -> None:
    with triton_cpu.watch():
        run_stem_nan(case)


def test_moments_without_a_copy() -> None:
    x = torch.randn(3, 5, 7, 20).permute(0, 2, 3, 1)[:, None]
    mean, var = torch.full((2, 5), torch.nan)
    with triton_cpu.watch():
        triton.place(x, None, mean, var)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 1, 2, 3), correction=0)
    torch.testing.assert_close((mean.double(), var.double()), (exact_mean, exact_var), rtol=1e-6, atol=1e-7)


def test_a_gradient_loaded_in_place() -> None:
    buffer, value = torch.randn(2, 1, 6, 7, 20), torch.randn(2, 1, 6, 7, 12)
    stored, before = buffer[..., 3:15], buffer.clone()
    mean, correction = torch.randn(12), torch.randn(2, 12)
    expected = stored + (correction[1] * (value - mean) + correction[0])
    with triton_cpu.watch():
        triton.place_backward(Gradient(stored, value, mean, correction), stored)
    torch.testing.assert_close(stored, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(buffer[..., :3], before[..., :3]) and torch.equal(buffer[..., 15:], before[..., 15:])


def test_an_empty_batch_launches_nothing() -> None:
    x, out = torch.empty(0, 1, 4, 4, 16), torch.empty(0, 1, 4, 4, 8)
    norm, weight = Norm(*torch.rand(4, 16), 1e-5), torch.randn(8, 16, 1, 1, 1)
    dweight, sums = torch.full_like(weight, torch.nan), torch.full((2, 16), torch.nan)
    with triton_cpu.watch() as watch:
        triton.place(x, x, *torch.empty(2, 16))
        triton.norm_relu_conv(x, norm, weight, out, *torch.empty(2, 8))
        grad = Gradient(out, out, torch.randn(8), torch.randn(2, 8))
        triton.norm_relu_conv_backward(grad, x, norm, weight, x, True, dweight, Owed(*sums))
        triton.place_backward(grad, out)
        dbias = torch.full((8,), torch.nan)
        triton.norm_relu_conv(x, None, weight, out, None, None, torch.randn(8), 0.2)
        grad = Gradient(out, out, negative_slope=0.2)
        triton.norm_relu_conv_backward(grad, x, None, weight, x, True, dweight, None, dbias)
    assert not watch.launches
    assert not dweight.any() and not sums.any() and not dbias.any()


@pytest.mark.parametrize("case", [CASES[1], CASES[4], POOLED[3]], ids=str)
def test_tuning_leaves_the_results_alone(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Candidates run, and accumulate, into a copy."""
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda work, device: -sum(work.args[-1]))
    monkeypatch.setattr(tiles_on_disk, "file", lambda device: tmp_path / "tiles.json")
    cases.run_case(case, torch.bfloat16)
    tuned = {shape.kernel for shape, _ in tuning._chosen}
    backward = {"backward_data", "backward_weight"} if case.kernel != ONE else {"backward_pointwise"}
    assert tuned == {"norm_relu_conv", *(backward if case.weight else {"backward_data"})}
    plans.forget()
