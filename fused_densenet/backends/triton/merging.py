"""Kernels that put together what programs left in a workspace, in a fixed order."""

import triton
import triton.language as tl

from .operands import rstd_of


@triton.jit(do_not_specialize=["rows", "rows_per_image", "row_pixels", "image_pixels"])
def merge_moments(
    moments,
    mean,
    var,
    rows,
    rows_per_image,
    row_pixels,
    image_pixels,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The mean and biased variance per channel from ``moments`` (rows, 2, K), the means and M2 of disjoint pixels.

    A row holds ``row_pixels`` pixels of an image, the last row of an image what is left.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    lane = tl.arange(0, BLOCK_R)
    total = (rows // rows_per_image).to(tl.float32) * image_pixels
    origin = tl.load(moments + k, mask=in_k, other=0.0)
    shift = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for i in range(0, rows, BLOCK_R):
        row = i + lane
        mask = (row < rows)[:, None] & in_k[None, :]
        n = tl.minimum(image_pixels - row % rows_per_image * row_pixels, row_pixels).to(tl.float32)
        row_mean = tl.load(moments + (row * 2 * K)[:, None] + k[None, :], mask=mask, other=0.0)
        shift += tl.where(mask, n[:, None] * (row_mean - origin[None, :]), 0.0)
    centre = origin + tl.sum(shift, 0) / total
    m2 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for i in range(0, rows, BLOCK_R):
        row = i + lane
        mask = (row < rows)[:, None] & in_k[None, :]
        n = tl.minimum(image_pixels - row % rows_per_image * row_pixels, row_pixels).to(tl.float32)
        row_mean = tl.load(moments + (row * 2 * K)[:, None] + k[None, :], mask=mask, other=0.0)
        row_m2 = tl.load(moments + (row * 2 * K)[:, None] + (K + k)[None, :], mask=mask, other=0.0)
        delta = row_mean - centre[None, :]
        m2 += tl.where(mask, row_m2 + n[:, None] * delta * delta, 0.0)
    tl.store(mean + k, centre, mask=in_k)
    tl.store(var + k, tl.sum(m2, 0) / total, mask=in_k)


@triton.jit(do_not_specialize=["weight_values", "weight_splits", "sum_rows", "count", "correction_stride"])
def add_partials(
    partials,
    dweight,
    var,
    gamma,
    dgamma,
    dbeta,
    correction,
    norm_pixels,
    weights_at,
    weight_values,
    weight_splits,
    sum_rows,
    weight_k,
    weight_c,
    weight_d,
    weight_h,
    weight_w,
    count,
    correction_stride,
    C,
    K,
    KH: tl.constexpr,
    KW: tl.constexpr,
    EPS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the shares of all programs in a fixed order: the first programs the weight gradient, the last the sums.

    Sum j is of dz of channel j, or of dz * (x - mean) of channel j - C; what they are to the norm (contract.Owed) is what
    is stored. Without a norm there are none.
    """
    weight_programs = tl.cdiv(weight_values, BLOCK)
    program = tl.program_id(0)
    if dweight is not None and program < weight_programs:
        i = program * BLOCK + tl.arange(0, BLOCK)
        valid = i < weight_values
        lane = tl.arange(0, BLOCK_S)
        acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
        for s in range(0, weight_splits, BLOCK_S):
            split = (s + lane).to(tl.int64) * weight_values
            mask = (s + lane < weight_splits)[:, None] & valid[None, :]
            acc += tl.load(partials + weights_at + split[:, None] + i[None, :], mask=mask, other=0.0)
        row = i // C
        tap = row // K
        offset = row % K * weight_k + i % C * weight_c
        offset += tap // (KH * KW) * weight_d + tap // KW % KH * weight_h + tap % KW * weight_w
        tl.store(dweight + offset, tl.sum(acc, 0).to(dweight.dtype.element_ty), mask=valid)
    if var is not None and program >= weight_programs:
        j = (program - weight_programs) * BLOCK_C + tl.arange(0, BLOCK_C)
        tile = tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for r in range(0, sum_rows, BLOCK_R):
            first = (r + tile).to(tl.int64) * 2 * C
            mask = (r + tile < sum_rows)[:, None] & (j < 2 * C)[None, :]
            total += tl.load(partials + first[:, None] + j[None, :], mask=mask, other=0.0)
        sums = tl.sum(total, 0)
        centred, c = j >= C, j % C
        exists = j < 2 * C
        rstd = rstd_of(var, c, exists, EPS)
        scaled = tl.where(centred, sums * rstd, sums)
        tl.store(dbeta + c, scaled.to(dbeta.dtype.element_ty), mask=exists & (j < C))
        tl.store(dgamma + c, scaled.to(dgamma.dtype.element_ty), mask=exists & centred)
        if correction is not None:
            values = count.to(tl.float32)
            if norm_pixels is not None:
                values = tl.load(norm_pixels)
            scale = tl.load(gamma + c, mask=exists, other=0.0).to(tl.float32) * rstd
            owed = -scale / values * tl.where(centred, scaled * rstd, scaled)
            target = correction + tl.where(centred, correction_stride + c, c)
            if ACCUMULATE:
                owed += tl.load(target, mask=exists, other=0.0)
            tl.store(target, owed, mask=exists)
