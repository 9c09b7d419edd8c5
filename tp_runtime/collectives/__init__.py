"""all_reduce, all_gather and broadcast over one process group, as ops torch.compile can trace."""

from __future__ import annotations

from .ops import all_gather, all_reduce, broadcast_

__all__ = ["all_gather", "all_reduce", "broadcast_"]
