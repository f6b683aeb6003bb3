"""Kernels of a network's stem: normalisation, ReLU and max pooling, forward and backward, without atomics.

Windows are of 3 with stride 2 and one pixel of padding in the dimensions in which they are more than one pixel (WD, WH,
WW are 3 there, else 1). A pixel lies in at most two windows of a dimension: in backward each looks them up, where it is
their maximum takes their gradients, and is written once.
"""

import triton
import triton.language as tl

from .operands import activate, activate_backward, affine, at, normalise, position

_NONE = tl.constexpr(255)


@triton.jit(do_not_specialize=["pixels", "D", "H", "W"])
def norm_relu_pool(
    x,
    mean,
    var,
    gamma,
    beta,
    out,
    places,
    x_stride,
    out_stride,
    pixels,
    D,
    H,
    W,
    C,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    WD: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maxima over windows of relu(norm(x)) to ``out``, or to ``places`` which of a window's pixels has it.

    Where a window is one pixel its activation, of any slope.

    Of several the first, of NaNs the last, as in torch; 255 where ReLU leaves none above 0. ``pixels`` are windows, D, H and
    W the sizes of ``x``. ``places`` is contiguous, one byte each.
    """
    SD: tl.constexpr = (WD + 1) // 2
    SH: tl.constexpr = (WH + 1) // 2
    SW: tl.constexpr = (WW + 1) // 2
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid, in_c = p < pixels, c < C
    x_mean, x_scale, x_shift = affine(mean, var, gamma, beta, c, in_c, EPS)
    windows_d, windows_h, windows_w = tl.cdiv(D, SD), tl.cdiv(H, SH), tl.cdiv(W, SW)
    depth, height, width = position(p, windows_d, windows_h, windows_w)
    image = p // windows_w // windows_h // windows_d
    largest = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    place = tl.full((BLOCK_P, BLOCK_C), _NONE, tl.int32)
    for row in range(WD * WH):  # not unrolled: all loads at once would not fit the registers
        d, h = depth * SD + (row // WH - WD // 2), height * SH + (row % WH - WH // 2)
        for column in tl.static_range(WW):
            w = width * SW + (column - WW // 2)
            inside = valid & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            source = ((image * D + d) * H + h) * W + w
            values = tl.load(x + at(source, x_stride, c), mask=inside[:, None] & in_c[None, :], other=0.0)
            z = tl.where(inside[:, None], normalise(values, x_mean, x_scale, x_shift), 0.0)
            if WD * WH * WW == 1:
                largest = activate(z, SLOPE)
            elif places is None:
                largest = tl.maximum(largest, z, propagate_nan=tl.PropagateNan.ALL)
            else:
                larger = (z > largest) | (z != z)
                largest = tl.where(larger, z, largest)
                place = tl.where(larger, row * WW + column, place)
    mask = valid[:, None] & in_c[None, :]
    if places is None:
        tl.store(out + at(p, out_stride, c), largest.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(places + at(p, C, c), place.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["pixels", "D", "H", "W", "tiles_per_program"])
def norm_relu_pool_backward(
    grad,
    places,
    x,
    mean,
    var,
    gamma,
    beta,
    dx,
    partials,
    grad_stride,
    x_stride,
    dx_stride,
    pixels,
    D,
    H,
    W,
    C,
    tiles_per_program,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    WD: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``dx = dz`` for the gradient ``grad`` of the maxima that lie at ``places``, or of the activations where that is None.

    A program's sums of dz and dz * (x - mean) over its tiles of pixels of ``x`` go to ``partials``, (programs, 2, C).
    """
    SD: tl.constexpr = (WD + 1) // 2
    SH: tl.constexpr = (WH + 1) // 2
    SW: tl.constexpr = (WW + 1) // 2
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    x_mean, x_scale, x_shift = affine(mean, var, gamma, beta, c, in_c, EPS)
    windows_d, windows_h, windows_w = tl.cdiv(D, SD), tl.cdiv(H, SH), tl.cdiv(W, SW)
    sum_dz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_dz_centered = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = tl.program_id(0) * tiles_per_program * BLOCK_P
    for i in range(0, tiles_per_program):
        p = first + i * BLOCK_P + tl.arange(0, BLOCK_P)
        valid = p < pixels
        mask = valid[:, None] & in_c[None, :]
        values = tl.load(x + at(p, x_stride, c), mask=mask, other=0.0)
        if places is None:
            z = normalise(values, x_mean, x_scale, x_shift)
            g = tl.load(grad + at(p, grad_stride, c), mask=mask, other=0.0).to(tl.float32)
            dz = tl.where(mask, activate_backward(g, z, SLOPE), 0.0)
        else:
            dz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            depth, height, width = position(p, D, H, W)
            image = p // W // H // D
            for step in range(SD * SH):  # of each dimension's windows the earlier, then the later one of odd pixels
                later_d, later_h = step // SH, step % SH
                d, h = (depth + later_d) // SD, (height + later_h) // SH
                row = (depth - d * SD + WD // 2) * WH + height - h * SH + WH // 2
                beside = valid & (depth % 2 >= later_d) & (height % 2 >= later_h) & (d < windows_d) & (h < windows_h)
                for later_w in tl.static_range(SW):
                    w = (width + later_w) // SW
                    there = beside & (width % 2 >= later_w) & (w < windows_w)
                    looks = there[:, None] & in_c[None, :]
                    window = ((image * windows_d + d) * windows_h + h) * windows_w + w
                    t = row * WW + width - w * SW + WW // 2
                    place = tl.load(places + at(window, C, c), mask=looks, other=255).to(tl.int32)
                    g = tl.load(grad + at(window, grad_stride, c), mask=looks, other=0.0).to(tl.float32)
                    dz += tl.where(place == t[:, None], g, 0.0)
        tl.store(dx + at(p, dx_stride, c), (dz * x_scale[None, :]).to(dx.dtype.element_ty), mask=mask)
        sum_dz += dz
        sum_dz_centered += dz * (values.to(tl.float32) - x_mean[None, :])
    share = partials + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(share + c, tl.sum(sum_dz, 0), mask=in_c)
    tl.store(share + C + c, tl.sum(sum_dz_centered, 0), mask=in_c)
