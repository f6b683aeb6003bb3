"""What the kernels share: addresses, the normalised activation, the gradient as it is loaded, moments of a tile."""

import triton
import triton.language as tl


@triton.jit
def rstd_of(var, channels, mask, EPS: tl.constexpr):
    """``1 / sqrt(var + eps)`` of channels."""
    return tl.rsqrt(tl.load(var + channels, mask=mask, other=1.0) + EPS)


@triton.jit
def affine(mean, var, gamma, beta, channels, mask, EPS: tl.constexpr):
    """A norm's mean, scale and shift, float32, of channels; zero where there are none. The identity without a norm."""
    if mean is None:
        centre = tl.zeros_like(channels).to(tl.float32)
        scale, shift = centre + 1.0, centre
    else:
        scale = tl.load(gamma + channels, mask=mask, other=0.0).to(tl.float32) * rstd_of(var, channels, mask, EPS)
        shift = tl.load(beta + channels, mask=mask, other=0.0).to(tl.float32)
        centre = tl.load(mean + channels, mask=mask, other=0.0)
    return centre, scale, shift


@triton.jit
def normalise(x, mean, scale, shift):
    """The activation's input. Forward and backward use this very expression, so that they agree on its sign."""
    return (x.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def relu(z):
    """NaN stays, as in torch; without the option it would become 0 on a GPU."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(z, SLOPE: tl.constexpr):
    """The activation of slope SLOPE for negative inputs: of 0 ReLU, of 1 none."""
    if SLOPE == 0:
        a = relu(z)
    elif SLOPE == 1:
        a = z
    else:
        a = tl.where(z > 0, z, SLOPE * z)
    return a


@triton.jit
def activate_backward(gradient, of, SLOPE: tl.constexpr):
    """Its backward, by its input or its output; where that is NaN as in torch."""
    if SLOPE == 0:
        result = tl.where(of <= 0, 0.0, gradient)
    elif SLOPE == 1:
        result = gradient
    else:
        result = gradient * tl.where(of > 0, 1.0, SLOPE)
    return result


@triton.jit
def operand(values, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Values as a matrix product takes them: of the data's dtype, or rounded to TF32 where hardware would cut bits off."""
    if PRECISION == "tf32":
        bits = (values.to(tl.float32).to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        result = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)  # a NaN's may overflow
    else:
        result = values.to(dtype)
    return result


@triton.jit
def gradient(stored, value, scale, slope, mean, offset, VALUE_SLOPE: tl.constexpr):
    """``contract.Gradient`` of a tile of pixels by channels; VALUE_SLOPE is its ``negative_slope``."""
    if VALUE_SLOPE == 1:
        centred = value.to(tl.float32) - mean[None, :]
        g = scale[None, :] * stored.to(tl.float32) + (slope[None, :] * centred + offset[None, :])
    else:
        g = activate_backward(stored.to(tl.float32), value.to(tl.float32), VALUE_SLOPE)
    return g


@triton.jit
def at(pixels, stride, channels):
    """Offsets of a tile of pixels by channels, 64-bit.

    Computed from the pixel itself: offsets within a tile would be the same in every iteration of the caller's loop, be
    hoisted out of it, and take registers from the matrix product.
    """
    return (pixels.to(tl.int64) * stride)[:, None] + channels[None, :]


@triton.jit
def pointers(base, pixels, stride, channels, ALIGN: tl.constexpr):
    """Addresses of a tile of pixels by channels, of which a thread may take ALIGN channels at once.

    ALIGN divides ``base``, ``stride`` and the number of channels, which triton knows by itself only of multiples of 16.
    """
    size: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(base + at(pixels, stride, channels), [1, ALIGN * size])


@triton.jit
def position(pixels, D, H, W):
    """Depth, row and column of pixels counted through (N, D, H, W)."""
    rows = pixels // W
    return rows // H % D, rows % H, pixels % W


@triton.jit
def window_start(pixels, D, H, W, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """The first pixel of (N, D, H, W) in the window of PD by PH by PW pixels that each pooled pixel stands for."""
    first = pixels.to(tl.int64)
    if PD * PH * PW > 1:
        width, height, depth = W // PW, H // PH, D // PD
        rows = pixels // width
        slices = rows // height
        slice = slices // depth * D + slices % depth * PD
        first = (slice * H + rows % height * PH).to(tl.int64) * W + pixels % width * PW
    return first


@triton.jit
def window_step(t, H, W, PH: tl.constexpr, PW: tl.constexpr):
    """From a window's first pixel to its ``t``-th."""
    return (t // (PH * PW) * H + t // PW % PH) * W + t % PW


@triton.jit
def pooled_activation(
    x,
    x_stride,
    first,
    c,
    mask,
    mean,
    scale,
    shift,
    H,
    W,
    PD: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    SLOPE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Means of the activation over windows that begin at ``first``."""
    values = tl.load(pointers(x, first, x_stride, c, ALIGN), mask=mask, other=0.0)
    a = activate(normalise(values, mean, scale, shift), SLOPE)
    for t in tl.static_range(1, PD * PH * PW):
        source = first + window_step(t, H, W, PH, PW)
        values = tl.load(pointers(x, source, x_stride, c, ALIGN), mask=mask, other=0.0)
        a += activate(normalise(values, mean, scale, shift), SLOPE)
    return a * (1.0 / (PD * PH * PW))


@triton.jit
def tile_moments(values, valid, n):
    """Mean and M2 per column over the ``n`` valid rows: two passes, no difference of large squares."""
    mean = tl.sum(tl.where(valid[:, None], values, 0.0), 0) / n
    centred = tl.where(valid[:, None], values - mean[None, :], 0.0)
    return mean, tl.sum(product(centred, centred), 0)


@triton.jit
def product(a, b):
    """``a * b``, rounded before it is added to anything: fused into the sum of two threads, it would be another in each."""
    return tl.fma(a, b, 0.0)
