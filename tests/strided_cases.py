"""Convolutions of any stride, as a stem has them, against float64."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from primitives import Guarded, source
from tolerances import assert_entries
from torch import Tensor


class StridedCase(NamedTuple):
    image: Sequence[int]  # n, d, h, w
    channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]


STRIDED = [
    StridedCase((2, 1, 33, 40), 3, 64, (1, 7, 7), (1, 2, 2), (0, 3, 3)),
    StridedCase((1, 5, 6, 7), 5, 33, (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    StridedCase((1, 1, 1, 61), 1, 16, (1, 1, 15), (1, 1, 2), (0, 0, 7)),
    StridedCase((3, 1, 16, 12), 20, 70, (1, 4, 4), (1, 4, 4), (0, 0, 0)),
    StridedCase((1, 1, 4, 4), 3, 8, (1, 7, 7), (1, 2, 2), (0, 9, 9)),
    StridedCase((1, 1, 14, 15), 70, 24, (1, 3, 2), (1, 3, 1), (0, 1, 0)),
]
"""Images narrower than the kernel; rows of patches of less than a block of an operand, and of several; even kernels."""


def strided_operands(case: StridedCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The image's values, and the weight as the contract has it."""
    *kernel, channels = *case.kernel, case.channels
    weight = torch.randn(case.out_channels, *kernel, channels) / (channels * torch.tensor(kernel).prod()).sqrt()
    return torch.randn(*case.image, channels).to(dtype), weight.to(dtype).permute(0, 4, 1, 2, 3)


def exact_strided(case: StridedCase, x: Tensor, weight: Tensor) -> Tensor:
    out = F.conv3d(x.double().permute(0, 4, 1, 2, 3), weight.double(), None, case.stride, case.padding)
    return out.permute(0, 2, 3, 4, 1)


def run_strided(case: StridedCase, dtype: torch.dtype, backend: Any, before: int = 0, after: int = 0) -> None:
    """Of channels ``before`` and ``after`` which others lie in memory."""
    values, weight = strided_operands(case, dtype)
    exact, magnitude = exact_strided(case, values, weight), exact_strided(case, values.abs(), weight.abs())
    out = Guarded(exact.shape, dtype, 1, 2)
    backend.strided_conv(source(values, before, after), weight, out.data, *case.stride, *case.padding)
    assert_entries(out.data, exact, magnitude, dtype, "out")
    out.check("out")


def run_strided_nan(case: StridedCase, dtype: torch.dtype, backend: Any) -> None:
    """A NaN reaches the pixels whose kernel lies on it, and no other."""
    values, weight = strided_operands(case, dtype)
    bad = torch.zeros(case.image).bernoulli_(0.05).bool()
    values[bad] = float("nan")
    touched = exact_strided(case, bad[..., None].expand(*case.image, case.channels), torch.ones_like(weight)) > 0
    out = torch.empty(touched.shape, dtype=dtype)
    backend.strided_conv(values, weight, out, *case.stride, *case.padding)
    assert torch.equal(out.isnan(), touched)
