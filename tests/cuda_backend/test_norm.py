"""The norms' vectors against float64, and against the operators that they stand for."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from emulated import Emulated, Executor, Host
from ptx_launch import Ptx
from sanitized import Sanitized
from torch import Tensor

from fused_densenet.backends import eager

CHANNELS = [1, 33, 300]
EPS = 1e-3
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}  # a few roundings to float32 of numbers about 1


@pytest.fixture(params=["runner", "PTX", "thread", "address"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Every way of executing the kernels."""
    if request.param in ("thread", "address"):
        with contextlib.closing(Sanitized(request.param)) as started:
            yield started
    else:
        yield Host() if request.param == "runner" else Ptx("80")


def vectors(channels: int) -> dict[str, Tensor]:
    wide = torch.randn(2, channels + 3)
    return {
        "sums": torch.randn(2, channels),
        "var": torch.rand(channels),
        "gamma": torch.randn(channels),
        "pixels": torch.tensor([7.0]),
        "correction": wide[:, 1 : 1 + channels],
    }


@pytest.mark.parametrize("channels", CHANNELS)
def test_scale(channels: int, executor: Executor) -> None:
    given = vectors(channels)
    found = Emulated(executor).norm_scale(given["var"], given["gamma"], EPS)
    exact = given["gamma"].double() / (given["var"].double() + EPS).sqrt()
    torch.testing.assert_close(found.double(), exact, **TOLERANCE)
    torch.testing.assert_close(eager.norm_scale(given["var"], given["gamma"], EPS).double(), exact, **TOLERANCE)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("channels", CHANNELS)
def test_backward(channels: int, accumulate: bool, constant: bool, executor: Executor) -> None:
    """Of statistics over pixels, and of constants, which add nothing, not even where the sums are NaN."""
    given = vectors(channels)
    sums, var = given["sums"].double(), given["var"].double()
    scale = given["gamma"].double() / (var + EPS).sqrt()
    expected = given["correction"].double() if accumulate else torch.zeros(2, channels, dtype=torch.float64)
    if not constant:
        expected = expected - torch.stack([sums[0], sums[1] / (var + EPS)]) * scale / 7
    pixels = None if constant else given["pixels"]
    for backend in (Emulated(executor), eager):
        correction = vectors(channels)["correction"].copy_(given["correction"])
        if constant:
            given["sums"][0] = float("nan")
        arguments = (given["sums"], scale.float(), given["var"], EPS, pixels, correction, accumulate)
        dgamma = backend.norm_backward(*arguments)
        torch.testing.assert_close(dgamma.double(), sums[1] / (var + EPS).sqrt(), **TOLERANCE)
        torch.testing.assert_close(correction.double(), expected, **TOLERANCE)
