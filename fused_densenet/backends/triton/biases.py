"""The gradient of a convolution's bias: the sum of a gradient over the pixels, in a fixed order."""

import triton
import triton.language as tl

from .operands import gradient, pointers


@triton.jit(do_not_specialize=["pixels", "tiles_per_program"])
def sum_gradient(
    stored,
    value,
    g_scale,
    g_slope,
    g_mean,
    g_offset,
    partials,
    stored_stride,
    value_stride,
    pixels,
    K,
    tiles_per_program,
    VALUE_SLOPE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Each program's share of the pixels, in ``partials`` (programs, K)."""
    K = K // ALIGN * ALIGN
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    program = tl.program_id(0)
    scale = tl.load(g_scale + k, mask=in_k, other=0.0)
    slope = tl.load(g_slope + k, mask=in_k, other=0.0)
    mean = tl.load(g_mean + k, mask=in_k, other=0.0)
    offset = tl.load(g_offset + k, mask=in_k, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for i in range(0, tiles_per_program):
        p = (program * tiles_per_program + i) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < pixels)[:, None] & in_k[None, :]
        values = tl.load(pointers(value, p, value_stride, k, ALIGN), mask=mask, other=0.0)
        g = tl.load(pointers(stored, p, stored_stride, k, ALIGN), mask=mask, other=0.0)
        total += tl.where(mask, gradient(g, values, scale, slope, mean, offset, VALUE_SLOPE), 0.0)
    tl.store(partials + program.to(tl.int64) * K + k, tl.sum(total, 0), mask=in_k)


@triton.jit(do_not_specialize=["programs"])
def add_biases(partials, dbias, programs, K, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """``dbias``, the sum of what :func:`sum_gradient` left."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    row = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for r in range(0, programs, BLOCK_R):
        mask = (r + row < programs)[:, None] & in_k[None, :]
        total += tl.load(partials + (r + row)[:, None] * K + k[None, :], mask=mask, other=0.0)
    tl.store(dbias + k, tl.sum(total, 0).to(dbias.dtype.element_ty), mask=in_k)
