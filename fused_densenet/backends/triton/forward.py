"""The forward kernel: norm-relu-conv as an implicit matrix product, and the moments of what it stores."""

import triton
import triton.language as tl

from .operands import (
    activate,
    affine,
    normalise,
    operand,
    pointers,
    pooled_activation,
    position,
    tile_moments,
    window_start,
)
from .packing import row_length


@triton.jit(do_not_specialize=["pixels", "D", "H", "W"])
def norm_relu_conv(
    x,
    mean,
    var,
    gamma,
    beta,
    weight,
    bias,
    out,
    moments,
    x_stride,
    out_stride,
    pixels,
    D,
    H,
    W,
    C,
    K,
    EPS: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    POOL: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_SLOPE: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[p, k] = sum over taps and c of a[p + tap, c] * weight[k, c, tap]``, the weight packed.

    ``a`` is norm(x) behind an activation of SLOPE for negative numbers; ``bias`` (or None) is added, and an activation of
    OUT_SLOPE, 1 for none, done to what is stored.

    A program computes a tile of BLOCK_P pixels by BLOCK_K channels, and leaves its mean and M2 in ``moments``
    (tiles of pixels, 2, K). Where POOL, the pixels of ``out`` are windows of KD by KH by KW pixels of ``x``, and the
    convolution, of size 1, is of their means of ``a``.
    """
    TAPS: tl.constexpr = 1 if POOL else KD * KH * KW
    dtype = x.dtype.element_ty
    C, K = C // ALIGN * ALIGN, K // ALIGN * ALIGN
    length = row_length(C)
    k_tiles = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // k_tiles
    k = tl.program_id(0) % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = p < pixels
    if POOL:
        first = window_start(p, D, H, W, KD, KH, KW)
    else:
        depth, height, width = position(p, D, H, W)
    acc = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for step in range(0, tl.cdiv(C, BLOCK_C) * TAPS):
        c = step // TAPS * BLOCK_C + tl.arange(0, BLOCK_C)
        in_c = c < C
        x_mean, x_scale, x_shift = affine(mean, var, gamma, beta, c, in_c, EPS)
        if POOL:
            mask = valid[:, None] & in_c[None, :]
            a = pooled_activation(x, x_stride, first, c, mask, x_mean, x_scale, x_shift, H, W, KD, KH, KW, SLOPE, ALIGN)
            w_at = weight
        else:
            tap = step % TAPS
            dd = tap // (KH * KW) - KD // 2
            hh = tap // KW % KH - KH // 2
            ww = tap % KW - KW // 2
            inside = valid
            if TAPS > 1:
                inside = inside & (depth + dd >= 0) & (depth + dd < D) & (height + hh >= 0) & (height + hh < H)
                inside = inside & (width + ww >= 0) & (width + ww < W)
            source = p.to(tl.int64) + ((dd * H + hh) * W + ww)
            values = tl.load(pointers(x, source, x_stride, c, ALIGN), mask=inside[:, None] & in_c[None, :], other=0.0)
            a = activate(normalise(values, x_mean, x_scale, x_shift), SLOPE)
            if TAPS > 1:
                a = tl.where(inside[:, None], a, 0.0)
            w_at = weight + tap * K * length
        w = tl.load(w_at + c[:, None] + (k * length)[None, :], mask=(c < length)[:, None] & in_k[None, :], other=0.0)
        acc = tl.dot(operand(a, dtype, PRECISION), w, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
    stored = activate(acc, OUT_SLOPE).to(out.dtype.element_ty)
    tl.store(pointers(out, p, out_stride, k, ALIGN), stored, mask=valid[:, None] & in_k[None, :])
    if MOMENTS:
        n = tl.minimum(pixels - tile * BLOCK_P, BLOCK_P).to(tl.float32)
        tile_mean, tile_m2 = tile_moments(stored.to(tl.float32), valid, n)
        target = moments + tile.to(tl.int64) * 2 * K
        tl.store(target + k, tile_mean, mask=in_k)
        tl.store(target + K + k, tile_m2, mask=in_k)
