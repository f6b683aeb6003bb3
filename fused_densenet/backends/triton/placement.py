"""Kernels that bring a block's input into its buffer, and the gradient of it out."""

import triton
import triton.language as tl

from .operands import at, gradient, tile_moments


@triton.jit(do_not_specialize=["image_pixels", "tiles_per_image"])
def place(
    x,
    out,
    moments,
    x_image,
    x_pixel,
    x_channel,
    out_stride,
    image_pixels,
    C,
    tiles_per_image,
    MOMENTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out = x`` for pixels of ``x`` at one stride within an image; moments as ``norm_relu_conv`` leaves them.

    Without ``out`` the moments alone.
    """
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    image = (tile // tiles_per_image).to(tl.int64)
    start = tile % tiles_per_image * BLOCK_P
    p = start + tl.arange(0, BLOCK_P)
    valid = p < image_pixels
    mask = valid[:, None] & in_c[None, :]
    values = tl.load(x + image * x_image + at(p, x_pixel, c.to(tl.int64) * x_channel), mask=mask, other=0.0)
    if out is not None:
        values = values.to(out.dtype.element_ty)
        tl.store(out + at(image * image_pixels + p, out_stride, c), values, mask=mask)
    if MOMENTS:
        n = tl.minimum(image_pixels - start, BLOCK_P).to(tl.float32)
        tile_mean, tile_m2 = tile_moments(values.to(tl.float32), valid, n)
        row = moments + tile.to(tl.int64) * 2 * C
        tl.store(row + c, tile_mean, mask=in_c)
        tl.store(row + C + c, tile_m2, mask=in_c)


@triton.jit(do_not_specialize=["image_pixels", "tiles_per_image"])
def place_backward(
    stored,
    value,
    scale,
    slope,
    mean,
    offset,
    out,
    stored_stride,
    value_stride,
    out_image,
    out_pixel,
    out_channel,
    image_pixels,
    C,
    tiles_per_image,
    VALUE_SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out = g``, the loaded gradient, for pixels of ``out`` at one stride within an image."""
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    image = (tile // tiles_per_image).to(tl.int64)
    p = tile % tiles_per_image * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (p < image_pixels)[:, None] & in_c[None, :]
    source = image * image_pixels + p
    g = gradient(
        tl.load(stored + at(source, stored_stride, c), mask=mask, other=0.0),
        tl.load(value + at(source, value_stride, c), mask=mask, other=0.0),
        tl.load(scale + c, mask=in_c, other=0.0),
        tl.load(slope + c, mask=in_c, other=0.0),
        tl.load(mean + c, mask=in_c, other=0.0),
        tl.load(offset + c, mask=in_c, other=0.0),
        VALUE_SLOPE,
    )
    target = out + image * out_image + at(p, out_pixel, c.to(tl.int64) * out_channel)
    tl.store(target, g.to(out.dtype.element_ty), mask=mask)
