"""Cases of the stem's two primitives, and what autograd in float64 says of them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from maxima import owed
from primitives import Debts, scale_of
from tolerances import assert_entries
from torch import Tensor

from fused_densenet.backends import triton
from fused_densenet.backends.contract import Norm, Owed


class StemCase(NamedTuple):
    """``x`` (N, D, H, W, C); where ``pool`` maxima over windows of 3 with stride 2; ``slope`` of the activation."""

    pixels: tuple[int, int, int, int]
    C: int
    pool: bool = True
    slope: float = 0.0

    @property
    def out_pixels(self) -> tuple[int, ...]:
        n, *sizes = self.pixels
        return (n, *((size + 1) // 2 for size in sizes)) if self.pool else self.pixels

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.pixels))}-C{self.C}{'' if self.pool else f'-no-pooling-{self.slope}'}"


STEMS = [
    StemCase((2, 1, 5, 6), 64),
    StemCase((1, 3, 4, 3), 24),
    StemCase((1, 1, 3, 5), 33, pool=False),
    StemCase((1, 1, 3, 5), 33, pool=False, slope=1.0),
    StemCase((1, 1, 5, 4), 20, pool=False, slope=0.25),
    StemCase((2, 1, 1, 37), 5),
    StemCase((1, 1, 2, 7), 70),
    StemCase((2, 1, 7, 1), 16),
]


def run_stem(case: StemCase, dtype: torch.dtype, backend: Any = triton) -> list[Tensor]:
    """Both primitives on channels of a wider buffer, with values drawn so that there are ties; returns what they gave."""
    generator = torch.Generator().manual_seed(case.C)
    mean, var, weight, bias = torch.randn(4, case.C, generator=generator)
    norm = Norm(mean, var.abs() + 0.5, weight.abs() + 0.5, bias, 1e-3, case.slope)
    buffer = torch.full((*case.pixels, case.C + 3), torch.nan).to(dtype)
    x = buffer[..., : case.C]
    x.copy_(torch.randn(*case.pixels, case.C, generator=generator).mul(4).round().div(4) + 0.03125)
    _keep_clear_of_zero(x, norm)
    grad = torch.randn(*case.out_pixels, case.C, generator=generator).to(dtype)
    out, dx = torch.full_like(grad, torch.nan), torch.full_like(buffer, torch.nan)
    debts = Debts(norm, True)
    backend.norm_relu_pool(x, norm, out)
    backend.norm_relu_pool_backward(grad, x, norm, dx[..., : case.C], debts.owed())
    assert dx[..., case.C :].isnan().all()

    a, dz, exact = exact_stem(case, grad, x, norm)
    size = exact_stem(case, grad.abs(), x, norm)[1]
    assert_entries(out, exact, exact.abs() + 1, dtype, "output")
    scale, found = scale_of(norm), debts.found(False)
    assert_entries(dx[..., : case.C], dz * scale, size * scale.abs(), dtype, "input's gradient")
    for name, (total, magnitude) in owed(dz, size, x.double() - norm.mean, norm).items():
        assert_entries(found[name], total, magnitude, torch.float32, name)
    assert case.pool == bool((a[dz == 0] > 0).any())
    return [out, dx[..., : case.C].contiguous(), *found.values()]


def exact_stem(case: StemCase, grad: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """The activation, the gradient by its input and the output; ties fall as in float32, where values are compared."""
    scale = norm.weight * torch.rsqrt(norm.var + norm.eps)
    z = (x.float() - norm.mean) * scale + norm.bias
    a = F.leaky_relu(z.double(), norm.negative_slope).requires_grad_()
    out = _pool(a) if case.pool else a
    [da] = torch.autograd.grad(out, a, grad.double())
    dz = da.masked_fill(z <= 0, 0) if norm.negative_slope == 0 else torch.where(z > 0, da, norm.negative_slope * da)
    return a.detach(), dz, out.detach()


def run_stem_nan(case: StemCase, backend: Any = triton) -> None:
    """A NaN reaches the windows that it lies in, and takes their gradient."""
    zeros, ones = torch.zeros(case.C), torch.ones(case.C)
    norm = Norm(ones, ones, ones, zeros, 0.0)
    x, grad = torch.rand(*case.pixels, case.C) + 2, torch.rand(*case.out_pixels, case.C)
    middle = tuple(size // 2 for size in case.pixels[1:])
    x[(0, *middle)] = torch.nan
    out, dx = torch.empty_like(grad), torch.empty_like(x)
    debts = Owed(torch.empty(case.C), torch.empty(case.C), torch.empty(2, case.C))
    backend.norm_relu_pool(x, norm, out)
    backend.norm_relu_pool_backward(grad, x, norm, dx, debts)
    _, dz, exact = exact_stem(case, grad, x, norm)
    assert torch.equal(out.isnan(), exact.isnan()) and exact.isnan().any()
    assert torch.equal(dx == 0, dz == 0) and dz[(0, *middle)].all()
    assert debts.dweight.isnan().all()


def _pool(a: Tensor) -> Tensor:
    windows = [3 if size > 1 else 1 for size in a.shape[1:4]]
    strides, padding = [(w + 1) // 2 for w in windows], [w // 2 for w in windows]
    return F.max_pool3d(a.movedim(4, 1), windows, strides, padding).movedim(1, 4)


def _keep_clear_of_zero(x: Tensor, norm: Norm) -> None:
    scale, bias = scale_of(norm), norm.bias.double()
    z = (x.double() - norm.mean.double()) * scale + bias
    x.copy_(torch.where(z.abs() < 0.02, (norm.mean + (1 - bias) / scale).to(x.dtype), x))
