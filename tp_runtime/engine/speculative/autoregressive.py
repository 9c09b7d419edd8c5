"""Drafting with a model, token by token: rows catch up on what they have not seen, then go on alone.

Each step takes from every row what it has to run: several tokens after a pass in which all of a draft stood,
chunks of a prompt at first, else the token it drafted last. Rows that want fewer tokens leave earlier.

Where the runner can feed its own choices to itself (a GPU; engine/burst.py), greedy rows that have caught up
go on in one burst: the host reads their tokens instead of waiting for the logits of each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..burst import MOST_ROWS, refuse_no_token
from ..sequence import Sequence as Answer
from ..step import Row, Step
from .interface import Offer
from .verify import draw_draft

Burst = Callable[[Step, int], Iterable[list[int]]]


@dataclass
class DraftRow:
    """One row on its way to `wanted` drafted tokens.

    cached: tokens whose keys and values the draft holds. blocks: where, enough for all that it will run.
    """

    answer: Answer
    wanted: int
    cached: int
    blocks: list[int]
    drafted: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Tokens of prompt, answer and draft."""
        return self.answer.num_tokens + len(self.drafted)

    def pending(self, limit: int) -> tuple[int, ...]:
        """The next tokens to run, at most `limit`; none once the draft is complete."""
        if len(self.drafted) == self.wanted:
            return ()
        prompt, output = self.answer.prompt, self.answer.output
        if self.cached < len(prompt):
            return prompt[self.cached : self.cached + limit]
        return tuple((output + self.drafted)[self.cached - len(prompt) :][:limit])

    def take(self, logits_V: Tensor, vocab_size: int) -> None:
        """Draw the next drafted token."""
        before = self.answer.output + self.drafted
        token, probs_V = draw_draft(logits_V, self.answer.params, self.answer.prompt, before, vocab_size)
        self.drafted.append(token)
        if probs_V is not None:
            self.probs.append(probs_V)

    def offer(self) -> Offer:
        return Offer(tuple(self.drafted), tuple(self.probs) if self.probs else None)


def draft_rows(
    rows: Sequence[DraftRow],
    execute: Callable[[Step], Tensor],
    *,
    max_tokens: int,
    vocab_size: int,
    clock: Callable[[], float],
    burst: Burst | None = None,
) -> list[tuple[int, float]]:
    """Run steps until every row has drafted what it wants; the tokens and seconds of each.

    execute: runs a step of the draft and returns its logits [L, V]. max_tokens: most tokens of a step.
    vocab_size: of the target. clock: seconds. burst: runs a step of one token a row and those that its
    likeliest tokens begin, at most so many in all, and hands out the tokens of each, one a row; None: none.
    """
    steps: list[tuple[int, float]] = []
    while True:
        began = clock()
        room, running, described = max_tokens, [], []
        for row in rows:
            tokens = row.pending(room)
            if not tokens:
                continue
            room -= len(tokens)
            last = row.cached + len(tokens) == row.known
            described.append(Row(tokens, row.cached, tuple(row.blocks), int(last)))
            running.append(row)
        if not running:
            return steps
        step = Step(tuple(described))
        together = 0 if burst is None else _together(running, step)
        if burst is not None and together:
            done = _take_burst(running, burst(step, together), vocab_size)
            steps += [(len(running), (clock() - began) / done)] * done
            continue
        logits_LV = execute(step)
        ready = []
        for row, part in zip(running, described, strict=True):
            row.cached += len(part.tokens)
            if part.num_logits:
                ready.append(row)
        for row, logits_V in zip(ready, logits_LV, strict=True):
            row.take(logits_V, vocab_size)
        steps.append((max_tokens - room, clock() - began))


def _together(rows: Sequence[DraftRow], step: Step) -> int:
    """Steps that all these rows may run in one burst; 0 where they may not."""
    if step.num_tokens > len(rows) or len(rows) > MOST_ROWS or step.num_logits < len(rows):
        return 0
    if not all(row.answer.params.plain_greedy for row in rows):
        return 0
    return min(row.wanted - len(row.drafted) for row in rows)


def _take_burst(rows: Sequence[DraftRow], chosen: Iterable[list[int]], vocab_size: int) -> int:
    """Take the tokens of a burst; how many steps it had."""
    steps = 0
    for tokens in chosen:
        for row, token in zip(rows, tokens, strict=True):
            refuse_no_token(token, vocab_size, row.known)
            row.cached += 1
            row.drafted.append(token)
        steps += 1
    return steps
