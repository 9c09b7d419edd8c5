"""A draft that is a model of its own: another checkpoint, or the target's at fewer bits.

It has its own cache and block pool, on all ranks (split like the target) or whole on rank 0. A row's blocks
grow with what the draft runs and go back to the pool when tokens fall: its cache is never longer than what
the target has confirmed plus one draft. A row that outgrows the draft's context gets no more offers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..kv_blocks import BlockPool
from ..runner import ModelRunner
from ..sequence import Sequence as Answer
from ..step import Step
from .autoregressive import DraftRow, draft_rows
from .interface import Announce, Drafter, Offer
from .timing import DRAFT_SIZES, time_steps


@dataclass
class _Held:
    """What the draft's cache holds of a row. checked: tokens found to be in the draft's vocabulary."""

    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    checked: int = 0
    foreign: bool = False


class ModelDraft(Drafter):
    """Drafts with `runner`'s model.

    runner: None on ranks that have no part of the draft. context: tokens a row may hold in it. draft_vocab,
    vocab_size: rows of the draft's and of the target's embedding. announce: runs a step on all ranks;
    None: the draft is whole on rank 0.
    """

    def __init__(
        self,
        runner: ModelRunner | None,
        *,
        context: int,
        draft_vocab: int,
        vocab_size: int,
        announce: Announce | None,
    ) -> None:
        self.runner, self.context = runner, context
        self.draft_vocab, self.vocab_size = draft_vocab, vocab_size
        self._announce = announce
        self._held: dict[int, _Held] = {}
        if runner is not None:
            self.pool = BlockPool(runner.cache.num_blocks, runner.cache.shape.block_size)

    def grade(self, sequence: Answer) -> int | None:
        """0; None for a row at the end of the draft's context, or with tokens the draft does not have."""
        held = self._held.setdefault(id(sequence), _Held())
        if held.checked < len(sequence.prompt):
            held.foreign = any(token >= self.draft_vocab for token in sequence.prompt)
            held.checked = len(sequence.prompt)
        new = sequence.output[held.checked - len(sequence.prompt) :]
        held.foreign = held.foreign or any(token >= self.draft_vocab for token in new)
        held.checked = sequence.num_tokens
        return None if held.foreign or sequence.num_tokens >= self.context else 0

    def behind(self, sequence: Answer) -> int:
        """What prompt and answer have beyond its cache, but the last token."""
        return sequence.num_tokens - 1 - self._held[id(sequence)].cached

    def draft(self, rows: Sequence[tuple[Answer, int]]) -> list[Offer]:
        assert self.runner is not None, "rank 0 has every draft"
        jobs: list[DraftRow | None] = []
        for answer, wanted in rows:
            held = self._held[id(answer)]
            wanted = min(wanted, self.context - answer.num_tokens)
            will_run = answer.num_tokens + wanted - 1
            if self.pool.blocks_for(will_run) - len(held.blocks) > self.pool.num_free:
                jobs.append(None)  # a pool that --cache-bytes made small; the row decodes without a draft
                continue
            self.pool.resize(held.blocks, will_run)
            jobs.append(DraftRow(answer, wanted, held.cached, held.blocks))
        running = [job for job in jobs if job is not None]
        self.steps = draft_rows(
            running,
            self._run,
            max_tokens=self.runner.max_tokens,
            vocab_size=self.vocab_size,
            clock=self.clock,
            burst=self._burst if self._bursts else None,
        )
        for job in running:
            self._held[id(job.answer)].cached = job.cached
        return [Offer() if job is None else job.offer() for job in jobs]

    def rollback(self, sequence: Answer) -> None:
        held = self._held.get(id(sequence))
        if held is not None:
            # The token drawn last was never run, and what fell lies behind it.
            held.cached = min(held.cached, sequence.num_tokens - 1)
            self.pool.resize(held.blocks, held.cached)

    def release(self, sequence: Answer) -> None:
        held = self._held.pop(id(sequence), None)
        if held is not None:
            self.pool.resize(held.blocks, 0)

    def warm_up(self) -> Mapping[int, float]:
        if self.runner is None:
            return {}
        self.runner.warm_up()
        return time_steps(self.runner, DRAFT_SIZES, self.clock)

    def follow(self, step: Step, steps: int) -> None:
        assert self.runner is not None, "this rank has no part of the draft"
        if steps:
            self.runner.start_burst(step, steps)
        else:
            self.runner.execute(step)

    @property
    def _bursts(self) -> bool:
        """A burst chooses among all of the draft's tokens, so the target must have them all."""
        return self.runner is not None and self.runner.burst_steps > 0 and self.draft_vocab <= self.vocab_size

    def _burst(self, step: Step, wanted: int) -> Iterable[list[int]]:
        runner = self.runner
        assert runner is not None, "rank 0 has every draft"
        steps = min(wanted, runner.burst_steps)
        if self._announce is None:
            runner.start_burst(step, steps)
        else:
            self._announce(step, lambda first: runner.start_burst(first, steps), steps)
        return runner.burst_tokens(len(step.rows), steps)

    def _run(self, step: Step) -> Tensor:
        assert self.runner is not None
        return (
            self.runner.execute(step) if self._announce is None else self._announce(step, self.runner.execute)
        )
