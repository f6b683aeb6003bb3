"""Backward kernels: data gradient, weight gradient, both sums, and the partial sums added in a fixed order."""

import triton
import triton.language as tl

from .operands import at, gradient, normalise, position


@triton.jit
def _store_dz(dz, x, mean, scale, dx, sums, C, c, mask, ACCUMULATE: tl.constexpr):
    """``dx = dz`` or ``dx += scale * dz``, and the tile's sums of dz and dz * (x - mean) in a row of ``sums``."""
    stored = dz
    if ACCUMULATE:
        stored = tl.load(dx, mask=mask, other=0.0).to(tl.float32) + scale[None, :] * dz
    tl.store(dx, stored.to(dx.dtype.element_ty), mask=mask)
    tl.store(sums + c, tl.sum(dz, 0), mask=c < C)
    tl.store(sums + C + c, tl.sum(dz * (x.to(tl.float32) - mean[None, :]), 0), mask=c < C)


@triton.jit(do_not_specialize=["pixels", "D", "H", "W", "tiles_per_program"])
def backward_pointwise(
    stored,
    stored_stride,
    value,
    value_stride,
    g_scale,
    g_slope,
    g_mean,
    g_offset,
    x,
    x_stride,
    mean,
    scale,
    shift,
    weight,
    weight_k,
    weight_c,
    dx,
    dx_stride,
    weight_partials,
    sum_partials,
    pixels,
    D,
    H,
    W,
    C,
    K,
    tiles_per_program,
    PRECISION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The whole backward of a 1x1 convolution with at most BLOCK_K outputs, from one reading of ``x``.

    A program owns BLOCK_C channels of ``x`` in ``tiles_per_program`` tiles of pixels; its weight gradient goes to
    ``weight_partials`` (programs, K, C), the sums of each tile to ``sum_partials`` (tiles, 2, C).
    """
    dtype = x.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    k = tl.arange(0, BLOCK_K)
    in_k = k < K
    program = tl.program_id(1)
    first_tile = program * tiles_per_program
    tiles = tl.minimum(tiles_per_program, tl.cdiv(pixels, BLOCK_P) - first_tile)
    row = tl.arange(0, BLOCK_P)
    w = tl.load(
        weight + (k * weight_k)[:, None] + (c * weight_c)[None, :], mask=in_k[:, None] & in_c[None, :], other=0.0
    ).to(dtype)
    x_mean = tl.load(mean + c, mask=in_c, other=0.0)
    x_scale = tl.load(scale + c, mask=in_c, other=0.0)
    x_shift = tl.load(shift + c, mask=in_c, other=0.0)
    dw = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for i in range(0, tiles):
        start = (first_tile + i) * BLOCK_P
        p = start + row
        valid = p < pixels
        g_mask = valid[:, None] & in_k[None, :]
        g = gradient(
            tl.load(stored + at(p, stored_stride, k), mask=g_mask, other=0.0),
            tl.load(value + at(p, value_stride, k), mask=g_mask, other=0.0),
            tl.load(g_scale + k, mask=in_k, other=0.0),
            tl.load(g_slope + k, mask=in_k, other=0.0),
            tl.load(g_mean + k, mask=in_k, other=0.0),
            tl.load(g_offset + k, mask=in_k, other=0.0),
        )
        g = tl.where(valid[:, None], g, 0.0).to(dtype)
        mask = valid[:, None] & in_c[None, :]
        tile = tl.load(x + at(p, x_stride, c), mask=mask, other=0.0)
        z = normalise(tile, x_mean, x_scale, x_shift)
        da = tl.dot(g, w, input_precision=PRECISION)
        dz = tl.where(z > 0, da, 0.0)
        if WEIGHT:
            dw = tl.dot(tl.trans(g), tl.maximum(z, 0.0).to(dtype), dw, input_precision=PRECISION)
        target = dx + at(p, dx_stride, c)
        sums = sum_partials + (first_tile + i).to(tl.int64) * 2 * C
        _store_dz(dz, tile, x_mean, x_scale, target, sums, C, c, mask, ACCUMULATE)
    if WEIGHT:
        tl.store(
            weight_partials + program.to(tl.int64) * K * C + (k * C)[:, None] + c[None, :],
            dw,
            mask=in_k[:, None] & in_c[None, :],
        )


@triton.jit(do_not_specialize=["pixels", "D", "H", "W"])
def backward_data(
    stored,
    stored_stride,
    value,
    value_stride,
    g_scale,
    g_slope,
    g_mean,
    g_offset,
    x,
    x_stride,
    mean,
    scale,
    shift,
    weight,
    weight_k,
    weight_c,
    weight_d,
    weight_h,
    weight_w,
    dx,
    dx_stride,
    sum_partials,
    pixels,
    D,
    H,
    W,
    C,
    K,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dz[p, c] = (relu' at x[p, c]) * sum over taps and k of g[p - tap, k] * weight[k, c, tap]``, and its sums.

    A program computes a tile of BLOCK_P pixels by BLOCK_C channels; its sums go to ``sum_partials`` (tiles, 2, C).
    """
    TAPS: tl.constexpr = KD * KH * KW
    dtype = x.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    row = tl.program_id(1)
    p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = p < pixels
    depth, height, width = position(p, D, H, W)
    da = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K) * TAPS):
        tap = step % TAPS
        dd = tap // (KH * KW) - KD // 2
        hh = tap // KW % KH - KH // 2
        ww = tap % KW - KW // 2
        inside = valid
        if TAPS > 1:
            inside = inside & (depth - dd >= 0) & (depth - dd < D) & (height - hh >= 0) & (height - hh < H)
            inside = inside & (width - ww >= 0) & (width - ww < W)
        k = step // TAPS * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = k < K
        g_mask = inside[:, None] & in_k[None, :]
        source = p.to(tl.int64) - ((dd * H + hh) * W + ww)
        g = gradient(
            tl.load(stored + at(source, stored_stride, k), mask=g_mask, other=0.0),
            tl.load(value + at(source, value_stride, k), mask=g_mask, other=0.0),
            tl.load(g_scale + k, mask=in_k, other=0.0),
            tl.load(g_slope + k, mask=in_k, other=0.0),
            tl.load(g_mean + k, mask=in_k, other=0.0),
            tl.load(g_offset + k, mask=in_k, other=0.0),
        )
        g = tl.where(inside[:, None], g, 0.0).to(dtype)
        tap_offset = (dd + KD // 2) * weight_d + (hh + KH // 2) * weight_h + (ww + KW // 2) * weight_w
        w = tl.load(
            weight + tap_offset + (k * weight_k)[:, None] + (c * weight_c)[None, :],
            mask=in_k[:, None] & in_c[None, :],
            other=0.0,
        )
        da = tl.dot(g, w.to(dtype), da, input_precision=PRECISION)
    mask = valid[:, None] & in_c[None, :]
    tile = tl.load(x + at(p, x_stride, c), mask=mask, other=0.0)
    x_mean = tl.load(mean + c, mask=in_c, other=0.0)
    x_scale = tl.load(scale + c, mask=in_c, other=0.0)
    z = normalise(tile, x_mean, x_scale, tl.load(shift + c, mask=in_c, other=0.0))
    dz = tl.where(mask & (z > 0), da, 0.0)
    sums = sum_partials + row.to(tl.int64) * 2 * C
    _store_dz(dz, tile, x_mean, x_scale, dx + at(p, dx_stride, c), sums, C, c, mask, ACCUMULATE)


@triton.jit(do_not_specialize=["pixels", "D", "H", "W", "tiles_per_program"])
def backward_weight(
    stored,
    stored_stride,
    value,
    value_stride,
    g_scale,
    g_slope,
    g_mean,
    g_offset,
    x,
    x_stride,
    mean,
    scale,
    shift,
    weight_partials,
    pixels,
    D,
    H,
    W,
    C,
    K,
    tiles_per_program,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dweight[k, c, tap] = sum over p of g[p - tap, k] * relu(norm(x[p, c]))``.

    Taps and k together are the rows of the product, ``tap * K + k``, so that one reading of ``x`` serves as many taps
    as fit BLOCK_K. A program's share of the pixels goes to ``weight_partials`` (programs, taps * K, C).
    """
    TAPS: tl.constexpr = KD * KH * KW
    dtype = x.dtype.element_ty
    n = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n = n < TAPS * K
    tap = n // K
    k = n % K
    dd = tap // (KH * KW) - KD // 2
    hh = tap // KW % KH - KH // 2
    ww = tap % KW - KW // 2
    tap_pixels = ((dd * H + hh) * W + ww).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    program = tl.program_id(2)
    first_tile = program * tiles_per_program
    tiles = tl.minimum(tiles_per_program, tl.cdiv(pixels, BLOCK_P) - first_tile)
    row = tl.arange(0, BLOCK_P)
    dw = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for i in range(0, tiles):
        start = (first_tile + i) * BLOCK_P
        p = start + row
        valid = p < pixels
        g_mask = valid[:, None] & in_n[None, :]
        if TAPS > 1:
            depth, height, width = position(p, D, H, W)
            depth = depth[:, None] - dd[None, :]
            height = height[:, None] - hh[None, :]
            width = width[:, None] - ww[None, :]
            g_mask = g_mask & (depth >= 0) & (depth < D) & (height >= 0) & (height < H) & (width >= 0) & (width < W)
        g = gradient(
            tl.load(stored + at(p, stored_stride, k - tap_pixels * stored_stride), mask=g_mask, other=0.0),
            tl.load(value + at(p, value_stride, k - tap_pixels * value_stride), mask=g_mask, other=0.0),
            tl.load(g_scale + k, mask=in_n, other=0.0),
            tl.load(g_slope + k, mask=in_n, other=0.0),
            tl.load(g_mean + k, mask=in_n, other=0.0),
            tl.load(g_offset + k, mask=in_n, other=0.0),
        )
        g = tl.where(g_mask, g, 0.0).to(dtype)
        tile = tl.load(x + at(p, x_stride, c), mask=valid[:, None] & in_c[None, :], other=0.0)
        a = normalise(
            tile,
            tl.load(mean + c, mask=in_c, other=0.0),
            tl.load(scale + c, mask=in_c, other=0.0),
            tl.load(shift + c, mask=in_c, other=0.0),
        )
        dw = tl.dot(tl.trans(g), tl.maximum(a, 0.0).to(dtype), dw, input_precision=PRECISION)
    tl.store(
        weight_partials + (program.to(tl.int64) * TAPS * K) * C + n[:, None].to(tl.int64) * C + c[None, :],
        dw,
        mask=in_n[:, None] & in_c[None, :],
    )


@triton.jit(do_not_specialize=["weight_values", "weight_splits", "sum_rows"])
def add_partials(
    weight_partials,
    sum_partials,
    weight_values,
    weight_splits,
    sum_rows,
    dweight,
    weight_k,
    weight_c,
    weight_d,
    weight_h,
    weight_w,
    sum_dz,
    sum_dz_centered,
    C,
    K,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the shares of all programs in a fixed order: the first programs the weight gradient, the last the sums."""
    weight_programs = tl.cdiv(weight_values, BLOCK)
    program = tl.program_id(0)
    if program < weight_programs:
        i = program * BLOCK + tl.arange(0, BLOCK)
        valid = i < weight_values
        lane = tl.arange(0, BLOCK_S)
        acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
        for s in range(0, weight_splits, BLOCK_S):
            split = (s + lane).to(tl.int64) * weight_values
            mask = (s + lane < weight_splits)[:, None] & valid[None, :]
            acc += tl.load(weight_partials + split[:, None] + i[None, :], mask=mask, other=0.0)
        row = i // C
        tap = row // K
        offset = row % K * weight_k + i % C * weight_c
        offset += tap // (KH * KW) * weight_d + tap // KW % KH * weight_h + tap % KW * weight_w
        tl.store(dweight + offset, tl.sum(acc, 0).to(dweight.dtype.element_ty), mask=valid)
    else:
        j = (program - weight_programs) * BLOCK_C + tl.arange(0, BLOCK_C)
        tile = tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for r in range(0, sum_rows, BLOCK_R):
            first = (r + tile).to(tl.int64) * 2 * C
            mask = (r + tile < sum_rows)[:, None] & (j < 2 * C)[None, :]
            total += tl.load(sum_partials + first[:, None] + j[None, :], mask=mask, other=0.0)
        column = tl.sum(total, 0)
        tl.store(sum_dz + j, column, mask=j < C)
        tl.store(sum_dz_centered + j - C, column, mask=(j >= C) & (j < 2 * C))
