"""Attention over a cache of blocks, and writing into it, as custom ops.

A cache is [num_blocks, num_kv_heads, block_size, head_dim]; a row (request) owns the blocks its line of
the block table names, in order. Decode, chunked prefill and verification are one op: row r brings
queries query_start[r] .. query_start[r+1]-1, its last of context_lens[r] cached tokens.

An int8 cache has scales beside it, fp32 [num_blocks, num_kv_heads, block_size], keys and values apart: a
token's numbers of one head, times their scale, are what was written, to within half a scale. That is D + 4
bytes where bf16 takes 2 D. An fp8 cache (e4m3, on GPUs) has none: numbers are what they are, to 448.

The C++ kernels read the blocks where they lie; rows of more than 16 queries are gathered, once, for torch's
flash attention, which is compute-bound there. The reference gathers every row's. Legend: T tokens, R rows,
H heads, D head_dim, B blocks a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .cpu import build

Scales = tuple[Tensor, Tensor]  # of keys, of values

LANES = 16  # the C++ kernels' vector; head_dim is a multiple of it


def empty_cache(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Uninitialised memory for a cache; on CPUs on huge pages, where the kernels and the host offer them."""
    if device == "cpu" and build.available():
        num_bytes = math.prod(shape) * dtype.itemsize
        return torch.ops.tp_cpu.empty_weight(num_bytes, placed=False).view(dtype).view(*shape)
    return torch.empty(*shape, dtype=dtype, device=device)


@torch.compiler.assume_constant_result
def _available() -> bool:
    return build.available()


def _native(q_THD: Tensor, backend: str) -> bool:
    assert backend in ("auto", "reference"), f"backend {backend!r} is neither auto nor reference"
    if backend == "reference" or q_THD.device.type != "cpu" or q_THD.shape[-1] % LANES:
        return False
    return _available()


# No defaults: torch 2.11 drops arguments equal to theirs and then misses them among those written to.
@torch.library.custom_op(
    "tp_runtime::cache_write_reference",
    mutates_args=("k_cache", "v_cache", "key_scales", "value_scales"),
)
def _cache_write_reference(
    k_THD: Tensor,
    v_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    reference.write_cache(k_THD, v_THD, k_cache, v_cache, slots_T, key_scales, value_scales)


@_cache_write_reference.register_fake
def _(
    k_THD: Tensor,
    v_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    return None


@torch.library.custom_op("tp_runtime::paged_attention_reference", mutates_args=())
def _paged_attention_reference(
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
    lines = (block_table_RB, query_start_R1, context_lens_R)
    return reference.attend_paged(q_THD, k_cache, v_cache, *lines, scale, window, key_scales, value_scales)


@_paged_attention_reference.register_fake
def _(
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
    return torch.empty_like(q_THD, memory_format=torch.contiguous_format)


def cache_write(
    k_THD: Tensor,
    v_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    *,
    scales: Scales | None = None,
    backend: str = "auto",
) -> None:
    """Write each token's key and value into the caches, in place.

    k_THD, v_THD: [T, num_kv_heads, D]. k_cache, v_cache: [num_blocks, num_kv_heads, block_size, D].
    slots_T: int32 or int64, block * block_size + offset; where two tokens name one slot, either may win.
    scales: an int8 cache's, written too. backend: "auto" or "reference".
    """
    op = torch.ops.tp_cpu.cache_write if _native(k_THD, backend) else _cache_write_reference
    op(k_THD, v_THD, k_cache, v_cache, slots_T, *(scales or (None, None)))


def paged_attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_RB: Tensor,
    query_start_R1: Tensor,
    context_lens_R: Tensor,
    scale: float,
    window: int = 0,
    *,
    scales: Scales | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of every row's queries over its cached tokens: [T, H, D] in q's dtype.

    q_THD: fp32, bf16 or fp16; H is a multiple of the cache's heads. block_table_RB, query_start_R1,
    context_lens_R: int32. A row's i-th query sits at position context_len - query_len + i and sees the
    positions up to its own, the last `window` of them (0: all). Rows without queries are skipped, and
    tokens beyond query_start[-1] are padding: their output is zero. scales: an int8 cache's.
    """
    if backend == "auto" and q_THD.device.type == "cuda":
        from .cuda import attention_ops

        assert scales is None, "the GPU kernels read no int8 cache"
        if attention_ops.takes(q_THD):
            return attention_ops.paged_attention(
                q_THD, k_cache, v_cache, block_table_RB, query_start_R1, context_lens_R, scale, window
            )
    op = torch.ops.tp_cpu.paged_attention if _native(q_THD, backend) else _paged_attention_reference
    lines = (block_table_RB, query_start_R1, context_lens_R)
    return op(q_THD, k_cache, v_cache, *lines, scale, window, *(scales or (None, None)))
