"""Cases of the four primitives, and what autograd in float64 says of them."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from forms import FORMS, Form
from primitives import scale_of
from tolerances import assert_entries, assert_unbiased
from torch import Tensor

from fused_densenet.backends import triton
from fused_densenet.backends.contract import Gradient, Norm, Owed, pooled

PLAIN = Form()
LEAKY = Form(slope=0.1)
RESIDUAL, RESIDUAL_RELU = (Form(norm=False, bias=True, out_slope=slope) for slope in (0.2, 0.0))
ALL = Form(slope=0.3, bias=True, out_slope=0.5)


class Case(NamedTuple):
    """A norm-relu-conv of ``x`` (N, D, H, W, C) with ``K`` outputs; ``accumulate`` and ``weight`` are backward's.

    ``weights`` is the dtype of the weight and of the bias, None for that of the data.
    """

    pixels: tuple[int, int, int, int]
    C: int
    K: int
    kernel: tuple[int, int, int]
    accumulate: bool = True
    weight: bool = True
    pool: bool = False
    weights: torch.dtype | None = torch.float32
    form: Form = PLAIN

    @property
    def out_pixels(self) -> tuple[int, ...]:
        return (self.pixels[0], *pooled(self.pixels[1:])) if self.pool else self.pixels

    def __str__(self) -> str:
        size = "x".join(map(str, self.pixels))
        words = ["" if self.accumulate else "-stored", "-pooled" * self.pool, "-narrow" * (self.weights is None)]
        words.append("" if self.form == PLAIN else f"-{self.form}")
        return f"{size}-C{self.C}-K{self.K}-{'x'.join(map(str, self.kernel))}{''.join(words)}"


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
POOLED = [
    Case((2, 1, 9, 22), 36, 24, ONE, accumulate=False, pool=True),
    Case(LINE, 70, 33, ONE, pool=True, weights=None),
    Case((2, 3, 5, 4), 24, 300, ONE, accumulate=False, pool=True),
    Case((1, 1, 4, 6), 17, 260, ONE, pool=True, weight=False),
]
NARROW_WEIGHTS = [
    Case(LINE, 36, 48, ONE, weights=None),
    Case(IMAGE, 48, 12, SQUARE, accumulate=False, weights=None),
]

IN_OTHER_FORMS = [
    *[Case(LINE, 36, 48, ONE, form=form) for form in FORMS],
    *[Case(IMAGE, 48, 12, SQUARE, accumulate=False, form=form) for form in FORMS],
    Case((1, 1, 9, 9), 64, 32, SQUARE, weights=None, form=RESIDUAL),
    Case(VOLUME, 24, 12, CUBE, form=ALL),
    Case((3, 1, 5, 5), 70, 300, ONE, weight=False, form=ALL),
    Case((5, 1, 3, 2), 33, 17, (1, 5, 1), weight=False, form=RESIDUAL_RELU),
    Case((2, 1, 9, 22), 36, 24, ONE, accumulate=False, pool=True, form=ALL),
    Case((2, 3, 5, 4), 24, 33, ONE, pool=True, weights=None, form=Form(norm=False)),
]

NAN = [
    Case((1, 1, 5, 6), 16, 8, SQUARE, accumulate=False),
    Case((1, 1, 5, 6), 16, 8, ONE, accumulate=False),
    Case((1, 1, 5, 6), 16, 8, ONE, accumulate=False, pool=True),
]


class _Inputs(NamedTuple):
    draw: "_Draw"
    x: Tensor
    norm: Norm | None
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
    vectors = draw(case.C), draw.positive(case.C), draw.positive(case.C), 0.3 * draw(case.C)
    norm = Norm(*vectors, 1e-3, case.form.slope) if case.form.norm else None
    buffer, outputs = _buffers(case, draw, dtype)
    x, out = buffer[..., : case.C], outputs[..., case.C : case.C + case.K]
    if norm is not None:
        _keep_clear_of_zero(x, norm)
    fan_in = case.C * case.kernel[0] * case.kernel[1] * case.kernel[2]
    weight = (draw(case.K, case.C, *case.kernel) / fan_in**0.5).to(case.weights or dtype)
    bias = draw(case.K).to(weight.dtype) if case.form.bias else None
    before = buffer.clone(), outputs.clone()
    out.fill_(torch.nan)
    mean, var = draw.nothing(case.K), draw.nothing(case.K)
    backend.norm_relu_conv(x, norm, weight, out, mean, var, bias, case.form.out_slope)
    on_cpu = (None if t is None else t.cpu() for t in (weight, bias, out, mean, var))
    _compare_forward(case, x.cpu(), _on_cpu(norm), *on_cpu, rounding)
    _assert_bits(outputs[..., case.C + case.K :], before[1][..., case.C + case.K :], "channels behind the output")
    _assert_bits(x, before[0][..., : case.C], "the input")
    return _Inputs(draw, x, norm, weight, out, mean, rounding)


def run_case(
    case: Case, dtype: torch.dtype, device: str = "cpu", rounding: torch.dtype | None = None, backend: Any = triton
) -> None:
    """:func:`run_forward`, then the backward primitive with the output as its gradient's value.

    The gradient owes something, or is that of the output's activation.
    """
    draw, x, norm, weight, out, mean, rounding = run_forward(case, dtype, device, rounding, backend)
    gradients, stored_gradients = _buffers(case, draw, dtype)
    stored = stored_gradients[..., case.C : case.C + case.K]
    grad = Gradient(stored, out, mean, 0.1 * draw(2, case.K))
    if case.form.out_slope != 1:
        grad = Gradient(stored, out, negative_slope=case.form.out_slope)
    before = gradients.clone()
    dx = gradients[..., : case.C]
    if not case.accumulate:
        dx.fill_(torch.nan)
    dweight = torch.full_like(weight, torch.nan) if case.weight else None
    dgamma, dbeta = draw.nothing(case.C), draw.nothing(case.C)
    correction = draw(2, case.C) if case.accumulate else draw.nothing(2, case.C)
    old = correction.cpu().double() if case.accumulate else torch.zeros(2, case.C)
    owed = Owed(dgamma, dbeta, correction) if case.form.norm else None
    dbias = draw.nothing(case.K).to(weight.dtype) if case.form.bias else None
    backend.norm_relu_conv_backward(grad, x, norm, weight, dx, case.accumulate, dweight, owed, dbias)
    results = [None if t is None else t.cpu() for t in (dx, dweight, dbias, dgamma, dbeta)]
    results += [correction.cpu(), old]
    dx_before = before[..., : case.C].cpu()
    _compare_backward(case, _on_cpu(grad), x.cpu(), _on_cpu(norm), weight.cpu(), dx_before, *results, rounding)
    _assert_bits(gradients[..., case.C :], before[..., case.C :], "gradients of other channels")


def run_nan(case: Case, dtype: torch.dtype, backend: Any = triton) -> None:
    """One NaN in the input and one in the gradient reach what they reach in autograd, and nothing else."""
    draw = _Draw("cpu", torch.Generator().manual_seed(case.C + case.K))
    norm = Norm(draw(case.C), draw.positive(case.C), draw.positive(case.C), 0.3 * draw(case.C), 1e-3)
    x, stored = draw(*case.pixels, case.C).to(dtype), draw(*case.out_pixels, case.K).to(dtype)
    _keep_clear_of_zero(x, norm)
    x[0, 0, 1, 2, case.C - 2] = torch.nan
    stored[0, 0, 1, 2, 3] = torch.nan
    weight = draw(case.K, case.C, *case.kernel)
    out, dx, dweight = torch.empty_like(stored), torch.empty_like(x), torch.empty_like(weight)
    owed = Owed(draw(case.C), draw(case.C), draw(2, case.C))
    backend.norm_relu_conv(x, norm, weight, out, None, None)
    backend.norm_relu_conv_backward(Gradient(stored), x, norm, weight, dx, False, dweight, owed)
    a = _activation(x, norm)
    da, dw = _convolution_backward(case, _first(stored), _first(a), weight.double())
    dz = da.masked_fill(a <= 0, 0)
    dbeta, dgamma = dz.flatten(0, 3).sum(0), (dz * (x.double() - norm.mean.double())).flatten(0, 3).sum(0)
    expected = {
        "out": (out, _last(_convolve(case, _first(a), weight.double()))),
        "dx": (dx, dz),
        "dweight": (dweight, dw),
        "dgamma": (owed.dweight, dgamma),
        "dbeta": (owed.dbias, dbeta),
        "correction": (owed.correction, torch.stack([dbeta, dgamma])),
    }
    for name, (found, exact) in expected.items():
        assert torch.equal(found.isnan(), exact.isnan()), name
        assert exact.isnan().any(), name


def _on_cpu(operand: Any) -> Any:
    """A Norm, if any, or a Gradient. Not every gradient of torch's own is deterministic on a GPU, which the tests insist on."""
    return operand and type(operand)(*(t.cpu() if isinstance(t, Tensor) else t for t in operand))


def _buffers(case: Case, draw: "_Draw", dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the input and of the output, one and the same unless the output's images are smaller."""
    buffer = draw(*case.pixels, case.C + case.K + 3).to(dtype)
    return buffer, draw(*case.out_pixels, case.C + case.K + 3).to(dtype) if case.pool else buffer


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
    scale, bias = scale_of(norm), norm.bias.double()
    z = (x.double() - norm.mean.double()) * scale + bias
    x.copy_(torch.where(z.abs() < 0.02, (norm.mean + (1 - bias) / scale).to(x.dtype), x))


def _first(x: Tensor) -> Tensor:
    return x.double().movedim(4, 1)


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, 4)


def _activation(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x.double()
    return _leaky((x.double() - norm.mean.double()) * scale_of(norm) + norm.bias.double(), norm.negative_slope)


def _leaky(z: Tensor, slope: float) -> Tensor:
    return torch.where(z > 0, z, slope * z)


def _compare_forward(
    case: Case,
    x: Tensor,
    norm: Norm | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    dtype: torch.dtype,
) -> None:
    a, shift = _activation(x, norm), torch.zeros(case.K) if bias is None else bias
    exact = _leaky(_last(_convolve(case, _first(a), weight.double())) + shift.double(), case.form.out_slope)
    magnitude = _last(_convolve(case, _first(a).abs(), weight.double().abs())) + shift.double().abs()
    assert_entries(out, exact, magnitude, dtype, "output")
    assert_unbiased(out, exact, dtype, "output")
    stored = out.double().reshape(-1, case.K)
    exact_var, exact_mean = torch.var_mean(stored, 0, correction=0)
    assert_entries(mean, exact_mean, stored.abs().mean(0), torch.float32, "mean")
    assert_entries(var, exact_var, exact_var + 1e-6 * stored.square().mean(0), torch.float32, "variance")


def _compare_backward(
    case: Case,
    grad: Gradient,
    x: Tensor,
    norm: Norm | None,
    weight: Tensor,
    dx_before: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dgamma: Tensor,
    dbeta: Tensor,
    correction: Tensor,
    old_correction: Tensor,
    dtype: torch.dtype,
) -> None:
    g, g_size = _load(grad)
    a, scale = _activation(x, norm), torch.ones(case.C) if norm is None else scale_of(norm)
    da, dw = _convolution_backward(case, _first(g), _first(a), weight.double())
    da_size, dw_size = _convolution_backward(case, _first(g_size), _first(a).abs(), weight.double().abs())
    passed = torch.ones_like(a) if norm is None else torch.where(a > 0, 1.0, norm.negative_slope)
    dz, dz_size = passed * da, passed * da_size
    if case.accumulate:
        size = dx_before.double().abs() + dz_size * scale.abs()
        assert_entries(dx, dx_before.double() + dz * scale, size, dtype, "input's gradient")
    else:
        assert_entries(dx, dz * scale, dz_size * scale.abs(), dtype, "input's gradient")
        assert_unbiased(dx, dz * scale, dtype, "input's gradient")
    if dweight is not None:
        assert_entries(dweight, dw, dw_size, dtype, "weight's gradient")
        assert_unbiased(dweight, dw, dtype, "weight's gradient")
    if dbias is not None:
        assert_entries(dbias, g.sum((0, 1, 2, 3)), g_size.sum((0, 1, 2, 3)), dbias.dtype, "bias's gradient")
    if norm is None:
        return
    centred = x.double() - norm.mean.double()
    rstd = (norm.var.double() + norm.eps).rsqrt()
    sums = torch.stack([dz, dz * centred * rstd]).flatten(1, 4).sum(1)
    sizes = torch.stack([dz_size, dz_size * centred.abs() * rstd]).flatten(1, 4).sum(1)
    assert_entries(dbeta, sums[0], sizes[0], dtype, "gradient of the norm's bias")
    assert_entries(dgamma, sums[1], sizes[1], dtype, "gradient of the norm's weight")
    owed = scale / centred[..., 0].numel() * torch.stack([torch.ones_like(rstd), rstd])
    in_float32 = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps * old_correction.abs()
    size = owed.abs() * sizes + in_float32
    assert_entries(correction, old_correction - owed * sums, size, dtype, "correction")


def _load(grad: Gradient) -> tuple[Tensor, Tensor]:
    """The gradient, and the sum of the absolute values of its terms."""
    stored = grad.stored.double()
    if grad.mean is None or grad.value is None or grad.correction is None:
        g = stored if grad.value is None else torch.where(grad.value > 0, 1.0, grad.negative_slope) * stored
        return g, g.abs()
    constant, slope = grad.correction.double()
    owed = slope * (grad.value.double() - grad.mean.double())
    return stored + (owed + constant), stored.abs() + owed.abs() + constant.abs()


def _convolve(case: Case, a: Tensor, weight: Tensor) -> Tensor:
    out = F.conv3d(a, weight, padding=[size // 2 for size in case.kernel])
    return F.avg_pool3d(out, [min(size, 2) for size in out.shape[2:]]) if case.pool else out


def _convolution_backward(case: Case, g: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    a, weight = a.detach().requires_grad_(), weight.detach().requires_grad_()
    da, dw = torch.autograd.grad(_convolve(case, a, weight), (a, weight), g)
    return _last(da), dw


def _assert_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits)), f"{what} changed"
