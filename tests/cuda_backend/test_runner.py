"""The runner does what the PTX ISA says of the instructions that kernels are made of."""

import ctypes

import building
import emulated
import pytest
import torch

DEPTH = 80


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulated.load(building.build([building.HERE / "examples" / "product.cu"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    types = [torch.bfloat16, torch.float16, torch.float32]
    wide = dtype == torch.float32
    a, b = torch.randn(16, DEPTH).to(dtype), torch.randn(DEPTH, 8).to(dtype)
    rows = b.T.contiguous() if wide else torch.cat([b, torch.full_like(b, torch.nan)], 1)
    out = torch.empty(16, 8)
    emulated.Host(library).statistics()
    code = library.example_product(types.index(dtype), *(ctypes.c_void_p(t.data_ptr()) for t in (a, rows, out)), DEPTH)
    assert code == 0, library.cuda_host_error()
    exact, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    rounding = 2.0**-10 if wide else 0.0  # two operands, half a unit of 10 bits each
    assert ((out - exact).abs() <= (rounding + DEPTH * 2.0**-24) * scale).all()
    if wide:
        assert not torch.allclose(out.double(), exact, rtol=1e-6, atol=1e-6), "operands are not rounded to TF32"
    statistics = emulated.Host(library).statistics()
    assert statistics["mma"] == DEPTH // (8 if wide else 16)
    assert statistics["ldmatrix_conflicts"] == 0
