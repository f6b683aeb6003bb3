"""nvcc's PTX of the kernels, executed on the CPU: bounds, races and results, against float64."""

import pytest
import small
from building import kernels
from cases import Case
from nvcc import all_ptx
from ptx_launch import Ptx

ARCHITECTURES = ["80", "90a"]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    all_ptx(kernels(), ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("arithmetic", small.ARITHMETIC)
@pytest.mark.parametrize("case", small.CASES, ids=str)
def test_norm_relu_conv(case: Case, arithmetic: str, architecture: str) -> None:
    ptx = Ptx(architecture)
    small.run(case, arithmetic, ptx)
    products = sum(machine.counts["mma"] for _, machine in ptx.machines)
    assert (products > 0) == (arithmetic != "float32")
