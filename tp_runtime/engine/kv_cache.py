"""The KV cache's tensors: per layer, keys and values of this rank's heads, in blocks.

Layout [num_blocks, num_kv_heads, block_size, head_dim]: one head's tokens of a block lie together, so
that attention over a row reads whole cache lines in order. Memory is not cleared: nobody reads a slot
that was not written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.attention import Scales, empty_cache
from .kv_blocks import BLOCK_SIZE
from .memory import cache_vector_bytes


@dataclass(frozen=True)
class CacheShape:
    """What one rank's cache holds, for the sums before anything is allocated."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int = BLOCK_SIZE

    @property
    def vector_bytes(self) -> int:
        """Bytes of one token's key, or value, of one head, its scale included."""
        return cache_vector_bytes(self.head_dim, self.dtype.itemsize, scaled=self.dtype is torch.int8)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values, on every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.block_size * self.vector_bytes

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that many tokens of one row take."""
        return -(-num_tokens // self.block_size)


class KVCache:
    """keys[layer] and values[layer]: [num_blocks, num_kv_heads, block_size, head_dim].

    scales[layer]: None, or of an int8 cache those of keys and values (kernels/attention.py).
    """

    def __init__(self, shape: CacheShape, num_blocks: int, device: str) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        size = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)

        def make() -> list[Tensor]:
            return [empty_cache(size, shape.dtype, device) for _ in range(shape.num_layers)]

        def make_scales() -> Scales | None:
            if shape.dtype is not torch.int8:
                return None
            keys, values = (empty_cache(size[:3], torch.float32, device) for _ in range(2))
            return keys, values

        self.keys, self.values = make(), make()
        self.scales = [make_scales() for _ in range(shape.num_layers)]
