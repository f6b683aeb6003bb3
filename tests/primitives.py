"""Problems for the primitives, and what each must compute: float64, and operator by operator in the data's dtype.

Data lies in a wider buffer, as it does in a block: channels that must not be read are NaN, bytes that must not be
written are compared afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from tolerances import tolerance, ulp
from torch import Tensor

from fused_densenet.backends.contract import Gradient, Norm, accumulate_dtype

LAYOUTS = ["contiguous", "channels_last", "strided"]
"""Of weights."""


@dataclass(frozen=True)
class Shape:
    """``pixels`` is (N, D, H, W), ``kernel`` (kd, kh, kw); ``pool`` halves the image's sizes before the product."""

    pixels: tuple[int, int, int, int]
    channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    pool: bool = False

    @property
    def out_pixels(self) -> tuple[int, ...]:
        n, *sizes = self.pixels
        return (n, *(size if size == 1 or not self.pool else size // 2 for size in sizes))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    dims = draw(st.integers(1, 3))
    longest = (40, 11, 5)[dims - 1]
    sizes = [draw(st.integers(1, longest)) if i >= 3 - dims else 1 for i in range(3)]
    kernel = [draw(st.sampled_from([1, 3])) if i >= 3 - dims else 1 for i in range(3)]
    if draw(st.booleans()):
        kernel = [max(kernel) if i >= 3 - dims else 1 for i in range(3)]
    channels = draw(st.one_of(st.integers(1, 70), st.sampled_from([8, 16, 64, 128])))
    out_channels = draw(st.one_of(st.integers(1, 50), st.sampled_from([12, 32, 48, 128])))
    pool = draw(st.booleans())
    if pool:
        kernel = [1, 1, 1]
    return Shape((draw(st.integers(1, 3)), *sizes), channels, out_channels, tuple(kernel), pool)


margins = st.sampled_from([0, 0, 1, 3, 8])
"""Channels beside a slice."""


@dataclass
class Guarded:
    """A slice of channels of a wider buffer, ``data``; nothing else of the buffer may change."""

    shape: Sequence[int]
    dtype: torch.dtype
    before: int = 0
    after: int = 0
    fill: float | None = None
    data: Tensor = field(init=False)

    def __post_init__(self) -> None:
        *outer, channels = self.shape
        self._buffer = torch.randn(*outer, self.before + channels + self.after).to(self.dtype)
        if self.fill is not None:
            self._buffer.fill_(self.fill)
        self.data = self._buffer[..., self.before : self.before + channels]
        self._around = self._outside()

    def set(self, values: Tensor) -> "Guarded":
        self.data.copy_(values)
        return self

    def check(self, what: str) -> None:
        assert torch.equal(self._outside(), self._around), f"{what}: memory beside it was written"

    def _outside(self) -> Tensor:
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[self._buffer.element_size()]
        end = self.before + self.shape[-1]
        return torch.cat([self._buffer[..., : self.before], self._buffer[..., end:]], -1).clone().view(bits)


def vector(length: int, dtype: torch.dtype) -> Guarded:
    """A per-channel result: uninitialised, between guards."""
    guarded = Guarded((length,), accumulate_dtype(dtype), 3, 2)
    guarded.data.fill_(float("nan"))
    return guarded


def check_moments(out: Tensor, mean: Guarded, var: Guarded) -> None:
    """Mean and variance of what was stored, not of what was computed."""
    mean_ulps, var_ulps = (tolerance(name) * ulp(mean.data.dtype) for name in ("mean", "squares"))
    exact_var, exact_mean = torch.var_mean(out.double(), (0, 1, 2, 3), correction=0)
    largest = out.double().abs().amax((0, 1, 2, 3))
    deviation = exact_var.sqrt()
    assert ((mean.data - exact_mean).abs() <= mean_ulps * largest).all()
    assert (
        (var.data - exact_var).abs() <= var_ulps * (exact_var + deviation * largest + mean_ulps * largest.square())
    ).all()
    mean.check("mean")
    var.check("var")


def source(values: Tensor, before: int, after: int) -> Tensor:
    """``values`` as a slice of a buffer that is NaN elsewhere."""
    return Guarded(values.shape, values.dtype, before, after, float("nan")).set(values).data


def affine(channels: int, dtype: torch.dtype) -> Norm:
    accumulate = accumulate_dtype(dtype)
    sign = torch.randint(0, 2, (channels,)) * 2 - 1
    scale = (0.5 + torch.rand(channels)) * sign
    return Norm(torch.randn(channels).to(accumulate), scale.to(accumulate), torch.randn(channels).to(accumulate))


def loaded_gradient(pixels: Sequence[int], channels: int, dtype: torch.dtype) -> Gradient:
    accumulate = accumulate_dtype(dtype)
    stored, value = (source(torch.randn(*pixels, channels).to(dtype), 2, 5) for _ in range(2))
    vectors = [torch.randn(channels).to(accumulate) for _ in range(4)]
    return Gradient(stored, value, *vectors)


def clear_of_zero(x: Tensor, norm: Norm) -> Tensor:
    """``x`` with the values moved away for which ReLU's input is within rounding of zero, in the dtype of ``x``."""
    mean, scale, shift = (v.double() for v in norm)
    root = mean - shift / scale
    distance = x.double() - root
    margin = 0.05 + 0.02 * root.abs()
    moved = torch.where(distance < 0, root - margin, root + margin)
    return torch.where(distance.abs() < margin, moved, x.double()).to(x.dtype)


def make_weight(shape: Shape, dtype: torch.dtype, layout: str) -> Tensor:
    size = (shape.out_channels, shape.channels, *shape.kernel)
    weight = (torch.randn(size) / (shape.channels * 3) ** 0.5).to(dtype)
    if layout == "channels_last":
        return weight.to(memory_format=torch.channels_last_3d)
    if layout == "strided":
        wide = torch.full((size[0], size[1] + 1, *size[2:-1], 2 * size[-1]), float("nan"), dtype=dtype)
        wide[:, 1:, ..., ::2] = weight
        return wide[:, 1:, ..., ::2]
    return weight


def load(grad: Gradient) -> Tensor:
    stored, value, scale, slope, mean, offset = (t.double() for t in grad)
    return scale * stored + slope * (value - mean) + offset


def load_magnitude(grad: Gradient) -> Tensor:
    stored, value, scale, slope, mean, offset = (t.double().abs() for t in grad)
    return scale * stored + slope * (value + mean) + offset


@dataclass
class Derivatives:
    """What the backward primitive returns, before ``dx`` is stored or accumulated."""

    dz: Tensor
    dweight: Tensor
    sum_dz: Tensor
    sum_dz_centered: Tensor


def exact_forward(x: Tensor, norm: Norm, weight: Tensor, pool: bool = False) -> Tensor:
    mean, scale, shift = (v.double() for v in norm)
    return _conv(((x.double() - mean) * scale + shift).relu(), weight.double(), pool)


def forward_magnitude(x: Tensor, norm: Norm, weight: Tensor, pool: bool = False) -> Tensor:
    return _conv(_activation_magnitude(x, norm), weight.double().abs(), pool)


def exact_backward(grad: Gradient, x: Tensor, norm: Norm, weight: Tensor, pool: bool = False) -> Derivatives:
    """By autograd."""
    mean, scale, shift = (v.double() for v in norm)
    z = ((x.double() - mean) * scale + shift).requires_grad_()
    w = weight.double().requires_grad_()
    dz, dweight = torch.autograd.grad(_conv(z.relu(), w, pool), [z, w], load(grad))
    return Derivatives(dz, dweight, dz.sum((0, 1, 2, 3)), (dz * (x.double() - mean)).sum((0, 1, 2, 3)))


def backward_magnitude(grad: Gradient, x: Tensor, norm: Norm, weight: Tensor, pool: bool = False) -> Derivatives:
    """The sums of the absolute values of what each entry adds up."""
    a = _activation_magnitude(x, norm).requires_grad_()
    w = weight.double().abs().requires_grad_()
    dz, dweight = torch.autograd.grad(_conv(a, w, pool), [a, w], load_magnitude(grad))
    distance = x.double().abs() + norm.mean.double().abs()
    return Derivatives(dz, dweight, dz.sum((0, 1, 2, 3)), (dz * distance).sum((0, 1, 2, 3)))


def operators(
    grad: Gradient, x: Tensor, norm: Norm, weight: Tensor, pool: bool = False
) -> tuple[Tensor, Derivatives, Tensor]:
    """Operator by operator in the dtype of ``x``: output, derivatives, and batch normalisation's gradient by ``x``.

    Products of a volume of depth 2 are float32, rounded afterwards: torch's weight gradient of such a bfloat16
    convolution reads unwritten memory.
    """
    channels = x.shape[-1]
    first = x.permute(0, 4, 1, 2, 3).contiguous().detach().requires_grad_()
    gamma, beta = norm.scale.clone().requires_grad_(), norm.shift.clone().requires_grad_()
    ones = torch.ones(channels, dtype=norm.mean.dtype)
    z = F.batch_norm(first, norm.mean, ones, gamma, beta, False, 0.0, 1e-30)
    w = weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    a, narrow = F.relu(z), w.to(x.dtype)
    if x.shape[1] == 2:
        a, narrow = a.to(accumulate_dtype(x.dtype)), narrow.to(accumulate_dtype(x.dtype))
    out = _convolve(a, narrow).to(x.dtype)
    out = _pool(out) if pool else out
    g = load(grad).to(x.dtype).permute(0, 4, 1, 2, 3).contiguous()
    dz, dx, dgamma, dbeta, dweight = torch.autograd.grad(out, [z, first, gamma, beta, w], g)
    last = (0, 2, 3, 4, 1)
    derivatives = Derivatives(dz.permute(last), dweight, dbeta, dgamma)
    return out.detach().permute(last), derivatives, dx.permute(last)


def _activation_magnitude(x: Tensor, norm: Norm) -> Tensor:
    mean, scale, shift = (v.double().abs() for v in norm)
    return (x.double().abs() + mean) * scale + shift


def _conv(a: Tensor, weight: Tensor, pool: bool) -> Tensor:
    out = _convolve(a.permute(0, 4, 1, 2, 3), weight)
    return (_pool(out) if pool else out).permute(0, 2, 3, 4, 1)


def _pool(out: Tensor) -> Tensor:
    # torch has no 16-bit average pooling in 3D for the CPU; where it has one, in 2D, it adds in float32 too.
    wide = out.to(accumulate_dtype(out.dtype))
    return F.avg_pool3d(wide, [min(size, 2) for size in out.shape[2:]]).to(out.dtype)


def _convolve(a: Tensor, weight: Tensor) -> Tensor:
    padding = tuple(size // 2 for size in weight.shape[2:])
    return F.conv3d(a, weight, padding=padding)
