"""How far the CPU's sums are from float64: closer than plain loops over all terms would be."""

import pytest
import torch
from tolerances import rms, tolerance, ulp
from torch import Tensor

from fused_densenet.backends import BACKENDS
from fused_densenet.backends.contract import Gradient, Norm, Owed

CPU = BACKENDS["cpu"]
TERMS = 4096


def positive(*shape: int) -> Tensor:
    """The same numbers in every run, between 0.5 and 1.5: a sum of their products grows from the first to the last."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(*shape, generator=generator) + 0.5


def identity(channels: int) -> Norm:
    return Norm(torch.zeros(channels), torch.ones(channels), torch.ones(channels), torch.zeros(channels), 0.0)


def assert_accurate(found: Tensor, exact: Tensor, name: str) -> None:
    error = rms((found.double() - exact) / exact) / ulp(torch.float32)
    assert error <= tolerance(name), f"{error:.3g} ulp"


@pytest.mark.parametrize("kernel", [1, 3])
def test_sums_over_channels(kernel: int) -> None:
    """Few pixels: no Winograd, whose transforms round as well."""
    x, weight = positive(1, 1, 4, 8, TERMS // kernel**2), positive(24, TERMS // kernel**2, 1, kernel, kernel)
    out = torch.empty(1, 1, 4, 8, 24)
    CPU.norm_relu_conv(x, identity(x.shape[-1]), weight, out, None, None)
    image = x[:, 0].permute(0, 3, 1, 2).double()
    exact = torch.nn.functional.conv2d(image, weight[:, :, 0].double(), padding=kernel // 2)
    assert_accurate(out[:, 0].permute(0, 3, 1, 2), exact, "sum of 4096")


def test_sums_of_gradients() -> None:
    """The data gradient's over channels, the weight gradient's and the norm's over pixels."""
    for pixels, channels, out_channels in ((48, 24, TERMS), (TERMS, 24, 40)):
        x, weight = positive(1, 1, 1, pixels, channels), positive(out_channels, channels, 1, 1, 1)
        grad = positive(1, 1, 1, pixels, out_channels)
        dx, dweight, dnorm = torch.empty_like(x), torch.empty_like(weight), torch.empty(2, channels)
        owed = Owed(dnorm[0], dnorm[1], torch.zeros(2, channels))
        CPU.norm_relu_conv_backward(Gradient(grad), x, identity(channels), weight, dx, False, dweight, owed)
        a, g, w = x.double().reshape(pixels, -1), grad.double().reshape(pixels, -1), weight.double().flatten(1)
        assert_accurate(dx.reshape(pixels, -1), g @ w, "sum of 4096")
        assert_accurate(dweight.flatten(1), g.T @ a, "sum of 4096")
        assert_accurate(dnorm[0], (g @ w * a).sum(0), "sum of 4096")
        assert_accurate(dnorm[1], (g @ w).sum(0), "sum of 4096")


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("step", [0.0, 30.0, 3000.0])
def test_moments_of_a_step(kernel: int, step: float) -> None:
    """An image whose first rows are not like the others: what deviations are taken from at first is not the mean."""
    x = positive(1, 1, 28, 28, 16) * 4
    x[:, :, 2:] += step
    weight = torch.zeros(16, 16, 1, kernel, kernel)
    weight[range(16), range(16), 0, kernel // 2, kernel // 2] = 1
    out, mean, var = torch.empty_like(x), torch.empty(16), torch.empty(16)
    CPU.norm_relu_conv(x, identity(16), weight, out, mean, var)
    exact_var, exact_mean = torch.var_mean(out.double(), (0, 1, 2, 3), correction=0)
    assert_accurate(mean, exact_mean, "moments")
    assert_accurate(var, exact_var, "moments")
    CPU.place(x, None, mean, var)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 1, 2, 3), correction=0)
    assert_accurate(mean, exact_mean, "moments")
    assert_accurate(var, exact_var, "moments")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_channel_of_one_value_has_no_variance(kernel: int, dtype: torch.dtype) -> None:
    """The one value is what is stored, of fewer bits than the sum that made it."""
    x, weight = torch.ones(4, 1, 20, 20, 32, dtype=dtype), torch.zeros(48, 32, 1, kernel, kernel)
    weight[:, :, 0, kernel // 2, kernel // 2] = positive(48, 32)
    out, mean, var = torch.empty(4, 1, 20, 20, 48, dtype=dtype), torch.empty(48), torch.empty(48)
    CPU.norm_relu_conv(x, identity(32), weight, out, mean, var)
    assert torch.equal(mean, out[0, 0, 0, 0].float())
    assert not var.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [128, 136])
def test_large_outputs(dtype: torch.dtype, channels: int) -> None:
    """What is more than caches keep is stored past them, an image alone is not; the last of 136 channels never are."""
    images = 32 // dtype.itemsize
    x = positive(images, 1, 28, 28, 16).to(dtype)
    weight, norm = positive(channels, 16, 1, 1, 1), identity(16)
    if dtype == torch.float64:
        weight, norm = weight.double(), Norm(*(None if t is None else t.double() for t in norm[:4]), 0.0)
    out, alone = torch.empty(2, images, 1, 28, 28, channels, dtype=dtype)
    mean, var = torch.empty(2, channels, dtype=norm.mean.dtype)
    CPU.norm_relu_conv(x, norm, weight, out, mean, var)
    for image in range(images):
        CPU.norm_relu_conv(x[image : image + 1], norm, weight, alone[image : image + 1], None, None)
    assert torch.equal(out, alone)
    exact_var, exact_mean = torch.var_mean(out.double(), (0, 1, 2, 3), correction=0)
    assert_accurate(mean, exact_mean, "moments")
    assert_accurate(var, exact_var, "moments")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_larger_tiles_of_16_bits(dtype: torch.dtype) -> None:
    """3x3 convolutions of 16-bit data take filtering of larger tiles, less exact in float32: their results are those that
    16 bits can hold, all the same."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 1, 28, 28, c, generator=generator).to(dtype) for c in (128, 32))
    weight = (torch.randn(32, 128, 1, 3, 3, generator=generator) / 34).to(dtype)
    out, dx, dweight, sums = torch.empty_like(grad), torch.empty_like(x), torch.empty(weight.shape), torch.zeros(4, 128)
    CPU.norm_relu_conv(x, identity(128), weight.float(), out, None, None)
    owed = Owed(sums[0], sums[1], sums[2:])
    CPU.norm_relu_conv_backward(Gradient(grad), x, identity(128), weight.float(), dx, False, dweight, owed)
    a = x.double().relu().requires_grad_()
    w = weight.double().requires_grad_()
    exact = torch.nn.functional.conv3d(a.permute(0, 4, 1, 2, 3), w, padding=(0, 1, 1)).permute(0, 2, 3, 4, 1)
    exact_da, exact_dweight = torch.autograd.grad(exact, [a, w], grad.double())
    for found, of in ((out, exact), (dx, exact_da * (x > 0))):
        assert (found != of.to(dtype)).double().mean() <= tolerance("16-bit outputs rounded otherwise")
    error = rms(dweight.double() - exact_dweight) / rms(exact_dweight)
    assert error <= tolerance("weight gradient of 16-bit data")
