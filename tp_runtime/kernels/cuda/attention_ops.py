"""Launching the kernels of attention.py, and prompt attention as an op.

Legend: T tokens, R rows, H query heads, K key-value heads, D head_dim, B blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...dependent_launch import launch
from .attention import decode_kernel, prompt_kernel, rope_write_kernel

HEAD_DIMS = (16, 32, 64, 128, 256)
_TYPES = (torch.bfloat16, torch.float16)
_TILE = 128  # positions read at once: half as many take up to 1 us a layer more at 250, 3 at 8,000
_TILE_ALONE = 256  # of a step's only token: what saves it up to 256 positions a second run, and their joining
_MOST_SPLITS = 32


def takes(q_THD: Tensor) -> bool:
    """True where the Triton kernels serve such queries."""
    return q_THD.device.type == "cuda" and q_THD.shape[-1] in HEAD_DIMS and q_THD.dtype in _TYPES


@torch.library.custom_op("tp_cuda::paged_attention", mutates_args=())
def paged_attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_RB: Tensor,
    query_start_R1: Tensor,
    context_lens_R: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """kernels.attention.paged_attention on the GPU, without asking the GPU for a length."""
    q_THD = q_THD.contiguous()
    out_THD = torch.zeros_like(q_THD)
    (tokens, heads, dim), rows = q_THD.shape, block_table_RB.shape[0]
    tile = 64 if dim <= 128 else 32
    prompt_kernel[(triton.cdiv(tokens, tile), heads, rows)](
        q_THD,
        k_cache,
        v_cache,
        block_table_RB,
        query_start_R1,
        context_lens_R,
        out_THD,
        block_table_RB.stride(0),
        scale,
        window,
        H=heads,
        K=k_cache.shape[1],
        D=dim,
        BM=tile,
        BS=tile,
        BLOCK=k_cache.shape[2],
        num_warps=4,
    )
    return out_THD


@paged_attention.register_fake
def _(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_RB: Tensor,
    query_start_R1: Tensor,
    context_lens_R: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    return torch.empty_like(q_THD, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Runs:
    """How a context is divided: tiles of so many positions, runs (a power of two) that share its tiles."""

    tile: int
    splits: int


@dataclass(frozen=True)
class DecodeScratch:
    """What decode attention keeps between programs: see decode_kernel. For at most `tokens` tokens.

    runs: of steps of several tokens; runs_alone: of one, no more than those.
    """

    partial: Tensor
    stats: Tensor
    count: Tensor
    runs: Runs
    runs_alone: Runs

    @classmethod
    def make(
        cls, tokens: int, heads: int, cache: Tensor, context: int, *, most_splits: int = _MOST_SPLITS
    ) -> DecodeScratch:
        """For a cache of keys [blocks, K, block size, D] of contexts up to `context`."""
        kv_heads, dim, device = cache.shape[1], cache.shape[3], cache.device

        def runs_of(tile: int) -> Runs:
            tile = _fitting(tile, cache)
            return Runs(tile, min(most_splits, triton.next_power_of_2(triton.cdiv(context, tile))))

        runs, alone = runs_of(_TILE), runs_of(_TILE_ALONE)
        # A large tile fills a processor: where not each of them has one, smaller tiles are faster.
        tiles = triton.cdiv(context, alone.tile)
        if tiles > alone.splits or kv_heads * tiles > _processors(cache):
            alone = runs
        rows = padded_group(heads, kv_heads)
        slots = tokens * kv_heads * runs.splits
        return cls(
            torch.empty(slots * rows * dim, dtype=torch.float32, device=device),
            torch.empty(slots * 2 * rows, dtype=torch.float32, device=device),
            torch.zeros(tokens * kv_heads, dtype=torch.int32, device=device),
            runs,
            alone,
        )


def _stages(tile: int) -> int:
    """Tiles of keys and values on their way."""
    return 2 if tile <= _TILE else 1


def _processors(cache: Tensor) -> int:
    if cache.device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.get_device_properties(cache.device).multi_processor_count)


def _fitting(tile: int, cache: Tensor) -> int:
    """The tile, or less where the GPU's shared memory does not hold the stages of it."""
    if cache.device.type == "cuda":
        limit = torch.cuda.get_device_properties(cache.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        pair = 2 * cache.shape[3]  # of a key and a value, of 16 bits once they are widened
        # A quarter is for queries and weights.
        while tile > 16 and tile * pair * max(2, _stages(tile) * cache.itemsize) > limit * 3 // 4:
            tile //= 2
    return tile


def padded_group(heads: int, kv_heads: int) -> int:
    """Query heads of one key-value head, padded to what a matrix product takes."""
    return max(16, triton.next_power_of_2(heads // kv_heads))


def rope_write(
    qkv_STN: Tensor,
    bias_N: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    position_T: Tensor,
    row_T: Tensor,
    table_RB: Tensor,
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """See rope_write_kernel. norms: weights of q and k norm and their eps, or None."""
    splits, tokens, _ = qkv_STN.shape
    heads, dim = q_THD.shape[1:]
    kv_heads, block = k_cache.shape[1], k_cache.shape[2]
    q_norm, k_norm, eps = norms if norms is not None else (cos, cos, 0.0)
    launch(
        rope_write_kernel,
        (tokens, heads + 2 * kv_heads),
        qkv_STN,
        cos if bias_N is None else bias_N,
        cos,
        sin,
        q_norm,
        k_norm,
        position_T,
        row_T,
        table_RB,
        q_THD,
        k_cache,
        v_cache,
        tokens,
        table_RB.stride(0),
        eps,
        H=heads,
        K=kv_heads,
        D=dim,
        SPLITS=splits,
        BLOCK=block,
        HAS_BIAS=bias_N is not None,
        HAS_NORM=norms is not None,
        num_warps=1,
    )


def decode_attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position_T: Tensor,
    row_T: Tensor,
    table_RB: Tensor,
    scratch: DecodeScratch,
    out_THD: Tensor,
    *,
    scale: float,
    window: int,
) -> None:
    """Each token's attention over its row's cache up to its own position; see decode_kernel."""
    tokens, heads, dim = q_THD.shape
    kv_heads, block = k_cache.shape[1], k_cache.shape[2]
    runs = scratch.runs_alone if tokens == 1 else scratch.runs
    launch(
        decode_kernel,
        (tokens, kv_heads, runs.splits),
        q_THD,
        k_cache,
        v_cache,
        position_T,
        row_T,
        table_RB,
        scratch.partial,
        scratch.stats,
        scratch.count,
        out_THD,
        table_RB.stride(0),
        scale,
        window,
        H=heads,
        K=kv_heads,
        D=dim,
        ROWS=padded_group(heads, kv_heads),
        SPLITS=runs.splits,
        BS=runs.tile,
        BLOCK=block,
        STAGES=_stages(runs.tile),
        ALONE=tokens == 1,
        num_warps=8,
    )
