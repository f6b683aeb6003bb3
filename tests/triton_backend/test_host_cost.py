"""Microseconds of Python in each primitive, counted up to the launch in C, on kernels that are really compiled."""

from collections.abc import Callable

import pytest
import report
import torch
from host_cost import microseconds
from triton_offline import offline

from fused_densenet.backends import triton as backend
from fused_densenet.backends.contract import Gradient, Norm, Owed
from fused_densenet.backends.triton import plans

LIMIT = 40.0


def calls() -> dict[str, Callable[[], None]]:
    """The primitives of a training step of DenseNet-121, in bfloat16 with float32 weights, some of them pooled."""
    pixels, c, k, growth = (2, 1, 14, 14), 256, 128, 32
    buffer, gradients = torch.empty(2, *pixels, 512, dtype=torch.bfloat16)
    y, dy = torch.empty(2, *pixels, k, dtype=torch.bfloat16)
    x, dx, new, dnew = buffer[..., :c], gradients[..., :c], buffer[..., c : c + growth], gradients[..., c : c + growth]
    wide, narrow = Norm(*torch.empty(4, c), 1e-5), Norm(*torch.empty(4, k), 1e-5)
    owed, owed_y = Owed(*torch.empty(2, c), torch.empty(2, c)), Owed(*torch.empty(2, k), torch.empty(2, k))
    pointwise, spatial = torch.empty(k, c, 1, 1, 1), torch.empty(growth, k, 1, 3, 3)
    grad_y = Gradient(dy, y, torch.empty(k), torch.empty(2, k))
    grad_new = Gradient(dnew, new, torch.empty(growth), torch.empty(2, growth))
    grad_x, moments = Gradient(dx, x, torch.empty(c), torch.empty(2, c)), torch.empty(2, k)
    first = torch.empty(pixels[0], c, *pixels[1:], dtype=torch.bfloat16).permute(0, 2, 3, 4, 1)
    dpointwise, dspatial = torch.empty_like(pointwise), torch.empty_like(spatial)
    return {
        "place": lambda: backend.place(first, x, wide.mean, wide.var),
        "place_backward": lambda: backend.place_backward(grad_x, first),
        "1x1 forward": lambda: backend.norm_relu_conv(x, wide, pointwise, y, *moments),
        "3x3 forward": lambda: backend.norm_relu_conv(y, narrow, spatial, new, *moments[:, :growth]),
        "3x3 backward": lambda: backend.norm_relu_conv_backward(
            grad_new, y, narrow, spatial, dy, False, dspatial, owed_y
        ),
        "1x1 backward": lambda: backend.norm_relu_conv_backward(grad_y, x, wide, pointwise, dx, True, dpointwise, owed),
    }


@pytest.mark.parametrize("primitive", calls())
def test_python_of_a_call(primitive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    plans.forget()
    with offline("sm_90"):
        cost = microseconds(calls()[primitive])
    plans.forget()
    report.sections["Triton kernels: microseconds of Python in a call"].append(f"{primitive:16} {cost:5.1f}")
    assert cost < LIMIT
