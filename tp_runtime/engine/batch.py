"""Which sequences run in the next step: waiting ones are admitted in order as rows and blocks come free.

Plain Python, rank 0 only. A sequence is admitted with all the blocks it may ever need, so that nothing
that runs can be starved; rows that decode go first in each step, chunks of prompts fill what is left.
"""

from __future__ import annotations

from collections import deque

from ..errors import MemoryLimitError
from .kv_blocks import BlockPool
from .sequence import Sequence


class Batch:
    """Sequences waiting and running. max_rows: most that run at once; max_tokens: most tokens a step."""

    def __init__(self, pool: BlockPool, *, max_rows: int, max_tokens: int) -> None:
        self.pool = pool
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits the pool when it is alone."""
        assert self.pool.blocks_for(sequence.most_tokens) < self.pool.num_blocks, "can never be admitted"
        self.waiting.append(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self) -> None:
        """Move waiting sequences to the running ones while rows and blocks last.

        Raises MemoryLimitError where none runs and none ever could: others hold the pool's blocks.
        """
        while self.waiting and len(self.running) < self.max_rows:
            need = self.pool.blocks_for(self.waiting[0].most_tokens)
            if need > self.pool.num_free:
                break
            self.running.append(self.waiting.popleft())
            self.running[-1].blocks = self.pool.allocate(need)
        if self.waiting and not self.running:
            raise MemoryLimitError(
                f"a row needs {need} blocks of the cache, of which {self.pool.num_free} of "
                f"{self.pool.num_blocks - 1} are free, and no row runs that gives any back; make another LLM"
            )

    def next_rows(self) -> list[tuple[Sequence, tuple[int, ...]]]:
        """Running sequences with the tokens each brings: single ones first, then chunks of prompts."""
        room, rows = self.max_tokens, []
        for sequence in sorted(self.running, key=lambda s: len(s.prompt) > s.num_cached + 1):
            tokens = sequence.pending(room)
            if tokens:
                rows.append((sequence, tokens))
                room -= len(tokens)
        return rows

    def retire(self) -> list[Sequence]:
        """Take the finished sequences out and give their blocks back."""
        done = [sequence for sequence in self.running if sequence.finish_reason is not None]
        self.running = [sequence for sequence in self.running if sequence.finish_reason is None]
        for sequence in done:
            self._give_back(sequence)
        return done

    def clear(self) -> None:
        """Forget all sequences, as where an error ended the call, and give their blocks back."""
        self.waiting.clear()
        while self.running:
            self._give_back(self.running.pop())

    def _give_back(self, sequence: Sequence) -> None:
        blocks, sequence.blocks = sequence.blocks, []
        self.pool.release(blocks)
