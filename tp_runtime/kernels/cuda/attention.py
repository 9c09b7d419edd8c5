"""Attention over a cache of blocks on the GPU: one kernel for decoding, one for prompts, one for rotary
positions and writing the cache.

Decoding a row reads its whole cache once, so few rows have to be spread over the GPU: each row and
key-value head is divided among programs that take runs of positions, and the last one to finish puts the
partial softmaxes together (in the order of the runs, so the result does not depend on who was last).
Context lengths are read from device memory: a captured step serves every length.

The cache is [blocks, key-value heads, block size, D], in bf16, fp16 or fp8 (e4m3 as such, without scales).

Legend: T tokens, H query heads, K key-value heads,
D head_dim, S splits of the projection's K dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...dependent_launch import start_next, wait_for_previous

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _head_norm(left, right, weight_ptr, half, D: tl.constexpr, eps):
    """RMSNorm of one head whose two halves are given."""
    scale = tl.rsqrt((tl.sum(left * left) + tl.sum(right * right)) / D + eps)
    left = left * scale * tl.load(weight_ptr + half).to(tl.float32)
    right = right * scale * tl.load(weight_ptr + D // 2 + half).to(tl.float32)
    return left, right


@triton.jit
def _put(pointer, value):
    """Store in the pointer's type; beyond what fp8 holds, the largest it does."""
    if pointer.dtype.element_ty == tl.float8e4nv:
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    tl.store(pointer, value.to(pointer.dtype.element_ty))


@triton.jit
def rope_write_kernel(
    qkv_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, position_ptr, row_ptr, table_ptr, q_ptr,
    k_cache_ptr, v_cache_ptr, T, table_stride, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one token: add up the splits, norm, turn by the position; q to q_ptr, k and v to the cache.

    qkv: fp32 [SPLITS, T, (H + 2K) D]. cos, sin: fp32 [positions, D/2]. table: block numbers of each row.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    half = tl.arange(0, D // 2)
    SIZE: tl.constexpr = (H + 2 * K) * D
    # What no kernel of the step writes is asked for before the wait.
    position = tl.load(position_ptr + token)
    row = tl.load(row_ptr + token)
    block = tl.load(table_ptr + row * table_stride + position // BLOCK).to(tl.int64)
    cos = tl.load(cos_ptr + position * (D // 2) + half)
    sin = tl.load(sin_ptr + position * (D // 2) + half)
    if PDL:
        start_next()
        wait_for_previous()
    left = tl.zeros([D // 2], tl.float32)
    right = tl.zeros([D // 2], tl.float32)
    for split in tl.static_range(SPLITS):
        base = qkv_ptr + (split * T + token) * SIZE + head * D
        left += tl.load(base + half)
        right += tl.load(base + D // 2 + half)
    if HAS_BIAS:
        left += tl.load(bias_ptr + head * D + half).to(tl.float32)
        right += tl.load(bias_ptr + head * D + D // 2 + half).to(tl.float32)
    if head < H + K:
        if HAS_NORM:
            if head < H:
                left, right = _head_norm(left, right, q_norm_ptr, half, D, eps)
            else:
                left, right = _head_norm(left, right, k_norm_ptr, half, D, eps)
        turned = left * cos - right * sin
        right = right * cos + left * sin
        left = turned
    if head < H:
        out = q_ptr + (token * H + head) * D
        tl.store(out + half, left.to(q_ptr.dtype.element_ty))
        tl.store(out + D // 2 + half, right.to(q_ptr.dtype.element_ty))
    else:
        kv_head = (head - H) % K
        at = ((block * K + kv_head) * BLOCK + position % BLOCK) * D
        if head < H + K:
            _put(k_cache_ptr + at + half, left)
            _put(k_cache_ptr + at + D // 2 + half, right)
        else:
            _put(v_cache_ptr + at + half, left)
            _put(v_cache_ptr + at + D // 2 + half, right)


@triton.jit
def _softmax_step(q, k, v, m, total, acc, valid, scale):
    """One tile of keys and values into the running maximum m, sum total and weighted sum acc."""
    scores = tl.dot(q, k) * scale
    scores = tl.where(valid, scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, axis=1))
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    p = tl.exp2(scores - safe_m[:, None])
    shrink = tl.exp2(m - safe_m)
    total = total * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
    return new_m, total, acc


@triton.jit
def _cache_rows(at, table_ptr, kv_head, seen, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Where the keys (or values) of positions `at` begin in the cache; unseen ones anywhere."""
    number = tl.load(table_ptr + at // BLOCK, mask=seen, other=0).to(tl.int64)
    return ((number * K + kv_head) * BLOCK + at % BLOCK) * D


@triton.jit
def _newest_joined(q, k, v, old, new_k, new_v, here, scale):
    """The softmax over a tile of old keys and values and, where it is `here`, the newest: m, total, acc."""
    new_score = tl.sum(q.to(tl.float32) * new_k[None, :], axis=1) * scale
    new_score = tl.where(here, new_score, float("-inf"))
    scores = tl.where(old[None, :], tl.dot(q, k) * scale, float("-inf"))
    m = tl.maximum(tl.max(scores, axis=1), new_score)
    p, new_p = tl.exp2(scores - m[:, None]), tl.exp2(new_score - m)
    acc = tl.dot(p.to(v.dtype), v) + new_p[:, None] * new_v[None, :]
    return m, tl.sum(p, axis=1) + new_p, acc


@triton.jit
def _all_runs(partial_ptr, stats_ptr, pair, active, g, d, GROUP, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """What the active runs of a pair left, put together in their order: total and acc."""
    D: tl.constexpr = d.shape[0]
    runs = tl.arange(0, SPLITS)
    its_stats = stats_ptr + (pair * SPLITS + runs[:, None]) * 2 * ROWS + g[None, :]
    done = runs[:, None] < active
    all_m = tl.load(its_stats, mask=done, other=float("-inf"), cache_modifier=".cg")
    all_l = tl.load(its_stats + ROWS, mask=done, other=0.0, cache_modifier=".cg")
    m = tl.max(all_m, axis=0)
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(all_l * tl.exp2(all_m - m[None, :]), axis=0)
    acc = tl.zeros([ROWS, D], tl.float32)
    for other in tl.range(0, active, loop_unroll_factor=4):  # their loads do not wait for each other
        slot = pair * SPLITS + other
        its_m = tl.load(stats_ptr + slot * 2 * ROWS + g, cache_modifier=".cg")
        its = tl.load(
            partial_ptr + (slot * ROWS + g[:, None]) * D + d[None, :],
            mask=g[:, None] < GROUP, other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        acc += its * tl.exp2(its_m - m)[:, None]
    return total, acc


@triton.jit
def decode_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, position_ptr, row_ptr, table_ptr, partial_ptr, stats_ptr, count_ptr,
    out_ptr, table_stride, scale, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One run of tiles of BS positions of one token's key-value head, for all query heads that share it.

    ROWS: those heads padded to 16 or more. SPLITS: most runs, a power of two. partial: fp32 [T, K, SPLITS,
    ROWS, D], stats: fp32 [T, K, SPLITS, 2, ROWS], count: int32 [T, K], zero before and after. ALONE: the step
    has one token, so that steps before have written all but its own position, and a run loads its first tile
    while the projection still runs.
    """
    token, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H // K
    # Positions, rows and tables, which no kernel of the step writes before its last.
    context = tl.load(position_ptr + token) + 1
    table_ptr += tl.load(row_ptr + token) * table_stride
    lowest = tl.maximum(context - window, 0) if window > 0 else 0
    first_tile = lowest // BS
    tiles = tl.cdiv(context, BS) - first_tile
    run = tl.cdiv(tiles, SPLITS)
    active = tl.cdiv(tiles, run)
    if split >= active:
        return
    g, d, s = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BS)
    start = first_tile + split * run
    if ALONE:
        at = start * BS + s
        old = (at < context - 1) & (at >= lowest)
        base = _cache_rows(at, table_ptr, kv_head, old, K, D, BLOCK)
        old_k = tl.load(k_cache_ptr + base[None, :] + d[:, None], mask=old[None, :], other=0.0)
        old_v = tl.load(v_cache_ptr + base[:, None] + d[None, :], mask=old[:, None], other=0.0)
        old_k, old_v = old_k.to(q_ptr.dtype.element_ty), old_v.to(q_ptr.dtype.element_ty)
        newest = _cache_rows(context - 1, table_ptr, kv_head, True, K, D, BLOCK) + d
    if PDL:
        wait_for_previous()
        if ALONE:
            start_next()
    if ALONE:
        # Past the L1, which may hold the sector of a short key as it was when its neighbour was loaded.
        new_k = tl.load(k_cache_ptr + newest, cache_modifier=".cg").to(tl.float32)
        new_v = tl.load(v_cache_ptr + newest, cache_modifier=".cg").to(tl.float32)
    its_q = q_ptr + (token * H + kv_head * GROUP + g[:, None]) * D + d[None, :]
    q = tl.load(its_q, mask=g[:, None] < GROUP, other=0.0)
    scale *= _LOG2E
    end = tl.minimum(start + run, first_tile + tiles)
    if ALONE:
        here = (context - 1) // BS == start
        m, total, acc = _newest_joined(q, old_k, old_v, old, new_k, new_v, here, scale)
        start += 1
    else:
        m = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
    for tile in tl.range(start, end, num_stages=STAGES):
        at = tile * BS + s
        seen = (at < context) & (at >= lowest)  # other slots may never have been written, and hold NaN
        base = _cache_rows(at, table_ptr, kv_head, seen, K, D, BLOCK)
        k = tl.load(k_cache_ptr + base[None, :] + d[:, None], mask=seen[None, :], other=0.0)
        v = tl.load(v_cache_ptr + base[:, None] + d[None, :], mask=seen[:, None], other=0.0)
        m, total, acc = _softmax_step(q, k.to(q.dtype), v.to(q.dtype), m, total, acc, seen[None, :], scale)
    if PDL and not ALONE:
        # Not earlier: a linear's programs would crowd onto the processors that are done here first.
        start_next()
    out = out_ptr + (token * H + kv_head * GROUP + g[:, None]) * D + d[None, :]
    if active == 1:
        tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=g[:, None] < GROUP)
        return
    pair = token * K + kv_head
    slot = pair * SPLITS + split
    tl.store(partial_ptr + (slot * ROWS + g[:, None]) * D + d[None, :], acc, mask=g[:, None] < GROUP)
    tl.store(stats_ptr + slot * 2 * ROWS + g, m)
    tl.store(stats_ptr + (slot * 2 + 1) * ROWS + g, total)
    tl.debug_barrier()  # every thread's stores come before the one that counts this program in
    arrived = tl.atomic_add(count_ptr + pair, 1, sem="acq_rel")
    if arrived != active - 1:
        return
    tl.debug_barrier()
    tl.store(count_ptr + pair, 0)
    total, acc = _all_runs(partial_ptr, stats_ptr, pair, active, g, d, GROUP, ROWS, SPLITS)
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=g[:, None] < GROUP)


@triton.jit
def prompt_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, table_ptr, start_ptr, context_ptr, out_ptr, table_stride, scale, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BM queries of one row and head over all they may see, which the cache already holds.

    What all of them see is read without a mask; the last queries, which see most, begin first.
    """
    head, row = tl.program_id(1), tl.program_id(2)
    q_start = tl.load(start_ptr + row)
    queries = tl.load(start_ptr + row + 1) - q_start
    context = tl.load(context_ptr + row)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if first >= queries:
        return
    i, d, s = first + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BS)
    position = context - queries + i
    q_at = ((q_start + i[:, None]).to(tl.int64) * H + head) * D + d[None, :]
    q = tl.load(q_ptr + q_at, mask=i[:, None] < queries, other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    lowest = tl.maximum(context - queries + first - window + 1, 0) // BS * BS if window > 0 else 0
    seen_by_all = (context - queries + first + 1) // BS * BS if window == 0 else lowest
    end = tl.minimum(context, context - queries + first + BM)
    kv_head = head // (H // K)
    table_ptr += row * table_stride
    for start in tl.range(lowest, seen_by_all, BS, num_stages=2):
        base = _cache_rows(start + s, table_ptr, kv_head, start + s < context, K, D, BLOCK)
        k = tl.load(k_cache_ptr + base[None, :] + d[:, None])
        v = tl.load(v_cache_ptr + base[:, None] + d[None, :])
        scores = tl.dot(q, k.to(q.dtype)) * (scale * _LOG2E)
        new_m = tl.maximum(m, tl.max(scores, axis=1))
        p, shrink = tl.exp2(scores - new_m[:, None]), tl.exp2(m - new_m)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
        m = new_m
    for start in tl.range(seen_by_all, end, BS, num_stages=1):
        at = start + s
        base = _cache_rows(at, table_ptr, kv_head, at < context, K, D, BLOCK)
        k = tl.load(k_cache_ptr + base[None, :] + d[:, None], mask=at[None, :] < context, other=0.0)
        v = tl.load(v_cache_ptr + base[:, None] + d[None, :], mask=at[:, None] < context, other=0.0)
        valid = (at[None, :] <= position[:, None]) & (at[None, :] < context)
        if window > 0:
            valid = valid & (at[None, :] > position[:, None] - window)
        m, total, acc = _softmax_step(q, k.to(q.dtype), v.to(q.dtype), m, total, acc, valid, scale * _LOG2E)
    tl.store(out_ptr + q_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=i[:, None] < queries)
