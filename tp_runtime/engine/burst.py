"""Bursts: several decoding steps of greedy rows in a row, the device feeding each token to the next step.

A step that waits for the host costs the host's time on top of its own. Where every running row is greedy
and past its prompt, nothing has to be decided between steps but when to stop; so rank 0 asks all ranks for
a few steps at once and takes the tokens as they come. A row that ends meanwhile has run some steps for
nothing, in blocks that were its own anyway; its later tokens are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from .channel import Channel, Operation
from .runner import ModelRunner
from .sampling import refuse_nan
from .sequence import Sequence
from .step import Row, Step

MOST_ROWS = 16


def burst_length(runner: ModelRunner, rows: Seq[tuple[Sequence, tuple[int, ...]]]) -> int:
    """Steps that all these rows may run in one burst; 0 where they may not."""
    most = runner.burst_steps
    if not most or not 0 < len(rows) <= MOST_ROWS:
        return 0
    for sequence, tokens in rows:
        decodes = len(tokens) == 1 and sequence.num_cached + 1 == sequence.num_tokens
        params = sequence.params
        if not decodes or not params.plain_greedy or params.logprobs is not None:
            return 0
        most = min(most, params.max_new_tokens - len(sequence.output))
    return most


def refuse_no_token(token: int, vocab_size: int, position: int) -> None:
    """Raise CheckpointError for a choice of the device that is no token: all of its logits were NaN."""
    refuse_nan(0.0 if 0 <= token < vocab_size else math.nan, position)


def pack_burst(step: Step, steps: int) -> np.ndarray:
    """int32 words of a burst: how many steps, and the first of them."""
    return np.concatenate([np.asarray([steps], np.int32), step.pack()])


def unpack_burst(words: np.ndarray) -> tuple[Step, int]:
    """The inverse of pack_burst."""
    return Step.unpack(words[1:]), int(words[0])


def decode_burst(
    runner: ModelRunner,
    channel: Channel,
    rows: Seq[tuple[Sequence, tuple[int, ...]]],
    tell: Callable[[Sequence, str], None],
) -> bool:
    """Rank 0: run a burst of these rows, if they are fit for one; whether they were.

    tell: called with a row and the text that became certain. Raises CheckpointError where logits were NaN.
    """
    steps = burst_length(runner, rows)
    if steps < 1:
        return False
    step = Step(tuple(Row(tokens, row.num_cached, tuple(row.blocks), 1) for row, tokens in rows))
    with channel.announced(Operation.BURST, pack_burst(step, steps)):
        runner.start_burst(step, steps)
    for tokens in runner.burst_tokens(len(rows), steps):
        for (row, _), token in zip(rows, tokens, strict=True):
            if row.finish_reason is None:
                refuse_no_token(token, runner.model.config.vocab_size, row.num_tokens)
                row.num_cached += 1
                piece = row.accept(token)
                if piece:
                    tell(row, piece)
        if all(row.finish_reason is not None for row, _ in rows):
            break
    return True
