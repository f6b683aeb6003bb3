"""What the repaired interpreter computes in bfloat16, and that planted bugs are found."""

import numpy as np
import pytest
import tolerances
import torch
import triton
import triton.language as tl
import triton_cpu


@triton.jit
def _multiply(a, b, c, M, N, K, MASK: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(0, K, BLOCK):
        k = i + tl.arange(0, BLOCK)
        mask = (m[:, None] < M) & ((k < K) | (not MASK))[None, :]
        if OTHER:
            x = tl.load(a + m[:, None] * K + k[None, :], mask=mask, other=0.0)
        else:
            x = tl.load(a + m[:, None] * K + k[None, :], mask=mask)
        y = tl.load(b + k[:, None] * N + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def _product(dtype: torch.dtype, mask: bool = True, other: bool = True) -> tuple[torch.Tensor, ...]:
    a, b, c = torch.randn(50, 40).to(dtype), torch.randn(40, 36).to(dtype), torch.empty(50, 36, dtype=dtype)
    with triton_cpu.watch():
        _multiply[(2, 2)](a, b, c, 50, 36, 40, mask, other, 32)
    return c, a.double() @ b.double(), a.double().abs() @ b.double().abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_and_rounding(dtype: torch.dtype) -> None:
    c, exact, magnitude = _product(dtype)
    tolerances.assert_entries(c, exact, magnitude, dtype, "product")


def test_rounds_to_the_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -2.7, np.inf, np.nan, 3e38], np.float32)
    expected = torch.from_numpy(values).bfloat16()
    assert torch.equal(
        torch.from_numpy(triton_cpu.widen(triton_cpu.narrow(values))).nan_to_num(), expected.float().nan_to_num()
    )


def test_a_load_out_of_bounds_is_found() -> None:
    with pytest.raises(Exception, match="load out of bounds"):
        _product(torch.float32, mask=False)


def test_a_masked_lane_without_other_is_nan() -> None:
    assert _product(torch.bfloat16, other=False)[0].isnan().any()


@triton.jit
def _sum(x, out, n, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    i = p * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + p // STRIDE, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))


@triton.jit
def _accumulate(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(out + i) + tl.load(x + tl.program_id(0) * BLOCK + i))


@triton.jit
def _store_twice(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK) // 2, 1.0)


def test_two_programs_that_store_one_element_are_found() -> None:
    x, out = torch.randn(1000), torch.empty(8)
    with triton_cpu.watch():
        _sum[(8,)](x, out, 1000, 1, 128)
    with pytest.raises(Exception, match="race"), triton_cpu.watch():
        _sum[(8,)](x, out, 1000, 2, 128)


def test_a_program_that_reads_what_another_stores_is_found() -> None:
    with pytest.raises(Exception, match="race"), triton_cpu.watch():
        _accumulate[(4,)](torch.ones(512), torch.zeros(128), 128)


def test_an_element_stored_twice_is_found() -> None:
    with pytest.raises(Exception, match="twice"), triton_cpu.watch():
        _store_twice[(1,)](torch.empty(64), 128)


def test_a_store_into_foreign_channels_is_found() -> None:
    """A slice of channels: what lies between its pixels is not its own."""
    buffer = torch.zeros(16, 8)
    with pytest.raises(Exception, match="store out of bounds"), triton_cpu.watch():
        _sum[(40,)](torch.randn(5120), buffer[:, :4], 5120, 1, 128)


def test_bytes_are_counted() -> None:
    x, out = torch.randn(1000), torch.empty(8)
    with triton_cpu.watch() as watch:
        _sum[(8,)](x, out, 1000, 1, 128)
    [(name, traffic)] = watch.launches
    assert name == "_sum"
    assert (traffic.loaded["x"], traffic.distinct_loaded["x"], traffic.stored["out"]) == (4000, 4000, 32)
