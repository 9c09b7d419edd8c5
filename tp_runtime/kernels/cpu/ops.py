"""Fake implementations of the C++ ops, for torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor


def _linear(
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
    round_activations: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n // 2 if gated else n))


def _packed_rows(
    ids: Tensor,
    packed: Tensor,
    channel_scale: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    head: int,
    asymmetric: bool,
) -> Tensor:
    return packed.new_empty((ids.shape[0], k), dtype=torch.float32)


def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _cache_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    return None


def register_fakes() -> None:
    """Tell torch about them. The library that defines the ops must be loaded."""
    torch.library.register_fake("tp_cpu::linear", _linear)
    torch.library.register_fake("tp_cpu::packed_rows", _packed_rows)
    torch.library.register_fake("tp_cpu::paged_attention", _paged_attention)
    torch.library.register_fake("tp_cpu::cache_write", _cache_write)
