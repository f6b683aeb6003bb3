"""Cases of the four primitives, and what autograd in float64 says of them."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tolerances import assert_entries
from torch import Tensor

from fused_densenet.backends import triton
from fused_densenet.backends.contract import Gradient, Norm


class Case(NamedTuple):
    """A norm-relu-conv of ``x`` (N, D, H, W, C) with ``K`` outputs; ``accumulate`` and ``weight`` are backward's."""

    pixels: tuple[int, int, int, int]
    C: int
    K: int
    kernel: tuple[int, int, int]
    accumulate: bool = True
    weight: bool = True

    def __str__(self) -> str:
        size = "x".join(map(str, self.pixels))
        return f"{size}-C{self.C}-K{self.K}-{'x'.join(map(str, self.kernel))}{'' if self.accumulate else '-stored'}"


LINE, IMAGE, VOLUME = (
    (1, 1, 1, 131),
    (1, 1, 7, 11),
    (1, 3, 5, 5),
)  # prime sizes, more than one tile, the last one ragged
ONE, ROW, SQUARE, CUBE = (1, 1, 1), (1, 1, 3), (1, 3, 3), (3, 3, 3)

GROWTHS = [(12, 24), (32, 64), (48, 96)]
CASES = [
    *[Case(LINE, c + k, 4 * k, ONE) for k, c in GROWTHS],
    *[Case(IMAGE, 4 * k, k, SQUARE, accumulate=False) for k, _ in GROWTHS],
    Case(IMAGE, 36, 48, ONE, weight=False),
    Case((3, 1, 5, 5), 96, 300, ONE),
    Case(LINE, 128, 32, ROW, accumulate=False),
    Case(VOLUME, 48, 12, CUBE, accumulate=False),
    Case(IMAGE, 36, 12, SQUARE),
    Case((2, 1, 1, 1), 17, 5, SQUARE),
    Case((5, 1, 3, 2), 70, 33, (1, 5, 1), weight=False),
]


class _Inputs(NamedTuple):
    draw: "_Draw"
    x: Tensor
    norm: Norm
    weight: Tensor
    out: Tensor
    mean: Tensor
    rounding: torch.dtype


def run_forward(
    case: Case, dtype: torch.dtype, device: str = "cpu", rounding: torch.dtype | None = None, backend: Any = triton
) -> _Inputs:
    """Runs the forward primitive of a case in a buffer full of NaN and foreign channels, and compares everything.

    ``rounding`` is the dtype that operands of products are rounded to, if not ``dtype``: float16 stands for TF32, which
    has as many bits.
    """
    rounding = rounding or dtype
    draw = _Draw(device, torch.Generator().manual_seed(case.C + case.K))
    norm = Norm(draw(case.C), draw.positive(case.C), 0.3 * draw(case.C))
    buffer = draw(*case.pixels, case.C + case.K + 3).to(dtype)
    x, out = buffer[..., : case.C], buffer[..., case.C : case.C + case.K]
    _keep_clear_of_zero(x, norm)
    fan_in = case.C * case.kernel[0] * case.kernel[1] * case.kernel[2]
    weight = draw(case.K, case.C, *case.kernel) / fan_in**0.5
    before = buffer.clone()
    out.fill_(torch.nan)
    mean, var = draw.nothing(case.K), draw.nothing(case.K)
    backend.norm_relu_conv(x, norm, weight, out, mean, var)
    _compare_forward(case, x, norm, weight, out, mean, var, rounding)
    _assert_bits(buffer[..., case.C + case.K :], before[..., case.C + case.K :], "channels behind the output")
    _assert_bits(x, before[..., : case.C], "the input")
    return _Inputs(draw, x, norm, weight, out, mean, rounding)


def run_case(
    case: Case, dtype: torch.dtype, device: str = "cpu", rounding: torch.dtype | None = None, backend: Any = triton
) -> None:
    """:func:`run_forward`, then the backward primitive with the output as its gradient's value."""
    draw, x, norm, weight, out, mean, rounding = run_forward(case, dtype, device, rounding, backend)
    gradients = draw(*case.pixels, case.C + case.K + 3).to(dtype)
    stored = gradients[..., case.C : case.C + case.K]
    grad = Gradient(stored, out, draw.positive(case.K), 0.1 * draw(case.K), mean, 0.1 * draw(case.K))
    before = gradients.clone()
    dx = gradients[..., : case.C]
    if not case.accumulate:
        dx.fill_(torch.nan)
    dweight = torch.full_like(weight, torch.nan) if case.weight else None
    sum_dz, sum_dz_centered = draw.nothing(case.C), draw.nothing(case.C)
    backend.norm_relu_conv_backward(grad, x, norm, weight, dx, case.accumulate, dweight, sum_dz, sum_dz_centered)
    _compare_backward(
        case, grad, x, norm, weight, before[..., : case.C], dx, dweight, sum_dz, sum_dz_centered, rounding
    )
    _assert_bits(gradients[..., case.C :], before[..., case.C :], "gradients of other channels")


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """torch's switch for convolutions of float32: "tf32" or "ieee"."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


class _Draw:
    def __init__(self, device: str, generator: torch.Generator) -> None:
        self.device, self.generator = device, generator

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def positive(self, *shape: int) -> Tensor:
        return 0.5 + torch.rand(*shape, generator=self.generator).to(self.device)

    def nothing(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, device=self.device)


def _keep_clear_of_zero(x: Tensor, norm: Norm) -> None:
    """Moves values whose sign by ReLU would depend on rounding."""
    z = (x.double() - norm.mean.double()) * norm.scale.double() + norm.shift.double()
    x.copy_(torch.where(z.abs() < 0.02, (norm.mean + (1 - norm.shift) / norm.scale).to(x.dtype), x))


def _first(x: Tensor) -> Tensor:
    return x.double().movedim(4, 1)


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, 4)


def _activation(x: Tensor, norm: Norm) -> Tensor:
    mean, scale, shift = (v.double() for v in norm)
    return ((x.double() - mean) * scale + shift).relu()


def _compare_forward(
    case: Case, x: Tensor, norm: Norm, weight: Tensor, out: Tensor, mean: Tensor, var: Tensor, dtype: torch.dtype
) -> None:
    padding = [size // 2 for size in case.kernel]
    a = _activation(x, norm)
    exact = _last(F.conv3d(_first(a), weight.double(), padding=padding))
    magnitude = _last(F.conv3d(_first(a), weight.double().abs(), padding=padding))
    assert_entries(out, exact, magnitude, dtype, "output")
    stored = out.double().reshape(-1, case.K)
    exact_var, exact_mean = torch.var_mean(stored, 0, correction=0)
    assert_entries(mean, exact_mean, stored.abs().mean(0), torch.float32, "mean")
    assert_entries(var, exact_var, exact_var + 1e-6 * stored.square().mean(0), torch.float32, "variance")


def _compare_backward(
    case: Case,
    grad: Gradient,
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    dx_before: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    sum_dz: Tensor,
    sum_dz_centered: Tensor,
    dtype: torch.dtype,
) -> None:
    padding = [size // 2 for size in case.kernel]
    stored, value, scale, slope, mean, offset = (t.double() for t in grad)
    g = scale * stored + (slope * (value - mean) + offset)
    g_size = (scale * stored).abs() + (slope * (value - mean)).abs() + offset.abs()
    a, centred = _activation(x, norm), x.double() - norm.mean.double()
    da, dw = _convolution_backward(_first(g), _first(a), weight.double(), padding)
    da_size, dw_size = _convolution_backward(_first(g_size), _first(a), weight.double().abs(), padding)
    dz, dz_size = da.masked_fill(a <= 0, 0), da_size.masked_fill(a <= 0, 0)
    if case.accumulate:
        s = norm.scale.double()
        size = dx_before.double().abs() + dz_size * s.abs()
        assert_entries(dx, dx_before.double() + dz * s, size, dtype, "input's gradient")
    else:
        assert_entries(dx, dz, dz_size, dtype, "input's gradient")
    if dweight is not None:
        assert_entries(dweight, dw, dw_size, dtype, "weight's gradient")
    assert_entries(sum_dz, dz.flatten(0, 3).sum(0), dz_size.flatten(0, 3).sum(0), dtype, "sum of dz")
    exact, size = (dz * centred).flatten(0, 3).sum(0), (dz_size * centred.abs()).flatten(0, 3).sum(0)
    assert_entries(sum_dz_centered, exact, size, dtype, "sum of dz (x - mean)")


def _convolution_backward(g: Tensor, a: Tensor, weight: Tensor, padding: list[int]) -> tuple[Tensor, Tensor]:
    a, weight = a.detach().requires_grad_(), weight.detach().requires_grad_()
    da, dw = torch.autograd.grad(F.conv3d(a, weight, padding=padding), (a, weight), g)
    return _last(da), dw


def _assert_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits)), f"{what} changed"
