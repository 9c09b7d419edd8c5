"""Slow and obvious twins of the kernels, in plain PyTorch: what every fast path is tested against.

Legend: N output rows, K input columns, G groups; T tokens, R rows (requests), H query heads,
B cached blocks a row (at most), S cached tokens, D head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def unpack_nibbles(q: Tensor, k: int) -> Tensor:
    """uint8 [N, ceil(k/2)] -> uint8 [N, k] in 0..15: column 2j is the low nibble of byte j, 2j+1 the high."""
    return torch.stack((q & 15, q >> 4), dim=-1).flatten(-2)[:, :k]


def dequantize(
    q: Tensor, scale: Tensor, offset: Tensor | None, *, bits: int, group_size: int, head: int, k: int
) -> Tensor:
    """The fp32 weight [N, k] that a canonical quantised weight stands for.

    q: int8 [N, k] or, with bits=4, uint8 [N, ceil(k/2)]. scale: [N] (group_size 0) or [N, G].
    offset: like scale, or None. head: columns of the first group that lie left of column 0.
    """
    w_NK = (q if bits == 8 else unpack_nibbles(q, k)).float()
    if bits == 4 and offset is None:
        w_NK = w_NK - 8
    if group_size == 0:
        return w_NK * scale.float().unsqueeze(1)
    group_of_K = (torch.arange(k, device=q.device) + head) // group_size
    w_NK = w_NK * scale.float()[:, group_of_K]
    return w_NK if offset is None else w_NK + offset.float()[:, group_of_K]


def quantize_int8(x_THD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [T, H, D] and fp32 scales [T, H], whose product is x to within half a scale.

    Each token and head has its own scale, a 127th of its largest magnitude; ties are rounded to even. Where a
    number is not finite the scale is NaN.
    """
    x_THD = x_THD.float()
    largest_TH = x_THD.abs().amax(dim=-1)
    scale_TH = torch.where(largest_TH.isfinite(), largest_TH / 127, torch.nan)
    some_TH = scale_TH > 0
    divisor_TH = torch.where(some_TH, scale_TH, 1)
    x_THD = torch.where(some_TH.unsqueeze(-1), x_THD, 0)
    return (x_THD / divisor_TH.unsqueeze(-1)).clamp(-127, 127).round().to(torch.int8), scale_TH


def write_cache(
    k_THD: Tensor,
    v_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Put token t's key and value at slot slots_T[t] (block * block_size + offset) of the caches."""
    block, place = slots_T // k_cache.shape[2], slots_T % k_cache.shape[2]
    for x_THD, cache, scales in ((k_THD, k_cache, key_scales), (v_THD, v_cache, value_scales)):
        if scales is None:
            _bits(cache)[block, :, place] = _bits(_within(x_THD, cache.dtype))
        else:
            cache[block, :, place], scales[block, :, place] = quantize_int8(x_THD)


def _bits(x: Tensor) -> Tensor:
    """fp8 as bytes, which torch can index everywhere."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _within(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype; of fp8, which has no infinity, the largest number where x is beyond."""
    if dtype == torch.float8_e4m3fn:
        most = torch.finfo(dtype).max
        x = x.float().clamp(-most, most)
    return x.to(dtype)


def _gathered(cache: Tensor, blocks: Tensor, scales: Tensor | None) -> Tensor:
    """The blocks [B, heads, block_size, D], as numbers that can be multiplied."""
    if cache.dtype == torch.float8_e4m3fn:
        return _bits(cache)[blocks].view(cache.dtype).float()
    return cache[blocks] if scales is None else cache[blocks] * scales[blocks].unsqueeze(-1)


def _attend_row(q_THD: Tensor, k_HSD: Tensor, v_HSD: Tensor, scale: float, window: int) -> Tensor:
    """One row: its T queries are the last T of the S positions. Returns [T, H, D]."""
    queries, context = q_THD.shape[0], k_HSD.shape[1]
    default_scale = math.isclose(scale * math.sqrt(q_THD.shape[2]), 1.0, rel_tol=1e-9)
    # The same call as the plain model's for a whole prompt, so that its logits agree bit for bit.
    plain = queries == context and (window == 0 or context <= window)
    mask_TS = None
    if not plain:
        position_T = torch.arange(context - queries, context, device=q_THD.device).unsqueeze(1)
        position_S = torch.arange(context, device=q_THD.device).unsqueeze(0)
        mask_TS = position_S <= position_T
        if window:
            mask_TS &= position_S > position_T - window
    y_1HTD = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1).unsqueeze(0),
        k_HSD.unsqueeze(0),
        v_HSD.unsqueeze(0),
        attn_mask=mask_TS,
        is_causal=plain,
        scale=None if default_scale else scale,
        enable_gqa=True,
    )
    return y_1HTD.squeeze(0).transpose(0, 1)


def attend_paged(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_RB: Tensor,
    query_start_R1: Tensor,
    context_lens_R: Tensor,
    scale: float,
    window: int,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Causal attention of each row's queries over its cached tokens; see attention.paged_attention."""
    out_THD = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
    block_size = k_cache.shape[2]
    starts, contexts = query_start_R1.tolist(), context_lens_R.tolist()
    for row, context in enumerate(contexts):
        start, stop = starts[row], starts[row + 1]
        if stop <= start:
            continue
        blocks = block_table_RB[row, : -(-context // block_size)].long()
        # [blocks, heads, block_size, D] -> [heads, S, D]
        k_HSD, v_HSD = (
            _gathered(cache, blocks, scales).transpose(0, 1).flatten(1, 2)[:, :context].to(q_THD.dtype)
            for cache, scales in ((k_cache, key_scales), (v_cache, value_scales))
        )
        out_THD[start:stop] = _attend_row(q_THD[start:stop], k_HSD, v_HSD, scale, window)
    return out_THD
