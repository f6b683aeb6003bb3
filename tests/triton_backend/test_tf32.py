"""Where float32 products are TF32's, and that their operands are rounded to it, not cut off."""

from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from triton_ptx import executing_ptx

from fused_densenet.backends import triton as backend
from fused_densenet.backends.contract import Gradient, Norm, Owed, uses_tf32


@pytest.mark.parametrize(("device", "tf32"), [("cuda", True), ("xpu", False)])
def test_only_nvidia_has_it(device: str, tf32: bool) -> None:
    x: Any = SimpleNamespace(dtype=torch.float32, device=torch.device(device))
    with cases.float32_products("tf32"):
        assert uses_tf32(x) is tf32
    with cases.float32_products("ieee"):
        assert not uses_tf32(x)


def nearest(x: torch.Tensor) -> torch.Tensor:
    """With 10 bits behind the point; ties, of which there are none here, aside."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11).float()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_operands_are_rounded_to_the_nearest(target: str) -> None:
    """A product with the identity gives its other operand, as it went in."""
    c = 32
    x, g, weight = torch.rand(64, c) + 0.5, torch.randn(64, c), torch.randn(c, c, 1, 1, 1)
    image, one = (1, 1, 1, 64, c), torch.eye(c)[..., None, None, None]
    out, dx, owed = torch.empty(image), torch.empty(image), Owed(*torch.empty(2, c))
    zero, ones = torch.zeros(c), torch.ones(c)
    norm = Norm(zero, ones, ones, zero, 0.0)
    dweight = torch.empty(c, c, 1, 1, 1)

    def backward(value: torch.Tensor, gradient: torch.Tensor, w: torch.Tensor) -> None:
        grad = Gradient(gradient.view(image))
        backend.norm_relu_conv_backward(grad, value.view(image), norm, w, dx, False, dweight, owed)

    with cases.float32_products("tf32"), executing_ptx(target):
        backend.norm_relu_conv(x.view(image), norm, one, out, None, None)
        assert torch.equal(out.view(64, c), nearest(x))
        backend.norm_relu_conv((x * 0 + torch.eye(64, c)).view(image), norm, weight, out, None, None)
        assert torch.equal(out.view(64, c)[:c], nearest(weight[..., 0, 0, 0]).T)
        backward(x, g, one)
        assert torch.equal(dx.view(64, c), nearest(g))
        backward(x, torch.eye(64, c), weight)
        assert torch.equal(dx.view(64, c)[:c], nearest(weight[..., 0, 0, 0]))
        assert torch.equal(dweight[..., 0, 0, 0], nearest(x)[:c])
