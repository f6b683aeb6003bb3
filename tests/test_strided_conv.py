"""``strided_conv``, the first convolution of a program: against float64, and what it refuses."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strided_cases import STRIDED, StridedCase, run_strided, run_strided_nan
from test_cpu_primitives import all_dtypes

from fused_densenet.backends import BACKENDS


@all_dtypes
@pytest.mark.parametrize("case", STRIDED, ids=str)
@pytest.mark.parametrize("around", [(0, 0), (2, 3)], ids=["all channels", "some channels"])
def test_against_float64(case: StridedCase, dtype: torch.dtype, around: tuple[int, int]) -> None:
    run_strided(case, dtype, BACKENDS["cpu"], *around)


@all_dtypes
@given(
    sizes=st.tuples(*[st.integers(1, 12)] * 2, st.integers(1, 40)),
    kernel=st.tuples(*[st.integers(1, 5)] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    padding=st.tuples(*[st.integers(0, 3)] * 3),
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    out_channels=st.integers(1, 70),
)
def test_any_shape(
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    batch: int,
    channels: int,
    out_channels: int,
) -> None:
    image = [max(size, k - 2 * p) for size, k, p in zip(sizes, kernel, padding, strict=True)]
    run_strided(
        StridedCase((batch, *image), channels, out_channels, kernel, stride, padding), dtype, BACKENDS["cpu"], 1, 0
    )


@all_dtypes
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_nan(case: StridedCase, dtype: torch.dtype) -> None:
    run_strided_nan(case, dtype, BACKENDS["cpu"])


def test_no_images() -> None:
    out = torch.empty(0, 1, 4, 4, 5)
    BACKENDS["cpu"].strided_conv(torch.empty(0, 1, 8, 8, 3), _weight(), out, 1, 2, 2, 0, 1, 1)


def _weight() -> torch.Tensor:
    return torch.randn(5, 1, 3, 3, 3).permute(0, 4, 1, 2, 3)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "channels of the weight": (
        {"weight": torch.randn(5, 1, 3, 3, 4).permute(0, 4, 1, 2, 3)},
        ValueError,
        r"weight: expected shape \(K, 3,",
    ),
    "layout of the weight": (
        {"weight": torch.randn(5, 3, 1, 3, 3)},
        ValueError,
        "weight: expected a channels-last weight",
    ),
    "dtype of the weight": ({"weight": _weight().double()}, TypeError, "weight: expected dtype Float, got Double"),
    "sizes": ({"out": torch.zeros(2, 1, 5, 4, 5)}, ValueError, r"out: expected sizes \[2, 1, 4, 4\]"),
    "channels": ({"out": torch.zeros(2, 1, 4, 4, 6)}, ValueError, "out: expected 5 channels, got 6"),
    "dtype": ({"out": torch.zeros(2, 1, 4, 4, 5).half()}, TypeError, "out: expected dtype Float, got Half"),
    "stride": ({"stride": [1, 0, 2]}, ValueError, "stride, padding: expected numbers from 1, and from 0"),
    "padding": ({"padding": [0, -1, 1]}, ValueError, "stride, padding: expected numbers from 1, and from 0"),
    "numbers": ({"stride": [2, 2]}, ValueError, "stride, padding: expected three numbers"),
    "image": ({"x": torch.randn(2, 1, 8, 1, 3), "padding": [0, 1, 0]}, ValueError, "x: expected an image as large"),
    "pixels": ({"x": torch.randn(2, 1, 3, 8, 8).permute(0, 1, 3, 4, 2)}, ValueError, "x: expected channel stride 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    """Nothing is written."""
    change, error, message = BAD[name]
    out = torch.zeros(2, 1, 4, 4, 5)
    good: dict[str, Any] = {"x": torch.randn(2, 1, 8, 8, 3), "weight": _weight(), "out": out}
    arguments = {**good, "stride": [1, 2, 2], "padding": [0, 1, 1], **change}
    with pytest.raises(error, match=message):
        torch.ops.fused_densenet.strided_conv(*arguments.values())
    assert not arguments["out"].any()
