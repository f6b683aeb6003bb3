"""Problems for the primitives, and what each must compute: float64, and operator by operator in the data's dtype.

Data lies in a wider buffer, as it does in a block: channels that must not be read are NaN, bytes that must not be
written are compared afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tolerances import tolerance, ulp
from torch import Tensor

from fused_densenet.backends.contract import Gradient, Norm, Owed, accumulate_dtype

PIXELS = (0, 1, 2, 3)
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


def draw_norm(channels: int, dtype: torch.dtype, affine_dtype: torch.dtype | None = None) -> Norm:
    """Weight and bias in ``affine_dtype``, by default that of statistics."""
    accumulate = accumulate_dtype(dtype)
    sign = torch.randint(0, 2, (channels,)) * 2 - 1
    weight, var = (0.5 + torch.rand(channels)) * sign, 0.5 + torch.rand(channels)
    mean, bias = torch.randn(channels), torch.randn(channels)  # each its own memory
    narrow = affine_dtype or accumulate
    return Norm(mean.to(accumulate), var.to(accumulate), weight.to(narrow), bias.to(narrow), 1e-2)


def scale_of(norm: Norm) -> Tensor:
    return norm.weight.double() * _rstd(norm)


def _rstd(norm: Norm) -> Tensor:
    return (norm.var.double() + norm.eps).rsqrt()


def loaded_gradient(pixels: Sequence[int], channels: int, dtype: torch.dtype, plain: bool = False) -> Gradient:
    """Owing something, or ``plain``."""
    stored, value = (source(torch.randn(*pixels, channels).to(dtype), 2, 5) for _ in range(2))
    if plain:
        return Gradient(stored)
    wide = torch.randn(2, channels + 3).to(accumulate_dtype(dtype))
    return Gradient(stored, value, torch.randn(channels).to(wide.dtype), wide[:, 1:-2])


def clear_of_zero(x: Tensor, norm: Norm) -> Tensor:
    """``x`` with the values moved away for which ReLU's input is within rounding of zero, in the dtype of ``x``."""
    root = norm.mean.double() - norm.bias.double() / scale_of(norm)
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
    stored = grad.stored.double()
    if grad.value is None or grad.mean is None or grad.correction is None:
        return stored
    constant, slope = grad.correction.double()
    return stored + slope * (grad.value.double() - grad.mean.double()) + constant


def load_magnitude(grad: Gradient) -> Tensor:
    stored = grad.stored.double().abs()
    if grad.value is None or grad.mean is None or grad.correction is None:
        return stored
    constant, slope = grad.correction.double().abs()
    return stored + slope * (grad.value.double().abs() + grad.mean.double().abs()) + constant


@dataclass
class Derivatives:
    """What the backward primitive returns, before ``dx`` and the correction are stored or accumulated."""

    dx: Tensor
    dweight: Tensor
    dgamma: Tensor
    dbeta: Tensor
    constant: Tensor
    slope: Tensor


OWED = ("dgamma", "dbeta", "constant", "slope")


@dataclass
class Debts:
    """Guarded memory for what a norm is owed; the correction, ``old`` before, between guards of its own."""

    norm: Norm
    batch_stats: bool

    def __post_init__(self) -> None:
        channels, accumulate = len(self.norm.mean), self.norm.mean.dtype
        self._gradients = [Guarded((channels,), self.norm.weight.dtype, 3, 2, float("nan")) for _ in range(2)]
        self._correction = Guarded((2, channels), accumulate, 2, 4)
        self.old = self._correction.data.double().clone()

    def owed(self, pixels: Tensor | None = None) -> Owed:
        correction = self._correction.data if self.batch_stats else None
        return Owed(*(g.data for g in self._gradients), correction, pixels)

    def found(self, accumulated: bool) -> dict[str, Tensor]:
        """What was left; of the correction what was added."""
        for name, guarded in zip(OWED, (*self._gradients, self._correction), strict=False):
            guarded.check(name)
        names = OWED if self.batch_stats else OWED[:2]
        correction = self._correction.data.double() - self.old if accumulated else self._correction.data
        return dict(zip(names, (*(g.data for g in self._gradients), *correction), strict=False))


def exact_forward(x: Tensor, norm: Norm, weight: Tensor, pool: bool = False) -> Tensor:
    a = ((x.double() - norm.mean.double()) * scale_of(norm) + norm.bias.double()).relu()
    return _conv(a, weight.double(), pool)


def forward_magnitude(x: Tensor, norm: Norm, weight: Tensor, pool: bool = False) -> Tensor:
    return _conv(_activation_magnitude(x, norm), weight.double().abs(), pool)


def exact_backward(grad: Gradient, x: Tensor, norm: Norm, weight: Tensor, pool: bool = False) -> Derivatives:
    """By autograd."""
    centered = x.double() - norm.mean.double()
    z = (centered * scale_of(norm) + norm.bias.double()).requires_grad_()
    w = weight.double().requires_grad_()
    dz, dweight = torch.autograd.grad(_conv(z.relu(), w, pool), [z, w], load(grad))
    return _derivatives(dz, dweight, centered, scale_of(norm), norm, -1)


def backward_magnitude(grad: Gradient, x: Tensor, norm: Norm, weight: Tensor, pool: bool = False) -> Derivatives:
    """The sums of the absolute values of what each entry adds up."""
    a = _activation_magnitude(x, norm).requires_grad_()
    w = weight.double().abs().requires_grad_()
    dz, dweight = torch.autograd.grad(_conv(a, w, pool), [a, w], load_magnitude(grad))
    distance = x.double().abs() + norm.mean.double().abs()
    return _derivatives(dz, dweight, distance, scale_of(norm).abs(), norm, 1)


def _derivatives(dz: Tensor, dweight: Tensor, centered: Tensor, scale: Tensor, norm: Norm, sign: int) -> Derivatives:
    dgamma, dbeta, share = (dz * centered).sum(PIXELS) * _rstd(norm), dz.sum(PIXELS), sign * scale / dz[..., 0].numel()
    return Derivatives(scale * dz, dweight, dgamma, dbeta, share * dbeta, share * dgamma * _rstd(norm))


def operators(
    grad: Gradient, x: Tensor, norm: Norm, weight: Tensor, pool: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Operator by operator in the dtype of ``x``: output, and derivatives by name.

    Products of a volume of depth 2, and of a kernel that reaches beyond the whole image, are float32, rounded
    afterwards: torch's weight gradient of such a bfloat16 convolution reads unwritten memory.
    """
    first = x.permute(0, 4, 1, 2, 3).contiguous().detach().requires_grad_()
    gamma, beta = norm.weight.float().requires_grad_(), norm.bias.float().requires_grad_()
    z = F.batch_norm(first, norm.mean, norm.var, gamma, beta, False, 0.0, norm.eps)
    w = weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    a, narrow = F.relu(z), w.to(x.dtype)
    beyond = any(size // 2 > side for size, side in zip(weight.shape[2:], x.shape[1:4], strict=True))
    if x.shape[1] == 2 or beyond:
        a, narrow = a.to(accumulate_dtype(x.dtype)), narrow.to(accumulate_dtype(x.dtype))
    out = _convolve(a, narrow).to(x.dtype)
    out = _pool(out) if pool else out
    g = load(grad).to(x.dtype).permute(0, 4, 1, 2, 3).contiguous()
    dx, dgamma, dbeta, dweight = torch.autograd.grad(out, [first, gamma, beta, w], g)
    last = (0, 2, 3, 4, 1)
    derivatives = {"dx": dx.permute(last), "dweight": dweight, "dgamma": dgamma, "dbeta": dbeta}
    return out.detach().permute(last), derivatives


def _activation_magnitude(x: Tensor, norm: Norm) -> Tensor:
    return (x.double().abs() + norm.mean.double().abs()) * scale_of(norm).abs() + norm.bias.double().abs()


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
