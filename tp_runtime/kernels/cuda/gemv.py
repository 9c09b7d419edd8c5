"""Linears of 1 to 16 rows at memory speed: y = x W^T with W in bf16, fp8, int8 or int4.

Decoding reads every weight once a token, so such a linear takes bytes / bandwidth and everything else has
to hide behind the loads. Tiles of W stream through shared memory (cp.async, several stages deep) into
tensor-core fragments; they are widened to bf16 in registers (exactly: 8 bits of mantissa hold every int8
and every e4m3) and multiplied with eight rows of x at once, in fp32. So 8 rows cost what one costs, and the
arithmetic per weight is two or three instructions of the six (int8) or three (int4) there is time for. 16
rows are twice eight: for a product of 16 Triton takes Hopper's asynchronous one, which weights widened in
registers wait for at every tile (1.9 times as long).

K is split over programs where N alone gives too few to fill the GPU: each split writes its partial sums,
[splits, rows, N] in fp32, and whoever reads them adds them up in order. No atomics: the result does not
depend on timing.

RMSNorm rides along: with x' = x * norm_weight the norm is a factor a row, known from sums of squares that
the kernel before left (`sums`, see collectives/push.py), and is applied to the result.

Gate and up go through one tile, half of whose rows are of each: one after the other, a program's turns would
be twice as many, and where there are few programs these turns bound it.

int4 is stored in planes (pack.py): one byte holds a column of one group low and of the next group high, so
that a tile unpacks into two tiles of one scale a row each. Group scales multiply the fp32 sums of a group,
never a weight: nothing is rounded that the format does not round.

A linear starts while the kernel before it still runs (dependent_launch.py): it asks the L2 for its first
weights, then waits for its x.

Legend: R rows of x (BR of a program, 8 or 16), N outputs, K inputs, G columns of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...dependent_launch import prefetch_l2, start_next, wait_for_previous

BF16, FP8, INT8, INT4 = (tl.constexpr(kind) for kind in range(4))


def _nibble_code(high: bool, zero: int) -> tl.constexpr:
    """PTX that turns four bytes into four bf16: a nibble n in the mantissa of 0x4300 is 128 + n.

    Two permutes, two subtractions and a mask for four numbers; converting integers takes twelve.
    """
    shift = "shr.b32 v, $2, 4;" if high else "mov.b32 v, $2;"
    return tl.constexpr(
        "{ .reg .b32 v, t, u, c, z; mov.b32 c, 0x43; mov.b32 z, " + hex(0x43004300 + zero * 0x10001) + "; "
        + shift + " and.b32 v, v, 0x0f0f0f0f; prmt.b32 t, v, c, 0x4140; prmt.b32 u, v, c, 0x4342; "
        "sub.rn.bf16x2 $0, t, z; sub.rn.bf16x2 $1, u, z; }"
    )  # fmt: skip


_LOW_0, _HIGH_0 = _nibble_code(False, 0), _nibble_code(True, 0)
_LOW_8, _HIGH_8 = _nibble_code(False, 8), _nibble_code(True, 8)


@triton.jit
def nibbles_to_bf16(packed, HIGH: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr):
    """uint8 -> bf16 of its low or high nibble minus ZERO (0 or 8), exactly.

    ASM: through PTX (which Triton's interpreter cannot run).
    """
    if ASM:
        code: tl.constexpr = (
            (_HIGH_8 if ZERO == 8 else _HIGH_0) if HIGH else (_LOW_8 if ZERO == 8 else _LOW_0)
        )
        return tl.inline_asm_elementwise(code, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        nibble = (packed >> 4) if HIGH else (packed & 15)
        return (nibble.to(tl.float32) - ZERO).to(tl.bfloat16)


# Four e4m3 to four bf16: exponent and mantissa move into place (bits 10 to 4, below the sign), which makes
# the number 2^120 times too small, also where it is subnormal; one multiplication puts that right. Two of
# them move to the right, by one shift; two to the left, by two, which are multiplications: other units.
_E4M3 = tl.constexpr(
    "{ .reg .b32 t, u, s, z, c; mov.b32 z, 0; mov.b32 c, 0x7b807b80; "
    "prmt.b32 t, $2, z, 0x1404; prmt.b32 u, $2, z, 0x4342; "
    "and.b32 s, t, 0x80008000; shr.b32 t, t, 4; and.b32 t, t, 0x07f007f0; or.b32 t, t, s; "
    "shl.b32 s, u, 8; shl.b32 u, u, 4; and.b32 s, s, 0x80008000; and.b32 u, u, 0x07f007f0; or.b32 u, u, s; "
    "mul.rn.bf16x2 $0, t, c; mul.rn.bf16x2 $1, u, c; }"
)


@triton.jit
def _widen(w, KIND: tl.constexpr, ASM: tl.constexpr):
    """A tile of weights as bf16, without its scale. fp8 comes as bytes."""
    if KIND == BF16:
        return w
    elif KIND == FP8:
        if ASM:
            return tl.inline_asm_elementwise(_E4M3, "=&r,=&r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            return w.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(tl.bfloat16)
    elif ASM:
        return w.to(tl.bfloat16)
    else:
        return w.to(tl.float32).to(tl.bfloat16)  # the interpreter has no conversion from int8


@triton.jit
def _accumulate(
    acc,
    more,
    w_ptrs,
    x_ptrs,
    first,
    steps,
    R,
    K,
    r,
    k,
    KIND: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    TWICE: tl.constexpr,
    ASM: tl.constexpr,
):
    """The sums over columns first*BK .. (first+steps)*BK of plainly stored weights.

    Two of [BN, 8], acc and more plus what rows 0 to 7 and, where TWICE, rows 8 to 15 of x give.
    """
    w_ptrs += first * BK
    x_ptrs += first * BK
    for i in tl.range(0, steps, num_stages=STAGES):
        if EVEN_K:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=k[None, :] < K - (first + i) * BK, other=0.0)
        wide = _widen(w, KIND, ASM)
        left = K - (first + i) * BK
        acc = tl.dot(wide, _load_x(x_ptrs, R, r, k, left, EVEN_K), acc)
        if TWICE:
            more = tl.dot(wide, _load_x(x_ptrs + 8 * K, R, r + 8, k, left, EVEN_K), more)
        w_ptrs += BK
        x_ptrs += BK
    return acc, more


@triton.jit
def _load_x(x_ptrs, R, r, k, left, EVEN_K: tl.constexpr):
    """A tile of x, zero beyond R rows and, unless EVEN_K, `left` columns."""
    if EVEN_K:
        return tl.load(x_ptrs, mask=r[None, :] < R, other=0.0)
    else:
        return tl.load(x_ptrs, mask=(r[None, :] < R) & (k[:, None] < left), other=0.0)


@triton.jit
def halves(words):
    """The two fp16 in each 32-bit word, low one first, in fp32."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _accumulate_int4(
    acc,
    more,
    w_ptrs,
    x_ptrs,
    scale_ptrs,
    offset_ptrs,
    first,
    steps,
    R,
    N,
    K,
    r,
    k,
    G: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    TWICE: tl.constexpr,
    ASM: tl.constexpr,
):
    """As _accumulate, over pairs of groups first .. first+steps of weights in planes."""
    w_ptrs += first * G
    x_ptrs += first * (2 * G)
    scale_ptrs += first * N
    offset_ptrs += first * N
    ZERO: tl.constexpr = 0 if ASYMMETRIC else 8
    for i in tl.range(0, steps, num_stages=STAGES):
        w = tl.load(w_ptrs)
        left = K - (first + i) * (2 * G)
        scales = halves(tl.load(scale_ptrs))
        low = nibbles_to_bf16(w, False, ZERO, ASM)
        high = nibbles_to_bf16(w, True, ZERO, ASM)
        offsets = scales
        if ASYMMETRIC:
            offsets = halves(tl.load(offset_ptrs))
            offset_ptrs += N
        acc = _add_pair(acc, low, high, x_ptrs, R, r, k, left, scales, offsets, G, ASYMMETRIC, EVEN_K)
        if TWICE:
            more = _add_pair(
                more, low, high, x_ptrs + 8 * K, R, r + 8, k, left, scales, offsets, G, ASYMMETRIC, EVEN_K
            )  # fmt: skip
        w_ptrs += G
        x_ptrs += 2 * G
        scale_ptrs += N
    return acc, more


@triton.jit
def _add_pair(
    acc, low, high, x_ptrs, R, r, k, left, scales, offsets,
    G: tl.constexpr, ASYMMETRIC: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """acc [BN, 8] plus what a pair of groups gives for eight rows of x."""
    x_low = _load_x(x_ptrs, R, r, k, left, EVEN_K)
    x_high = _load_x(x_ptrs + G, R, r, k, left - G, EVEN_K)
    acc += tl.dot(low, x_low) * scales[0][:, None]
    acc += tl.dot(high, x_high) * scales[1][:, None]
    if ASYMMETRIC:
        acc += offsets[0][:, None] * tl.sum(x_low.to(tl.float32), axis=0)[None, :]
        acc += offsets[1][:, None] * tl.sum(x_high.to(tl.float32), axis=0)[None, :]
    return acc


@triton.jit
def gemv_kernel(
    x_ptr, w_ptr, scale_ptr, offset_ptr, sums_ptr, y_ptr, R, N, K, w_stride, eps,
    KIND: tl.constexpr, G: tl.constexpr, ASYMMETRIC: tl.constexpr, GATED: tl.constexpr,
    NUM_SUMS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    STAGES: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of BN rows of W over one split of K; see the module. GATED: half of them of the gate.

    x [R, K] bf16. N: outputs (of W's N rows, or where GATED of its gate half; the up half follows). y:
    [SPLITS, R, N], or with one split [R, N] in its own dtype. AHEAD: lines of 128 bytes, of each row, that
    are asked for before the kernel waits for x. EARLY: the next kernel may start at once.
    """
    OUTPUTS: tl.constexpr = BN // 2 if GATED else BN
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    r = tl.arange(0, BR)
    place = tl.arange(0, BN)
    row = tl.program_id(0) * OUTPUTS + place % OUTPUTS
    if not EVEN_N:
        row = tl.minimum(row, N - 1)
    row += place // OUTPUTS * N
    W_ROWS = 2 * N if GATED else N
    STEP: tl.constexpr = 2 * G if KIND == INT4 else BK
    k = tl.arange(0, G if KIND == INT4 else BK)
    total = tl.cdiv(K, STEP)
    first = total * split // splits
    steps = total * (split + 1) // splits - first
    w_ptrs = w_ptr + row[:, None].to(tl.int64) * w_stride + k[None, :]
    eight = tl.arange(0, 8)
    x_ptrs = x_ptr + eight[None, :] * K + k[:, None]
    if PDL:
        if EARLY:
            start_next()
        if AHEAD > 0:
            offset = first * (G if KIND == INT4 else BK)
            line = tl.arange(0, AHEAD) * (128 // w_ptr.dtype.element_ty.primitive_bitwidth * 8)
            line = tl.minimum(line, w_stride - 1 - offset)
            prefetch_l2(w_ptr + row[:, None].to(tl.int64) * w_stride + offset + line[None, :])
        wait_for_previous()
    # What is needed after the loop is asked for before it.
    if (KIND == INT8) | (KIND == FP8):
        scale = tl.load(scale_ptr + row)
    if NUM_SUMS > 0:
        part = tl.arange(0, NUM_SUMS)
        squares = tl.load(sums_ptr + r[:, None] * NUM_SUMS + part[None, :], mask=r[:, None] < R, other=1.0)
    acc = tl.zeros([BN, 8], tl.float32)
    more = tl.zeros([BN, 8], tl.float32)
    if KIND == INT4:
        acc, more = _accumulate_int4(
            acc, more, w_ptrs, x_ptrs, scale_ptr + row, offset_ptr + row, first, steps, R, W_ROWS, K, eight,
            k, G, ASYMMETRIC, STAGES, EVEN_K, BR == 16, ASM,
        )  # fmt: skip
    else:
        acc, more = _accumulate(
            acc, more, w_ptrs, x_ptrs, first, steps, R, K, eight, k, KIND, BK, STAGES, EVEN_K, BR == 16, ASM
        )  # fmt: skip
    if BR == 16:
        acc = tl.reshape(tl.permute(tl.join(acc, more), (0, 2, 1)), [BN, 16])
    if (KIND == INT8) | (KIND == FP8):
        acc *= scale[:, None]
    if NUM_SUMS > 0:  # 1 / rms of each row
        rms = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
        acc *= rms[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [2, OUTPUTS, BR]), (1, 2, 0)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
    if PDL and not EARLY:
        start_next()
    y_ptrs = y_ptr + (split * R + r[None, :]) * N + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(r[None, :] < R) & (n[:, None] < N))
