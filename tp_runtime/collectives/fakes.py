"""Fake implementations of the shared-memory ops, for torch.compile. Imported once the ops exist."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("tp_shm::all_reduce")
def _(x: Tensor, reduction: str, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("tp_shm::all_gather")
def _(x: Tensor, world_size: int, group: str) -> Tensor:
    return x.new_empty((world_size, *x.shape))


@torch.library.register_fake("tp_shm::broadcast_")
def _(x: Tensor, source: int, group: str) -> None:
    return None
