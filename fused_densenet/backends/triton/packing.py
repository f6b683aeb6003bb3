"""Weights as the products load them: in the data's dtype, one matrix for each tap, rows that start at multiples of 16."""

import triton
import triton.language as tl

from .operands import operand


@triton.jit
def row_length(C):
    """Of a packed weight's rows, which zeros fill up."""
    return tl.cdiv(C, 16) * 16


@triton.jit
def pack(
    weight,
    packed,
    weight_k,
    weight_c,
    weight_d,
    weight_h,
    weight_w,
    C,
    K,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``packed[tap, k, c] = weight[k, c, tap]``."""
    length = row_length(C)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = i % length
    row = i // length
    tap = row // K
    source = row % K * weight_k + c * weight_c
    source += tap // (KH * KW) * weight_d + tap // KW % KH * weight_h + tap % KW * weight_w
    inside = i < KD * KH * KW * K * length
    values = tl.load(weight + source, mask=inside & (c < C), other=0.0)
    tl.store(packed + i, operand(values, packed.dtype.element_ty, PRECISION), mask=inside)
