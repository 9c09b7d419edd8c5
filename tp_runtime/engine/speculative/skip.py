"""A draft from some of the target's own layers, on the target's weights and in the target's cache.

The first layers and the last run, those in the middle are left out. Keys and values of confirmed tokens are
the target's own; those of drafted tokens are written where verification will write them again on every
layer, and nobody reads them later. So there is nothing to load, to roll back or to release, and a drafted
token costs the share of layers that run, plus the head. After: Zhang et al., Draft & Verify, 2023
(https://arxiv.org/abs/2309.08168).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..runner import ModelRunner
from ..sequence import Sequence as Answer
from ..step import Step
from .autoregressive import DraftRow, draft_rows
from .interface import Announce, Drafter, Offer
from .timing import DRAFT_SIZES, time_steps


def kept_layers(num_layers: int, skipped: int) -> tuple[int, ...]:
    """The layers that run: as many first as last ones, one more first where the number is odd."""
    kept = num_layers - skipped
    assert 0 < kept < num_layers, f"{skipped} of {num_layers} layers cannot be skipped"
    first = -(-kept // 2)
    return (*range(first), *range(num_layers - (kept - first), num_layers))


class SkipDraft(Drafter):
    """Drafts with `layers` of the target's runner. announce: runs a step on all ranks."""

    def __init__(
        self, runner: ModelRunner, layers: tuple[int, ...], *, vocab_size: int, announce: Announce
    ) -> None:
        self.runner, self.layers, self.vocab_size = runner, layers, vocab_size
        self._announce = announce

    def grade(self, sequence: Answer) -> int | None:
        """Always 0."""
        return 0

    def draft(self, rows: Sequence[tuple[Answer, int]]) -> list[Offer]:
        jobs = [DraftRow(answer, wanted, answer.num_cached, answer.blocks) for answer, wanted in rows]
        self.steps = draft_rows(
            jobs,
            lambda step: self._announce(step, self._execute),
            max_tokens=self.runner.max_tokens,
            vocab_size=self.vocab_size,
            clock=self.clock,
        )
        return [job.offer() for job in jobs]

    def warm_up(self) -> Mapping[int, float]:
        return time_steps(self.runner, DRAFT_SIZES, self.clock, self.layers)

    def follow(self, step: Step, steps: int) -> None:
        assert not steps, "some of the layers run one step at a time"
        self._execute(step)

    def _execute(self, step: Step) -> Tensor:
        return self.runner.execute(step, self.layers)
