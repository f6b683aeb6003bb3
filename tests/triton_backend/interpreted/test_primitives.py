"""Every kernel under the interpreter, its accesses checked, against autograd in float64."""

import cases
import pytest
import torch
import triton_cpu
from cases import CASES, Case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_relu_conv(case: Case, dtype: torch.dtype) -> None:
    with triton_cpu.watch():
        cases.run_case(case, dtype)
