"""Sums over the GPUs of one host by pushing: data and flag in one 64-bit store into the peer's memory.

A small all-reduce is bound by latency: NCCL takes 16 us for 16 KB inside a CUDA graph, of which the wires
need a twentieth. Here every program stores its 32-bit words, each beside a 32-bit flag, into all peers'
buffers at once, and then reads its own buffer until the flags it waits for have come: one hop, no barrier,
no fence, because a 64-bit store is seen whole or not at all.

Every reduction has a number (the epoch); it is the flag, and its lowest bit chooses one of two buffers. Two
are enough: a rank that writes reduction e + 1 has finished e, so all peers have begun e, so they have
finished reading e - 1, whose buffer e + 1 takes. All ranks run the same reductions in the same order.

Values travel as they are and are added in fp32 in the order of the ranks: the same bits on every rank. A
rank that waits longer than its limit sets `status` and goes on, as do all later reductions at once: the
host finds the flag and ends the job. Nothing ever spins for ever.

The epilogue of `reduce_norm_kernel` is what follows a reduction in a decoder layer: the residual sum, and
what RMSNorm needs: x * weight, rounded to bf16, and sums of squares, one a program.

Legend: T tokens, H hidden size, S splits, W ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dependent_launch import start_next, wait_for_previous

_PUSH = tl.constexpr(
    "{ .reg .b64 t; mov.b64 t, {$2, $3}; st.relaxed.sys.global.b64 [$1], t; mov.b32 $0, 0; }"
)
# $0: the word, $1: 1 where the limit passed. The clock is read every 1,024 polls only.
_POLL = tl.constexpr(
    """{
    .reg .pred p; .reg .b64 t; .reg .b32 flag, n, low; .reg .u64 now, end;
    mov.u32 n, 0; mov.u64 end, 0; mov.b32 $1, 0;
    POLL:
    ld.relaxed.sys.global.b64 t, [$2];
    mov.b64 {$0, flag}, t;
    setp.eq.s32 p, flag, $3;
    @p bra DONE;
    add.u32 n, n, 1;
    and.b32 low, n, 1023;
    setp.ne.u32 p, low, 0;
    @p bra POLL;
    mov.u64 now, %globaltimer;
    setp.ne.u64 p, end, 0;
    @p bra CHECK;
    add.u64 end, now, $4;
    CHECK:
    setp.lt.u64 p, now, end;
    @p bra POLL;
    mov.b32 $1, 1;
    DONE:
    }"""
)


@triton.jit
def _push(address, word, flag):
    """Store {word, flag} at each address, of another GPU's memory."""
    tl.inline_asm_elementwise(_PUSH, "=r,l,r,r", [address, word, flag], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _poll(address, flag, limit_ns):
    """The words at the addresses once their flags have come; and 1 where they did not within the limit."""
    return tl.inline_asm_elementwise(
        _POLL, "=&r,=&r,l,r,l", [address, flag, limit_ns], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
    )


@triton.jit
def _send(buffers_ptr, words, at, flag, slot, RANK: tl.constexpr, WORLD: tl.constexpr, WORDS: tl.constexpr):
    """Push words to place `at` of this rank's part of every peer's buffer."""
    for step in tl.static_range(1, WORLD):
        base = tl.load(buffers_ptr + (RANK + step) % WORLD)
        _push(base + ((slot * WORLD + RANK) * WORDS + at).to(tl.int64) * 8, words, flag)


@triton.jit
def _receive(buffers_ptr, peer, at, flag, slot, limit_ns, RANK: tl.constexpr, WORLD: tl.constexpr,
             WORDS: tl.constexpr):  # fmt: skip
    """What `peer` pushed to place `at`, and whether it failed to come."""
    base = tl.load(buffers_ptr + RANK)
    return _poll(base + ((slot * WORLD + peer) * WORDS + at).to(tl.int64) * 8, flag, limit_ns)


@triton.jit
def _limit(status_ptr, limit_ns):
    """The time to wait: none once a reduction has failed."""
    return tl.where(tl.load(status_ptr) != 0, 0, limit_ns)


@triton.jit
def _sum_fp32(value, buffers_ptr, epoch_ptr, status_ptr, op, limit_ns, at, RANK: tl.constexpr,
              WORLD: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """The sum over ranks of an fp32 vector, each element at its own place of the buffers."""
    epoch = tl.load(epoch_ptr) + op + 1
    slot = epoch & 1
    flag = tl.zeros_like(at) + epoch
    _send(buffers_ptr, value.to(tl.int32, bitcast=True), at, flag, slot, RANK, WORLD, WORDS)
    wait_ns = tl.zeros_like(at).to(tl.int64) + _limit(status_ptr, limit_ns)
    total = tl.zeros_like(value)
    failed = tl.zeros_like(at)
    for peer in tl.static_range(WORLD):
        if peer == RANK:
            total += value
        else:
            word, late = _receive(buffers_ptr, peer, at, flag, slot, wait_ns, RANK, WORLD, WORDS)
            total += word.to(tl.float32, bitcast=True)
            failed |= late
    if tl.max(failed, axis=0) != 0:
        tl.store(status_ptr, 1)
    return total


@triton.jit
def reduce_norm_kernel(
    part_ptr, bias_ptr, residual_ptr, weight_ptr, x_ptr, sums_ptr, buffers_ptr, epoch_ptr, status_ptr, op,
    limit_ns, T,
    H: tl.constexpr, BC: tl.constexpr, SPLITS: tl.constexpr, FIRST: tl.constexpr, HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr, WORLD: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """residual (+)= sum over splits and ranks of part; x = residual * weight; sums of squares.

    part: fp32 [SPLITS, T, H]. residual: fp32 [T, H], FIRST: only written. x: bf16 [T, H]. sums: fp32
    [T, programs].
    """
    token, piece = tl.program_id(0), tl.program_id(1)
    column = piece * BC + tl.arange(0, BC)
    inside = column < H
    place = token * H + column
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        wait_for_previous()
        start_next()  # not before: a linear would start while the one ahead of this sum runs
    value = tl.zeros([BC], tl.float32)
    for split in tl.static_range(SPLITS):
        value += tl.load(part_ptr + (split * T + token) * H + column, mask=inside, other=0.0)
    rest = tl.zeros([BC], tl.float32)
    if not FIRST:
        rest += tl.load(residual_ptr + place, mask=inside, other=0.0)
    if HAS_BIAS:
        rest += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    at = token * (tl.num_programs(1) * BC) + column
    if WORLD > 1:
        value = _sum_fp32(value, buffers_ptr, epoch_ptr, status_ptr, op, limit_ns, at, RANK, WORLD, WORDS)
    value += rest
    tl.store(residual_ptr + place, value, mask=inside)
    tl.store(x_ptr + place, (value * weight).to(x_ptr.dtype.element_ty), mask=inside)
    squares = tl.where(inside, value * value, 0.0)
    tl.store(sums_ptr + token * tl.num_programs(1) + piece, tl.sum(squares, axis=0))


@triton.jit
def all_reduce_kernel(
    x_ptr, y_ptr, buffers_ptr, epoch_ptr, status_ptr, op, limit_ns, count,
    IS_BF16: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, WORDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = the sum over ranks of x, `count` words of 32 bits: fp32, or two bf16 each, summed in fp32."""
    if PDL:
        start_next()
        wait_for_previous()
    at = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = at < count
    word = tl.load(x_ptr + at, mask=inside, other=0)
    if not IS_BF16:
        total = _sum_fp32(
            word.to(tl.float32, bitcast=True), buffers_ptr, epoch_ptr, status_ptr, op, limit_ns, at, RANK,
            WORLD, WORDS,
        )  # fmt: skip
        tl.store(y_ptr + at, total.to(tl.int32, bitcast=True), mask=inside)
    else:
        epoch = tl.load(epoch_ptr) + op + 1
        slot = epoch & 1
        flag = tl.zeros_like(at) + epoch
        _send(buffers_ptr, word, at, flag, slot, RANK, WORLD, WORDS)
        wait_ns = tl.zeros_like(at).to(tl.int64) + _limit(status_ptr, limit_ns)
        low = tl.zeros([BC], tl.float32)
        high = tl.zeros([BC], tl.float32)
        failed = tl.zeros_like(at)
        for peer in tl.static_range(WORLD):
            if peer == RANK:
                its = word
            else:
                its, late = _receive(buffers_ptr, peer, at, flag, slot, wait_ns, RANK, WORLD, WORDS)
                failed |= late
            # A bf16 is the upper half of an fp32.
            low += (its << 16).to(tl.float32, bitcast=True)
            high += (its & -65536).to(tl.float32, bitcast=True)
        if tl.max(failed, axis=0) != 0:
            tl.store(status_ptr, 1)
        low_bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high_bits = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(y_ptr + at, low_bits | high_bits, mask=inside)


@triton.jit
def choose_kernel(
    value_ptr, index_ptr, token_ptr, ring_ptr, step_ptr, ring_stride, candidates, buffers_ptr, epoch_ptr,
    status_ptr, op, limit_ns,
    BC: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The likeliest token of each row over all ranks, the lowest id among equals, the same on every rank.

    value, index: [T, candidates], the best of pieces of this rank's vocabulary. token: [T]; ring:
    [steps, ring_stride], where the row of the current step also gets it.
    """
    if PDL:
        start_next()
        wait_for_previous()
    row = tl.program_id(0)
    c = tl.arange(0, BC)
    values = tl.load(value_ptr + row * candidates + c, mask=c < candidates, other=float("-inf"))
    indices = tl.load(index_ptr + row * candidates + c, mask=c < candidates, other=0x7FFFFFFF)
    best = tl.max(values, axis=0)
    token = tl.min(tl.where(values == best, indices, 0x7FFFFFFF), axis=0)
    if WORLD > 1:
        epoch = tl.load(epoch_ptr) + op + 1
        slot = epoch & 1
        pair = tl.arange(0, 2)
        at = row * 2 + pair
        flag = tl.zeros_like(at) + epoch
        words = tl.where(pair == 0, best.to(tl.int32, bitcast=True), token)
        _send(buffers_ptr, words, at, flag, slot, RANK, WORLD, WORDS)
        wait_ns = tl.zeros_like(at).to(tl.int64) + _limit(status_ptr, limit_ns)
        for peer in tl.static_range(WORLD):
            if peer != RANK:
                its, late = _receive(buffers_ptr, peer, at, flag, slot, wait_ns, RANK, WORLD, WORDS)
                if tl.max(late, axis=0) != 0:
                    tl.store(status_ptr, 1)
                its_value = tl.sum(tl.where(pair == 0, its, 0), axis=0).to(tl.float32, bitcast=True)
                its_token = tl.sum(tl.where(pair == 1, its, 0), axis=0)
                wins = (its_value > best) | ((its_value == best) & (its_token < token))
                best = tl.where(wins, its_value, best)
                token = tl.where(wins, its_token, token)
    tl.store(token_ptr + row, token)
    tl.store(ring_ptr + tl.load(step_ptr) * ring_stride + row, token)


@triton.jit
def advance_kernel(epoch_ptr, step_ptr, position_ptr, active_ptr, ops, T: tl.constexpr, PDL: tl.constexpr):
    """After a step: as many epochs have passed as it had reductions, and running rows are one further."""
    if PDL:
        start_next()
        wait_for_previous()
    t = tl.arange(0, T)
    tl.store(position_ptr + t, tl.load(position_ptr + t) + tl.load(active_ptr + t))
    tl.store(step_ptr, tl.load(step_ptr) + 1)
    tl.store(epoch_ptr, tl.load(epoch_ptr) + ops)
