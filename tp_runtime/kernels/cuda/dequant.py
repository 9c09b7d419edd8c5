"""A packed weight back to bf16, tile by tile: what a linear of many rows multiplies with.

A prefill of hundreds of rows is bound by arithmetic, so it goes through cuBLAS on bf16 weights. They are
made a slice of rows at a time, so that no second copy of the model is held. A slice is beyond the L2: one
that fits leaves the product fewer tiles than there are processors, which costs more than the memory traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemv import BF16, INT4, halves, nibbles_to_bf16


@triton.jit
def dequantize_kernel(
    w_ptr, scale_ptr, offset_ptr, out_ptr, N, K, w_stride, scale_stride,
    KIND: tl.constexpr, G: tl.constexpr, ASYMMETRIC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """out[:, tile] = scale * w (+ offset) for BN rows and one tile of columns: BK, or a pair of groups."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n[:, None] < N
    if KIND == INT4:
        k = tl.arange(0, G)
        pair = tl.program_id(1)
        packed = tl.load(
            w_ptr + n[:, None].to(tl.int64) * w_stride + pair * G + k[None, :], mask=inside, other=0
        )
        ZERO: tl.constexpr = 0 if ASYMMETRIC else 8
        at = pair * scale_stride + n
        scale_low, scale_high = halves(tl.load(scale_ptr + at, mask=n < N, other=0))
        if ASYMMETRIC:
            offset_low, offset_high = halves(tl.load(offset_ptr + at, mask=n < N, other=0))
        for half in tl.static_range(2):
            column = (2 * pair + half) * G + k
            values = nibbles_to_bf16(packed, half == 1, ZERO, ASM).to(tl.float32)
            values *= (scale_high if half == 1 else scale_low)[:, None]
            if ASYMMETRIC:
                values += (offset_high if half == 1 else offset_low)[:, None]
            where = out_ptr + n[:, None].to(tl.int64) * K + column[None, :]
            tl.store(where, values.to(tl.bfloat16), mask=inside & (column[None, :] < K))
    else:
        column = tl.program_id(1) * BK + tl.arange(0, BK)
        mask = inside & (column[None, :] < K)
        w = tl.load(w_ptr + n[:, None].to(tl.int64) * w_stride + column[None, :], mask=mask, other=0.0)
        values = w.to(tl.float32)
        if KIND != BF16:
            values *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        where = out_ptr + n[:, None].to(tl.int64) * K + column[None, :]
        tl.store(where, values.to(tl.bfloat16), mask=mask)
