"""Forms of a norm-relu-conv beside the plain one: a bias, a leaky activation, no norm at all; and what autograd says of them."""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from primitives import Guarded, Shape, check_moments, clear_of_zero, draw_norm, make_weight, source, vector
from tolerances import assert_entries
from torch import Tensor

from fused_densenet.backends.contract import Gradient, Norm, Owed, accumulate_dtype

PIXELS = (0, 1, 2, 3)


class Form(NamedTuple):
    """``slope`` is of the norm's activation, ``out_slope`` of what follows the convolution."""

    norm: bool = True
    slope: float = 0.0
    bias: bool = False
    out_slope: float = 1.0

    def __str__(self) -> str:
        words = [f"norm-{self.slope}" if self.norm else "no norm", "bias" * self.bias, f"then-{self.out_slope}"]
        return "-".join(filter(None, words))


FORMS = [
    Form(bias=True),
    Form(slope=0.2),
    Form(slope=1.0, bias=True),
    Form(slope=0.1, bias=True, out_slope=0.2),
    Form(norm=False),
    Form(norm=False, bias=True, out_slope=0.2),
    Form(norm=False, bias=True, out_slope=0.0),
]
SHAPES = [
    Shape((2, 1, 7, 11), 20, 9, (1, 3, 3)),
    Shape((1, 1, 12, 13), 70, 33, (1, 1, 1)),
    Shape((2, 1, 9, 8), 36, 24, (1, 1, 1), pool=True),
    Shape((1, 3, 5, 4), 12, 40, (3, 3, 3)),
]


def check_form(backend: ModuleType, form: Form, shape: Shape, dtype: torch.dtype, accumulate: bool = False) -> None:
    """Forward and backward of ``backend`` against float64, entry by entry, in buffers that are NaN elsewhere."""
    wide, in_float32 = accumulate_dtype(dtype), accumulate
    norm, bias = draw_norm(shape.channels, dtype)._replace(negative_slope=form.slope), torch.randn(shape.out_channels)
    values = clear_of_zero(torch.randn(*shape.pixels, shape.channels).to(dtype), norm)
    x, weight = source(values, 2, 3), make_weight(shape, wide if in_float32 else dtype, "contiguous")
    bias = bias.to(wide if in_float32 else dtype)
    given, offset = norm if form.norm else None, bias if form.bias else None
    out = Guarded((*shape.out_pixels, shape.out_channels), dtype, 3, 2)
    mean, var = vector(shape.out_channels, dtype), vector(shape.out_channels, dtype)
    backend.norm_relu_conv(x, given, weight, out.data, mean.data, var.data, offset, form.out_slope)
    out.check("out")
    exact = _Exact(form, shape, values, norm, weight, bias)
    assert_entries(out.data, exact.out, exact.out_size, dtype, "out")
    check_moments(out.data, mean, var)

    stored = source(torch.randn(*shape.out_pixels, shape.out_channels).to(dtype), 1, 4)
    grad = Gradient(stored) if form.out_slope == 1 else Gradient(stored, out.data, negative_slope=form.out_slope)
    dx = Guarded(values.shape, dtype, 3, 2)
    old = dx.data.double().clone()
    if not accumulate:
        dx.data.fill_(torch.nan)
        old.zero_()
    dweight, dbias = torch.full_like(weight, torch.nan), torch.full_like(bias, torch.nan)
    owed = Owed(*(torch.full((shape.channels,), torch.nan, dtype=wide) for _ in range(2))) if form.norm else None
    backend.norm_relu_conv_backward(
        grad, x, given, weight, dx.data, accumulate, dweight, owed, dbias if form.bias else None
    )
    dx.check("dx")
    gradients = exact.gradients(stored.double(), out.data)
    sizes = exact.gradient_sizes(stored.double())
    found = {"dx": dx.data, "dweight": dweight}
    if form.bias:
        found["dbias"] = dbias
    if owed is not None:
        found |= {"dgamma": owed.dweight, "dbeta": owed.dbias}
    gradients["dx"], sizes["dx"] = gradients["dx"] + old, sizes["dx"] + old.abs()
    for name, result in found.items():
        assert_entries(result, gradients[name], sizes[name], dtype, name)


class _Exact:
    """In float64; sizes are the sums of the absolute values of what each entry adds up."""

    def __init__(self, form: Form, shape: Shape, x: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> None:
        self.form, self.shape = form, shape
        self.x, self.weight, self.bias = (t.double().requires_grad_() for t in (x, weight, bias))
        self.gamma, self.beta = (t.double().requires_grad_() for t in (norm.weight, norm.bias))
        self.mean, self.rstd = norm.mean.double(), (norm.var.double() + norm.eps).rsqrt()
        a = self.x
        if form.norm:
            z = (self.x - self.mean) * self.rstd * self.gamma + self.beta
            a = torch.where(z > 0, z, form.slope * z)
        product = self._convolve(a, self.weight)
        self.before = product + self.bias if form.bias else product
        self.out = torch.where(self.before > 0, self.before, form.out_slope * self.before).detach()
        self.out_size = self._convolve(self._operand_size(), self.weight.abs()).detach() + self.bias.detach().abs()

    def gradients(self, dout: Tensor, stored: Tensor) -> dict[str, Tensor]:
        g = torch.where(stored.double() > 0, dout, self.form.out_slope * dout)
        return self._named(self.before, g, self.gamma, self.beta, self.x)

    def gradient_sizes(self, dout: Tensor) -> dict[str, Tensor]:
        x = self.x.detach().abs().requires_grad_()
        gamma, beta = self.gamma.detach().abs().requires_grad_(), self.beta.detach().abs().requires_grad_()
        a = (x + self.mean.abs()) * self.rstd * gamma + beta if self.form.norm else x
        weight = self.weight.detach().abs().requires_grad_()
        before = self._convolve(a, weight) + self.bias.abs()
        return self._named(before, dout.abs(), gamma, beta, x, weight)

    def _named(
        self, result: Tensor, g: Tensor, gamma: Tensor, beta: Tensor, x: Tensor, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        sources = {"dx": x, "dweight": self.weight if weight is None else weight, "dbias": self.bias}
        sources |= {"dgamma": gamma, "dbeta": beta} if self.form.norm else {}
        found = torch.autograd.grad(result, list(sources.values()), g, allow_unused=True)
        gradients = {name: t for name, t in zip(sources, found, strict=True) if t is not None}
        if weight is not None:
            gradients["dbias"] = g.sum(PIXELS)
        return gradients

    def _operand_size(self) -> Tensor:
        if not self.form.norm:
            return self.x.abs()
        return (self.x.abs() + self.mean.abs()) * self.rstd * self.gamma.abs() + self.beta.abs()

    def _convolve(self, a: Tensor, weight: Tensor) -> Tensor:
        out = F.conv3d(a.permute(0, 4, 1, 2, 3), weight, padding=[size // 2 for size in self.shape.kernel])
        if self.shape.pool:
            out = F.avg_pool3d(out, [min(size, 2) for size in out.shape[2:]])
        return out.permute(0, 2, 3, 4, 1)
