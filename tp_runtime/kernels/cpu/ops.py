"""Fake implementations of the C++ ops, for torch.compile. Imported by build.load() once the ops exist."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("tp_cpu::linear")
def _(
    x: Tensor,
    packed: Tensor,
    channel_scale: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    head: int,
    asymmetric: bool,
    gated: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n // 2 if gated else n))


@torch.library.register_fake("tp_cpu::paged_attention")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.register_fake("tp_cpu::cache_write")
def _(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    return None
