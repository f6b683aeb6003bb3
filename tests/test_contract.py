"""What every backend is asked for, whatever its kernels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import float32_products
from forms import FORMS, SHAPES, Form, check_form
from primitives import Shape

from fused_densenet.backends import BACKENDS, extension
from fused_densenet.backends.contract import Gradient, Norm, uses_tf32


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.float32, True),
        ("cuda", torch.bfloat16, False),
        ("xpu", torch.float32, False),
    ],
)
def test_tf32_is_for_float32_on_nvidias_gpus(device: str, dtype: torch.dtype, expected: bool) -> None:
    """torch's switch is on in a build without CUDA, too; its convolutions on an Intel GPU are IEEE."""
    x: Any = SimpleNamespace(dtype=dtype, device=torch.device(device))
    with float32_products("tf32"):
        assert uses_tf32(x) == expected
    with float32_products("ieee"):
        assert not uses_tf32(x)


def test_tf32_is_not_for_amds_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    x: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    with float32_products("tf32"):
        assert not uses_tf32(x)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_form(backend: str, form: Form, shape: Shape, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for accumulate in (False, True):
        check_form(BACKENDS[backend], form, shape, dtype, accumulate)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_slope_of_zero_is_relu(backend: str) -> None:
    """Zero times infinity is no number: where a plain ReLU gives 0, one with a slope of 0 must."""
    x, out = torch.full((1, 1, 1, 2, 4), -torch.inf), torch.empty(1, 1, 1, 2, 3)
    norm = Norm(torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4), 0.0)
    for given in (norm, None):
        BACKENDS[backend].norm_relu_conv(x, given, torch.ones(3, 4, 1, 1, 1), out, None, None, torch.zeros(3), 0.0)
        assert torch.equal(out, torch.zeros_like(out))


def test_bad_arguments() -> None:
    x, out, weight, vectors = (
        torch.ones(1, 1, 2, 2, 4),
        torch.zeros(1, 1, 2, 2, 3),
        torch.ones(3, 4, 1, 1, 1),
        torch.ones(4, 4),
    )
    cpu, norm = BACKENDS["cpu"], Norm(*vectors, 1e-5)
    with pytest.raises(ValueError, match=r"slope: expected a number from 0 to 1, got 1.5"):
        cpu.norm_relu_conv(x, norm._replace(negative_slope=1.5), weight, out, None, None)
    with pytest.raises(ValueError, match=r"out_slope: expected a number from 0 to 1, got -0.5"):
        cpu.norm_relu_conv(x, norm, weight, out, None, None, None, -0.5)
    with pytest.raises(ValueError, match="bias: expected 3 entries"):
        cpu.norm_relu_conv(x, norm, weight, out, None, None, torch.ones(4))
    half = Norm(vectors[0], None, vectors[2], vectors[3], 1e-5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="var: expected a tensor beside mean, got None"):
        cpu.norm_relu_conv(x, half, weight, out, None, None)
    with pytest.raises(ValueError, match="dgamma: expected a tensor beside gamma, got None"):
        cpu.norm_relu_conv_backward(Gradient(out), x, norm, weight, torch.empty_like(x), False, None, None)
    with pytest.raises(ValueError, match="value: expected a tensor beside a value_slope that is not 1, got None"):
        cpu.place_backward(Gradient(out, negative_slope=0.5), out)
    with pytest.raises(ValueError, match=r"slope: expected 0 where maxima are taken, got 0.5"):
        cpu.norm_relu_pool(x, norm._replace(negative_slope=0.5), x[:, :, ::2, ::2].clone())
    with pytest.raises(ValueError, match="mean: expected a tensor, got None"):
        cpu.norm_relu_pool(x, extension.NO_NORM, x.clone())
    overlapping = torch.ones(8).as_strided((1, 1, 2, 2, 4), (4, 4, 2, 1, 1))
    with pytest.raises(ValueError, match="x: expected a pixel stride of at least 4, got 1"):
        cpu.norm_relu_conv(overlapping, norm, weight, out, None, None)
    assert not out.any()
