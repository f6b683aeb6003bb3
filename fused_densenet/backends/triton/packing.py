"""Weights as the products load them: in the data's dtype, one matrix for each tap, rows that start at multiples of 16."""

import triton
import triton.language as tl

from .operands import operand


@triton.jit
def row_length(C):
    """Of a packed weight's rows, which zeros fill up."""
    return tl.cdiv(C, 16) * 16


@triton.jit
def pack(weights, table, packed, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """``packed[tap, k, c] = weight[k, c, tap]`` of each weight, a row of programs for one.

    ``table`` is (weights, 12): where a weight begins in ``weights`` and in ``packed``, K, C, strides, kernel sizes.
    """
    own = table + tl.program_id(1) * 12
    K, C = tl.load(own + 2), tl.load(own + 3)
    KD, KH, KW = tl.load(own + 9), tl.load(own + 10), tl.load(own + 11)
    length = row_length(C)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = i % length
    row = i // length
    tap = row // K
    source = tl.load(own) + row % K * tl.load(own + 4) + c * tl.load(own + 5)
    source += tap // (KH * KW) * tl.load(own + 6) + tap // KW % KH * tl.load(own + 7) + tap % KW * tl.load(own + 8)
    inside = i < KD * KH * KW * K * length
    values = tl.load(weights + source, mask=inside & (c < C), other=0.0)
    tl.store(packed + tl.load(own + 1) + i, operand(values, packed.dtype.element_ty, PRECISION), mask=inside)
