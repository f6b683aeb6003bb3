"""Convolutions with a bias, with leaky activations, and without a norm, executed by the runner, against float64."""

import pytest
import torch
from cases import IN_OTHER_FORMS, ONE, SQUARE, Case
from emulated import Emulated
from forms import FORMS, Form
from small import ARITHMETIC, run

from fused_densenet.backends import eager
from fused_densenet.backends.contract import Gradient, Norm, Owed

all_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETIC)


@all_arithmetic
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("case", IN_OTHER_FORMS, ids=str)
def test_form(case: Case, multiprocessors: int, arithmetic: str) -> None:
    """One multiprocessor: large tiles, blocks of many. Many: small ones, and channels split between blocks."""
    run(case, arithmetic, None, multiprocessors)


@all_arithmetic
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_many_tiles_of_many_channels(form: Form, arithmetic: str) -> None:
    """Every tile of a block begins with the bias."""
    for case in (Case((1, 1, 13, 53), 64, 192, ONE), Case((2, 1, 20, 20), 40, 50, SQUARE)):
        run(case._replace(form=form), arithmetic, None, 1)


@all_arithmetic
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_infinities_and_nan(slope: float, arithmetic: str) -> None:
    """ReLU makes 0 of -inf, and of infinite gradients behind it; NaN stays."""
    dtype, tf32, _ = ARITHMETIC[arithmetic]
    inf, nan = float("inf"), float("nan")
    identity = Norm(*(torch.full((4,), value) for value in (0.0, 1.0, 1.0, 0.0)), 0.0, slope)
    x = torch.tensor([-inf, -2.0, 2.0, nan]).repeat(1, 1, 1, 9, 1).to(dtype)
    stored, value = torch.tensor([inf, 3.0, nan, 3.0]), torch.tensor([-1.0, 1.0, -1.0, nan])
    grad = Gradient(*(t.repeat(1, 1, 1, 9, 1).to(dtype) for t in (stored, value)), negative_slope=slope)
    weight, bias = torch.eye(4).reshape(4, 4, 1, 1, 1).to(dtype), torch.tensor([0.0, -inf, nan, 0.0])
    results = []
    for backend in (Emulated(tf32=tf32), eager):
        out, dx, dweight = torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight)
        owed, dbias = Owed(torch.empty(4), torch.empty(4)), torch.empty(4)
        backend.norm_relu_conv(x[..., :3], identity_of(identity, 3), weight[:, :3], out, None, None, bias, slope)
        backend.norm_relu_conv_backward(grad, x, identity, weight, dx, False, dweight, owed, dbias)
        loaded = torch.empty_like(x)
        backend.place_backward(grad, loaded)
        results.append((out, loaded, dbias))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def identity_of(norm: Norm, channels: int) -> Norm:
    return norm._replace(**{name: getattr(norm, name)[:channels] for name in ("mean", "var", "weight", "bias")})
