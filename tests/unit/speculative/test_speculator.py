"""The engine's loop around a draft, with made-up steps and a clock that moves as they say.

The target counts upwards, and so does the draft; a token costs a step of 0.3 and a prompt 0.02 a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tp_runtime.config import SamplingParams
from tp_runtime.engine.batch import Batch
from tp_runtime.engine.kv_blocks import BlockPool
from tp_runtime.engine.sequence import Sequence
from tp_runtime.engine.speculative.interface import Drafter, Offer
from tp_runtime.engine.speculative.kind import DraftPlan
from tp_runtime.engine.speculative.speculator import Speculator
from tp_runtime.engine.tokenizing import NoText

VOCAB = 600


class Counting(Drafter):
    """Offers the next numbers."""

    def __init__(self) -> None:
        self.now, self.read = 0.0, 0
        self.clock = lambda: self.now  # type: ignore[misc]

    def grade(self, sequence: Sequence) -> int | None:
        return 0

    def behind(self, sequence: Sequence) -> int:
        return sequence.num_tokens - 1 - self.read

    def draft(self, rows: Seq[tuple[Sequence, int]]) -> list[Offer]:
        ((answer, count),) = rows
        steps = []
        for _ in range(count):
            tokens = max(1, answer.num_tokens - self.read)
            steps.append((tokens, 0.3 + 0.02 * (tokens - 1)))
            self.read = max(self.read, answer.num_tokens)
        self.steps = steps
        self.now += sum(seconds for _, seconds in steps)
        last = answer.output[-1]
        return [Offer(tuple((last + 1 + i) % VOCAB for i in range(count)))]

    def warm_up(self) -> Mapping[int, float]:
        return {1: 0.3, 64: 0.3 + 0.02 * 63}


def made(drafter: Counting, **settings: Any) -> Speculator:
    plan = DraftPlan("counting", "model", 1024)
    common = {"most": 7, "adaptive": True, "max_tokens": 512, "exact_tokens": 16, "device": "cpu"}
    return Speculator(drafter, plan, **{**common, **settings})


def run_pass(
    speculator: Speculator, drafter: Counting, batch: Batch
) -> list[tuple[Sequence, tuple[int, ...]]]:
    """One pass of the engine; a step of n tokens takes 1 + 0.1 (n - 1)."""
    speculator.propose(batch.running)
    rows = batch.next_rows()
    speculator.begin_step()
    drafter.now += 1 + 0.1 * (sum(len(tokens) for _, tokens in rows) - 1)
    speculator.end_step()
    for answer, tokens in rows:
        wanted = answer.num_cached + len(tokens) - answer.num_tokens + 1
        answer.num_cached += len(tokens)
        if wanted > 0:
            logits = torch.zeros(wanted, VOCAB)
            for row, token in enumerate(tokens[-wanted:]):
                logits[row, (token + 1) % VOCAB] = 1.0
            for token in speculator.decide(answer, logits):
                answer.accept(token)
                if answer.finish_reason is not None:
                    break
            answer.draft = ()
            answer.num_cached = answer.num_tokens - 1
    speculator.end_pass(rows)
    return rows


def make_batch(prompts: list[int], new_tokens: int, max_tokens: int = 512) -> Batch:
    batch = Batch(BlockPool(400, 16), max_rows=len(prompts), max_tokens=max_tokens)
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    for length in prompts:
        batch.add(Sequence(tuple(range(1, 1 + length)), params, frozenset(), NoText()))
    batch.admit()
    return batch


def test_a_draft_of_a_model_is_used_behind_a_long_prompt() -> None:
    """Its prefill of 512 tokens takes ten passes and is no reason to stop."""
    drafter = Counting()
    speculator = made(drafter)
    speculator.warm_up(SimpleNamespace(max_tokens=0))  # type: ignore[arg-type]
    for size in (1, 16):
        speculator._chooser.target.seed(size, 1 + 0.1 * (size - 1))
    batch = make_batch([512], 256)
    while any(answer.finish_reason is None for answer in batch.running):
        run_pass(speculator, drafter, batch)
    figures = speculator.report.to_dict()
    print(figures)
    assert batch.running[0].output == [(513 + i) % VOCAB for i in range(256)]
    assert figures["drafted_tokens"] > 128 and figures["acceptance"] > 0.99


@pytest.mark.parametrize(("max_tokens", "rows"), [(512, 3), (512, 1), (8, 3), (4, 4)])
def test_no_row_starves_and_no_step_is_too_long(max_tokens: int, rows: int) -> None:
    """k = 15 for every row: rows that decode have 16 tokens together, each at least one, prompts a share."""

    class Many(Counting):
        def draft(self, wanted: Seq[tuple[Sequence, int]]) -> list[Offer]:
            return [Counting.draft(self, [one])[0] for one in wanted]

    drafter = Many()
    speculator = made(drafter, most=15, adaptive=False, max_tokens=max_tokens)
    batch = make_batch([3] * (rows - 1) + [40], 60, max_tokens)
    drafted = False
    for _ in range(200):
        decoding = [a for a in batch.running if a.output]
        ran = run_pass(speculator, drafter, batch)
        assert len(ran) == len(batch.running) or len(decoding) < len(batch.running), "a row did not run"
        assert all(any(answer is one for one, _ in ran) for answer in decoding), "a row was starved"
        if len(decoding) == rows:
            assert sum(len(tokens) for _, tokens in ran) <= 16
        else:
            assert any(answer not in decoding for answer, _ in ran), "prompts were starved"
        drafted |= any(len(tokens) > 1 for answer, tokens in ran if answer in decoding)
        batch.retire()
        if not batch.running:
            break
        rows = len(batch.running)
    assert not batch.running and (drafted or max_tokens == 4)
