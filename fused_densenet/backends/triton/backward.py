"""Backward kernels: data gradient, weight gradient and both sums."""

import triton
import triton.language as tl

from .operands import (
    activate,
    activate_backward,
    affine,
    gradient,
    normalise,
    operand,
    pointers,
    pooled_activation,
    position,
    product,
    window_start,
    window_step,
)
from .packing import row_length


@triton.jit
def _store_dz(
    da,
    before,
    x,
    x_stride,
    dx,
    dx_stride,
    sums,
    first,
    c,
    mask,
    mean,
    scale,
    shift,
    C,
    H,
    W,
    PD: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    SLOPE: tl.constexpr,
    SUMS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The activation's backward, ``dx = dz`` or ``dx += scale * dz``, and where SUMS the tile's sums of dz and dz * (x - mean).

    Over all pixels of the windows that begin at ``first``, each with its share of ``da``. ``before`` is what ``dx`` holds of
    the first of them where that was loaded before the product, not to wait for it here, or None. Returns the windows' means of
    the activation.
    """
    share = 1.0 / (PD * PH * PW)
    for t in tl.static_range(PD * PH * PW):
        source = first + window_step(t, H, W, PH, PW)
        tile = tl.load(pointers(x, source, x_stride, c, ALIGN), mask=mask, other=0.0)
        z = normalise(tile, mean, scale, shift)
        dz = tl.where(mask, activate_backward(da * share, z, SLOPE), 0.0)
        target = pointers(dx, source, dx_stride, c, ALIGN)
        stored = scale[None, :] * dz
        if ACCUMULATE:
            if t > 0 or before is None:
                before = tl.load(target, mask=mask, other=0.0)
            stored = before.to(tl.float32) + stored
        tl.store(target, stored.to(dx.dtype.element_ty), mask=mask)
        centred = product(dz, tile.to(tl.float32) - mean[None, :])
        if t == 0:
            a, sum_dz, sum_dz_centered = activate(z, SLOPE), tl.sum(dz, 0), tl.sum(centred, 0)
        else:
            a += activate(z, SLOPE)
            sum_dz += tl.sum(dz, 0)
            sum_dz_centered += tl.sum(centred, 0)
    if SUMS:
        tl.store(sums + c, sum_dz, mask=c < C)
        tl.store(sums + C + c, sum_dz_centered, mask=c < C)
    return a * share


@triton.jit(do_not_specialize=["pixels", "D", "H", "W", "tiles_per_program"])
def backward_pointwise(
    stored,
    value,
    g_scale,
    g_slope,
    g_mean,
    g_offset,
    x,
    mean,
    var,
    gamma,
    beta,
    weight,
    dx,
    partials,
    stored_stride,
    value_stride,
    x_stride,
    dx_stride,
    weights_at,
    pixels,
    D,
    H,
    W,
    C,
    K,
    tiles_per_program,
    EPS: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    VALUE_SLOPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The whole backward of a 1x1 convolution with at most BLOCK_K outputs, from one reading of ``x``.

    A program owns BLOCK_C channels of ``x`` in ``tiles_per_program`` tiles of pixels. The sums of each tile go to the
    front of ``partials``, (tiles, 2, C), the weight gradient of each program to ``weights_at`` in it, (programs, K, C).
    A pixel of the gradient stands for a window of KD by KH by KW pixels of ``x``, single pixels if nothing is pooled.
    """
    dtype = x.dtype.element_ty
    C, K = C // ALIGN * ALIGN, K // ALIGN * ALIGN
    length = row_length(C)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    k = tl.arange(0, BLOCK_K)
    in_k = k < K
    program = tl.program_id(1)
    first_tile = program * tiles_per_program
    tiles = tl.minimum(tiles_per_program, tl.cdiv(pixels, BLOCK_P) - first_tile)
    row = tl.arange(0, BLOCK_P)
    w = tl.load(weight + (k * length)[:, None] + c[None, :], mask=in_k[:, None] & (c < length)[None, :], other=0.0)
    x_mean, x_scale, x_shift = affine(mean, var, gamma, beta, c, in_c, EPS)
    dw = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for i in range(0, tiles):
        start = (first_tile + i) * BLOCK_P
        p = start + row
        valid = p < pixels
        g_mask = valid[:, None] & in_k[None, :]
        g = gradient(
            tl.load(pointers(stored, p, stored_stride, k, ALIGN), mask=g_mask, other=0.0),
            tl.load(pointers(value, p, value_stride, k, ALIGN), mask=g_mask, other=0.0),
            tl.load(g_scale + k, mask=in_k, other=0.0),
            tl.load(g_slope + k, mask=in_k, other=0.0),
            tl.load(g_mean + k, mask=in_k, other=0.0),
            tl.load(g_offset + k, mask=in_k, other=0.0),
            VALUE_SLOPE,
        )
        g = operand(tl.where(valid[:, None], g, 0.0), dtype, PRECISION)
        source = window_start(p, D, H, W, KD, KH, KW)
        mask = valid[:, None] & in_c[None, :]
        before = None
        if ACCUMULATE:
            before = tl.load(pointers(dx, source, dx_stride, c, ALIGN), mask=mask, other=0.0)
        da = tl.dot(g, w, input_precision=PRECISION)
        a = _store_dz(
            da,
            before,
            x,
            x_stride,
            dx,
            dx_stride,
            partials + (first_tile + i).to(tl.int64) * 2 * C,
            source,
            c,
            mask,
            x_mean,
            x_scale,
            x_shift,
            C,
            H,
            W,
            KD,
            KH,
            KW,
            SLOPE,
            mean is not None,
            ACCUMULATE,
            ALIGN,
        )
        if WEIGHT:
            dw = tl.dot(tl.trans(g), operand(a, dtype, PRECISION), dw, input_precision=PRECISION)
    if WEIGHT:
        target = partials + weights_at + program.to(tl.int64) * K * C
        tl.store(target + (k * C)[:, None] + c[None, :], dw, mask=in_k[:, None] & in_c[None, :])


@triton.jit(do_not_specialize=["pixels", "D", "H", "W"])
def backward_data(
    stored,
    value,
    g_scale,
    g_slope,
    g_mean,
    g_offset,
    x,
    mean,
    var,
    gamma,
    beta,
    weight,
    dx,
    partials,
    stored_stride,
    value_stride,
    x_stride,
    dx_stride,
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
    VALUE_SLOPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dz[p, c] = (the activation's derivative at x[p, c]) * sum over taps and k of g[p - tap, k] * weight[k, c, tap]``, and its sums.

    A program computes a tile of BLOCK_P pixels by BLOCK_C channels; its sums go to ``partials`` (tiles, 2, C). Where POOL,
    as in ``backward_pointwise``.
    """
    TAPS: tl.constexpr = 1 if POOL else KD * KH * KW
    dtype = x.dtype.element_ty
    C, K = C // ALIGN * ALIGN, K // ALIGN * ALIGN
    length = row_length(C)
    c_tiles = tl.cdiv(C, BLOCK_C)
    row = tl.program_id(0) // c_tiles
    c = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = p < pixels
    if TAPS > 1:
        depth, height, width = position(p, D, H, W)
    da = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K) * TAPS):
        tap = step % TAPS
        inside = valid
        source = p.to(tl.int64)
        if TAPS > 1:
            dd = tap // (KH * KW) - KD // 2
            hh = tap // KW % KH - KH // 2
            ww = tap % KW - KW // 2
            source -= (dd * H + hh) * W + ww
            inside = inside & (depth - dd >= 0) & (depth - dd < D) & (height - hh >= 0) & (height - hh < H)
            inside = inside & (width - ww >= 0) & (width - ww < W)
        k = step // TAPS * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = k < K
        g_mask = inside[:, None] & in_k[None, :]
        g = gradient(
            tl.load(pointers(stored, source, stored_stride, k, ALIGN), mask=g_mask, other=0.0),
            tl.load(pointers(value, source, value_stride, k, ALIGN), mask=g_mask, other=0.0),
            tl.load(g_scale + k, mask=in_k, other=0.0),
            tl.load(g_slope + k, mask=in_k, other=0.0),
            tl.load(g_mean + k, mask=in_k, other=0.0),
            tl.load(g_offset + k, mask=in_k, other=0.0),
            VALUE_SLOPE,
        )
        g = operand(tl.where(inside[:, None], g, 0.0), dtype, PRECISION)
        w = tl.load(
            weight + ((tap * K + k) * length)[:, None] + c[None, :],
            mask=in_k[:, None] & (c < length)[None, :],
            other=0.0,
        )
        da = tl.dot(g, w, da, input_precision=PRECISION)
    x_mean, x_scale, x_shift = affine(mean, var, gamma, beta, c, in_c, EPS)
    _store_dz(
        da,
        None,
        x,
        x_stride,
        dx,
        dx_stride,
        partials + row.to(tl.int64) * 2 * C,
        window_start(p, D, H, W, KD, KH, KW) if POOL else p.to(tl.int64),
        c,
        valid[:, None] & in_c[None, :],
        x_mean,
        x_scale,
        x_shift,
        C,
        H,
        W,
        KD if POOL else 1,
        KH if POOL else 1,
        KW if POOL else 1,
        SLOPE,
        mean is not None,
        ACCUMULATE,
        ALIGN,
    )


@triton.jit(do_not_specialize=["pixels", "D", "H", "W", "tiles_per_program"])
def backward_weight(
    stored,
    value,
    g_scale,
    g_slope,
    g_mean,
    g_offset,
    x,
    mean,
    var,
    gamma,
    beta,
    partials,
    stored_stride,
    value_stride,
    x_stride,
    weights_at,
    pixels,
    D,
    H,
    W,
    C,
    K,
    tiles_per_program,
    EPS: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    POOL: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    VALUE_SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dweight[k, c, tap] = sum over p of g[p - tap, k] * a[p, c]``, ``a`` the activation.

    Taps and k together are the rows of the product, ``tap * K + k``, so that one reading of ``x`` serves as many taps
    as fit BLOCK_K. A program's share of the pixels goes to ``weights_at`` in ``partials``, (programs, taps * K, C). Where
    POOL, as in ``backward_pointwise``.
    """
    TAPS: tl.constexpr = 1 if POOL else KD * KH * KW
    dtype = x.dtype.element_ty
    C, K = C // ALIGN * ALIGN, K // ALIGN * ALIGN
    n = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n = n < TAPS * K
    tap = n // K
    k = n % K
    tap_pixels = tap.to(tl.int64)
    if TAPS > 1:
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
    x_mean, x_scale, x_shift = affine(mean, var, gamma, beta, c, in_c, EPS)
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
            tl.load(pointers(stored, p, stored_stride, k - tap_pixels * stored_stride, ALIGN), mask=g_mask, other=0.0),
            tl.load(pointers(value, p, value_stride, k - tap_pixels * value_stride, ALIGN), mask=g_mask, other=0.0),
            tl.load(g_scale + k, mask=in_n, other=0.0),
            tl.load(g_slope + k, mask=in_n, other=0.0),
            tl.load(g_mean + k, mask=in_n, other=0.0),
            tl.load(g_offset + k, mask=in_n, other=0.0),
            VALUE_SLOPE,
        )
        g = operand(tl.where(g_mask, g, 0.0), dtype, PRECISION)
        a = pooled_activation(
            x,
            x_stride,
            window_start(p, D, H, W, KD, KH, KW) if POOL else p.to(tl.int64),
            c,
            valid[:, None] & in_c[None, :],
            x_mean,
            x_scale,
            x_shift,
            H,
            W,
            KD if POOL else 1,
            KH if POOL else 1,
            KW if POOL else 1,
            SLOPE,
            ALIGN,
        )
        dw = tl.dot(tl.trans(g), operand(a, dtype, PRECISION), dw, input_precision=PRECISION)
    target = partials + weights_at + program.to(tl.int64) * TAPS * K * C
    tl.store(target + n[:, None].to(tl.int64) * C + c[None, :], dw, mask=in_n[:, None] & in_c[None, :])
