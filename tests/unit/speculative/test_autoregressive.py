"""Drafting in bursts offers what drafting step by step offers, in fewer waits, and no row runs too far.

The draft is a rule: after token t at position p comes (3 t + p) % 97. Steps are checked as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tp_runtime.config import SamplingParams
from tp_runtime.engine.burst import decode_burst
from tp_runtime.engine.sequence import Sequence
from tp_runtime.engine.speculative.autoregressive import DraftRow, draft_rows
from tp_runtime.engine.step import Step
from tp_runtime.engine.tokenizing import NoText
from tp_runtime.errors import CheckpointError

VOCAB = 97


def following(token: int, position: int) -> int:
    return (3 * token + position) % VOCAB


class Model:
    """What a runner would do, and how often the host waited for it."""

    def __init__(self) -> None:
        self.waits, self.bursts = 0, []

    def execute(self, step: Step) -> Tensor:
        self.waits += 1
        rows = [
            torch.nn.functional.one_hot(torch.tensor(following(row.tokens[-1], row.context_len)), VOCAB)
            for row in step.rows
            if row.num_logits
        ]
        return torch.stack(rows).float() if rows else torch.empty(0, VOCAB)

    def burst(self, step: Step, steps: int) -> Iterator[list[int]]:
        assert all(len(row.tokens) == row.num_logits == 1 for row in step.rows)
        assert all(row.start + steps <= 16 * len(row.blocks) for row in step.rows), "beyond its blocks"
        self.waits += 1
        self.bursts.append(steps)
        tokens = [row.tokens[0] for row in step.rows]
        for ahead in range(steps):
            tokens = [following(t, row.start + 1 + ahead) for t, row in zip(tokens, step.rows, strict=True)]
            yield tokens


def made(behind: int, wanted: int, **params: object) -> DraftRow:
    """A row of ten tokens whose last 1 + behind the draft has not run."""
    answer = Sequence((1, 2, 3, 4, 5), SamplingParams(**params), frozenset(), NoText())  # type: ignore[arg-type]
    answer.output += [6, 7, 8, 9, 10]
    return DraftRow(answer, wanted, 9 - behind, [1])


@pytest.mark.parametrize(
    ("wanted", "waits", "bursts"),
    [
        ([(0, 7)], 1, [7]),  # the usual: some token fell
        ([(1, 7)], 2, [6]),  # all stood, so the last one drafted must be run first
        ([(9, 3)], 3, [2]),  # the first draft reads the prompt, then the answer so far
        ([(0, 4), (0, 2)], 2, [2, 2]),
        ([(0, 3), (1, 3)], 2, [2]),
        ([(0, 1)], 1, [1]),
    ],
)
def test_bursts(wanted: list[tuple[int, int]], waits: int, bursts: list[int]) -> None:
    found = []
    for with_bursts in (False, True):
        model, now = Model(), count()
        rows = [made(*each) for each in wanted]
        burst = model.burst if with_bursts else None
        steps = draft_rows(
            rows, model.execute, max_tokens=64, vocab_size=VOCAB, clock=lambda n=now: next(n), burst=burst
        )
        for row, (_, number) in zip(rows, wanted, strict=True):
            assert len(row.drafted) == number
            assert row.cached == row.known - 1, "all but the token drawn last has run"
        found.append(([row.drafted for row in rows], [tokens for tokens, _ in steps]))
        if with_bursts:
            assert (model.waits, model.bursts) == (waits, bursts)
    assert found[0] == found[1]


def test_rows_that_are_drawn_take_no_burst() -> None:
    model = Model()
    rows = [made(0, 3), made(0, 3, temperature=0.8)]
    draft_rows(rows, model.execute, max_tokens=64, vocab_size=VOCAB, clock=lambda: 0.0, burst=model.burst)
    assert not model.bursts and model.waits == 3


@pytest.mark.parametrize("nothing", [0x7FFFFFFF, VOCAB, -1])
def test_a_device_that_finds_no_number_says_so(nothing: int) -> None:
    """Of logits that are all NaN a burst has no likeliest token, in the draft as in the target."""

    class Overflowing(Model):
        burst_steps, model = 4, SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB))

        def burst(self, step: Step, steps: int) -> Iterator[list[int]]:
            yield from [[7], [nothing]]

        def start_burst(self, step: Step, steps: int) -> None:
            assert steps == 4

        def burst_tokens(self, rows: int, steps: int) -> Iterator[list[int]]:
            return self.burst(Step(()), steps)

    model, row = Overflowing(), made(0, 4)
    with pytest.raises(CheckpointError, match="logits of position 11 are not numbers"):
        draft_rows(
            [row], model.execute, max_tokens=512, vocab_size=VOCAB, clock=count().__next__, burst=model.burst
        )
    told: list[str] = []
    with pytest.raises(CheckpointError, match="logits of position 11 are not numbers"):
        row.answer.num_cached = 9
        channel = SimpleNamespace(announced=lambda *_: nullcontext())
        decode_burst(model, channel, [(row.answer, (10,))], lambda _, text: told.append(text))  # type: ignore[arg-type]
    assert row.answer.output[-1] == 7 and not told
