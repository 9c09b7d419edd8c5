"""The two ends of a decoding step: a token's vector, and the likeliest tokens of this rank's vocabulary.

Legend: T tokens, H hidden size, V this rank's vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dependent_launch import launch, start_next, wait_for_previous

CANDIDATE_LOGITS = 2048  # logits of one candidate


@triton.jit
def _embed_kernel(
    token_ptr, table_ptr, scale_ptr, out_ptr, start, stop, row_stride, H, HAS_SCALE: tl.constexpr,
    BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        start_next()
        wait_for_previous()
    t = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    token = tl.load(token_ptr + t)
    held = (token >= start) & (token < stop)
    row = tl.where(held, token - start, 0).to(tl.int64)
    value = tl.load(table_ptr + row * row_stride + column, mask=held & (column < H), other=0.0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(scale_ptr + row)
    tl.store(out_ptr + t * H + column, value, mask=column < H)


@triton.jit
def _candidates_kernel(logits_ptr, value_ptr, index_ptr, V, first, BC: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        start_next()
        wait_for_previous()
    t, piece = tl.program_id(0), tl.program_id(1)
    column = piece * BC + tl.arange(0, BC)
    logits = tl.load(logits_ptr + t.to(tl.int64) * V + column, mask=column < V, other=float("-inf"))
    best = tl.max(logits, axis=0)
    place = tl.min(tl.where(logits == best, column, 0x7FFFFFFF), axis=0)
    tl.store(value_ptr + t * tl.num_programs(1) + piece, best)
    tl.store(index_ptr + t * tl.num_programs(1) + piece, place + first)


def embed(
    token_T: Tensor, table: Tensor, scale: Tensor | None, out_TH: Tensor, start: int, stop: int,
) -> None:  # fmt: skip
    """out = the vectors of the tokens start .. stop, whose rows `table` holds; 0 of others.

    table: bf16, fp32, int8 or float8 [stop - start, H]. scale: fp32 a row, or None. out: fp32 [T, H].
    """
    tokens, size = out_TH.shape
    launch(
        _embed_kernel,
        (tokens, triton.cdiv(size, 1024)),
        token_T,
        table,
        out_TH if scale is None else scale,
        out_TH,
        start,
        stop,
        table.stride(0),
        size,
        HAS_SCALE=scale is not None,
        BC=1024,
    )


def num_candidates(vocab: int) -> int:
    """Candidates that `candidates` finds among so many logits."""
    return triton.cdiv(vocab, CANDIDATE_LOGITS)


def candidates(logits_TV: Tensor, value_TC: Tensor, index_TC: Tensor, first: int) -> None:
    """The largest logit of each piece of the vocabulary, and its id (the lowest among equals).

    logits: fp32. first: the id of the first logit. value fp32, index int32: [T, num_candidates(V)].
    """
    tokens, vocab = logits_TV.shape
    grid = (tokens, num_candidates(vocab))
    launch(
        _candidates_kernel, grid, logits_TV, value_TC, index_TC, vocab, first, BC=CANDIDATE_LOGITS
    )  # fmt: skip


def as_table(weight: Tensor) -> bool:
    """True where `embed` reads such a table."""
    return weight.dtype in (torch.bfloat16, torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn)
