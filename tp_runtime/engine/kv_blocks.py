"""Which block of the KV cache belongs to whom: one pool, reference counts, plain Python.

A block holds `block_size` consecutive tokens of one row, on every layer at once. Block 0 is scratch:
padding tokens write there and nobody reads it. A block may be held by several rows (a shared prefix);
it returns to the pool when the last one lets go.
"""

from __future__ import annotations

from collections.abc import Iterable

SCRATCH_BLOCK = 0
BLOCK_SIZE = 32  # tokens


class BlockPool:
    """Blocks 1 .. num_blocks-1, handed out lowest first and counted."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, "a pool needs the scratch block and one more"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, SCRATCH_BLOCK, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that many tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. The caller asks `num_free` first."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each block."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free and cannot be shared"
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give one reference to each block back."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def resize(self, blocks: list[int], num_tokens: int) -> None:
        """Make a row's list of blocks, in place, what `num_tokens` take: more of them, or the last ones back.

        The caller asks `num_free` first where it grows.
        """
        wanted = self.blocks_for(num_tokens)
        if wanted > len(blocks):
            blocks += self.allocate(wanted - len(blocks))
        elif wanted < len(blocks):
            self.release(blocks[wanted:])
            del blocks[wanted:]

    def sanity_checks(self) -> None:
        """Every block is either free or referenced, none is both, and scratch is neither."""
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert SCRATCH_BLOCK not in self._free and self._references[SCRATCH_BLOCK] == 0, (
            "scratch was handed out"
        )
        for block in range(1, self.num_blocks):
            is_free = self._references[block] == 0
            assert is_free == (block in self._free), f"block {block} is lost or handed out twice"
