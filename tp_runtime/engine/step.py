"""One step of the engine: some rows, each bringing some tokens, as rank 0 describes it to all ranks.

A row brings consecutive tokens that continue what its blocks already hold: one (decode), many (a chunk
of prefill) or a few (verification of a draft); `num_logits` of the last ones want logits. Rows of all
kinds share a step. `Step.pack` is what travels: small integers, no tensors of the model.

`StepTensors` is what the model sees, padded to a few sizes so that one compiled or captured graph
serves many steps: tokens [T], positions [T], slots [T] (block * block_size + offset; padding writes to
the scratch block), query_start [R+1], context_lens [R], block_table [R, max_blocks], logit_rows [L].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kv_blocks import SCRATCH_BLOCK


@dataclass(frozen=True)
class Row:
    """One row's part of a step.

    tokens: ids it brings. start: tokens its blocks already hold; the first new one sits at that
    position. blocks: its blocks, enough for start + len(tokens) tokens. num_logits: how many of its
    last tokens want a row of logits.
    """

    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    num_logits: int

    @property
    def context_len(self) -> int:
        """Tokens its blocks hold after the step."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Step:
    """The rows of one step."""

    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def num_logits(self) -> int:
        return sum(row.num_logits for row in self.rows)

    def pack(self) -> np.ndarray:
        """int32 words: the row count, then per row (tokens, start, blocks, num_logits) and the lists."""
        words: list[int] = [len(self.rows)]
        for row in self.rows:
            words += (len(row.tokens), row.start, len(row.blocks), row.num_logits)
            words += row.tokens
            words += row.blocks
        return np.asarray(words, dtype=np.int32)

    @classmethod
    def unpack(cls, words: np.ndarray) -> Step:
        """The inverse of pack."""
        values, at, rows = words.tolist(), 1, []
        for _ in range(values[0]):
            num_tokens, start, num_blocks, num_logits = values[at : at + 4]
            at += 4
            tokens = tuple(values[at : at + num_tokens])
            at += num_tokens
            rows.append(Row(tokens, start, tuple(values[at : at + num_blocks]), num_logits))
            at += num_blocks
        assert at == len(values), "a step descriptor was cut or runs on"
        return cls(tuple(rows))


def bucket(count: int, limit: int, exact: int = 0) -> int:
    """The padded size for `count`: itself up to `exact`, else the next power of two, at most `limit`."""
    if 0 < count <= exact:
        return count
    return max(count, min(limit, 1 << max(0, count - 1).bit_length()))


@dataclass(frozen=True)
class StepTensors:
    """See the module. T, R and L are padded sizes; num_logits is the true L."""

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    query_start: Tensor
    context_lens_R: Tensor
    block_table_RB: Tensor
    logit_rows_L: Tensor
    num_logits: int

    @classmethod
    def build(
        cls,
        step: Step,
        *,
        block_size: int,
        max_blocks: int,
        max_rows: int,
        max_tokens: int,
        pad: bool,
        exact_tokens: int = 0,
        min_tokens: int = 0,
        device: str,
    ) -> StepTensors:
        """Lay a step out for the model.

        pad=False: exactly the step's tokens and rows. exact_tokens: so many tokens and fewer are not padded.
        min_tokens: least padded size of tokens and of logits.
        """
        num_tokens, num_rows, num_logits = step.num_tokens, len(step.rows), step.num_logits
        size_T = max(bucket(num_tokens, max_tokens, exact_tokens), min_tokens) if pad else num_tokens
        size_R = max_rows if pad else num_rows
        size_L = max(bucket(num_logits, max_tokens, exact_tokens), min_tokens) if pad else num_logits
        tokens = np.zeros(size_T, np.int64)
        positions = np.zeros(size_T, np.int64)
        slots = np.full(size_T, SCRATCH_BLOCK * block_size, np.int64)
        query_start = np.full(size_R + 1, num_tokens, np.int32)
        context_lens = np.zeros(size_R, np.int32)
        block_table = np.zeros((size_R, max_blocks), np.int32)
        logit_rows = np.zeros(size_L, np.int64)
        at = at_logits = 0
        for r, row in enumerate(step.rows):
            n = len(row.tokens)
            where = np.arange(row.start, row.start + n)
            blocks = np.asarray(row.blocks, np.int64)
            tokens[at : at + n] = row.tokens
            positions[at : at + n] = where
            slots[at : at + n] = blocks[where // block_size] * block_size + where % block_size
            query_start[r] = at
            context_lens[r] = row.context_len
            block_table[r, : len(blocks)] = blocks
            logit_rows[at_logits : at_logits + row.num_logits] = np.arange(at + n - row.num_logits, at + n)
            at += n
            at_logits += row.num_logits

        def place(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            tokens_T=place(tokens),
            positions_T=place(positions),
            slots_T=place(slots),
            query_start=place(query_start),
            context_lens_R=place(context_lens),
            block_table_RB=place(block_table),
            logit_rows_L=place(logit_rows),
            num_logits=num_logits,
        )
