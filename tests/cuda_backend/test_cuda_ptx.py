"""nvcc's PTX of the kernels, executed on the CPU: bounds, races and results, against float64."""

import pytest
import small
import torch
from building import kernels
from cases import Case
from emulated import Emulated
from nvcc import all_ptx
from primitives import load, load_magnitude, loaded_gradient
from ptx_launch import Ptx
from tolerances import assert_entries

ARCHITECTURES = ["75", "80", "90a"]  # before sm_80 other instructions take the place of those that it lacks


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    all_ptx(kernels(), ARCHITECTURES)


LAUNCHED = [(a, name) for a in ARCHITECTURES for name in small.ARITHMETIC if (a, name) != ("75", "tf32")]


@pytest.mark.parametrize(("architecture", "arithmetic"), LAUNCHED)
@pytest.mark.parametrize("case", small.CASES, ids=str)
def test_norm_relu_conv(case: Case, arithmetic: str, architecture: str) -> None:
    ptx = Ptx(architecture)
    small.run(case, arithmetic, ptx)
    products = sum(machine.counts["mma"] for _, machine in ptx.machines)
    assert (products > 0) == (arithmetic != "float32" and (architecture, arithmetic) != ("75", "bfloat16"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_place(dtype: torch.dtype, architecture: str) -> None:
    backend = Emulated(Ptx(architecture))
    x = torch.randn(2, 13, 1, 7, 11).permute(0, 2, 3, 4, 1).to(dtype)
    out, mean, var = torch.empty(2, 1, 7, 11, 13, dtype=dtype), torch.empty(13), torch.empty(13)
    backend.place(x, out, mean, var)
    assert torch.equal(out, x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 1, 2, 3), correction=0)
    assert_entries(mean, exact_mean, x.double().abs().mean((0, 1, 2, 3)), torch.float32, "mean")
    assert_entries(var, exact_var, exact_var, torch.float32, "variance")
    grad = loaded_gradient(x.shape[:-1], 13, dtype)
    backend.place_backward(grad, x)
    assert_entries(x, load(grad), load_magnitude(grad), dtype, "gradient")
