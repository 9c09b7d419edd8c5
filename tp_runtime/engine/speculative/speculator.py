"""Speculation inside the engine's loop: offers before a pass, decisions in it, figures after it.

Rank 0 runs all of it; the other ranks only follow the steps that a draft announces. A pass in which some row
still reads its prompt is not counted: its time says nothing about decoding.

Rows that decode bring at most `step_tokens` tokens to a pass, all together: beyond 16 a CPU has other
kernels, which round otherwise and cost more, and a GPU no captured step. Beside rows that read prompts they
take at most half of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..runner import ModelRunner
from ..sequence import Sequence as Answer
from .adaptive import Adaptive, Candidate, deal
from .forced import ForcedAcceptance
from .interface import NOTHING, Drafter, Offer
from .kind import DraftPlan
from .report import Pass, SpeculationReport
from .timing import TARGET_SIZES, settle, time_steps
from .verify import decide


class Speculator:
    """Drafts for the rows of one engine.

    plan: the draft that was asked for. most: most tokens drafted for a row in a pass. adaptive: False
    drafts `most` where it can. max_tokens: most tokens of a step. exact_tokens: most that rows which decode
    bring to a step together; beyond it other code runs them (None: max_tokens). device: of the target.
    forced, an attribute: None but in a benchmark, which lets drafts of greedy rows stand by a draw.
    """

    def __init__(
        self,
        drafter: Drafter,
        plan: DraftPlan,
        *,
        most: int,
        adaptive: bool,
        max_tokens: int,
        exact_tokens: int | None,
        device: str,
    ) -> None:
        self.drafter, self.plan, self.most, self.device = drafter, plan, most, device
        self.max_tokens = max_tokens
        self.step_tokens = max_tokens if exact_tokens is None else min(max_tokens, exact_tokens)
        self._chooser = Adaptive(drafter.costs_steps, drafter.priors)
        self._adaptive = adaptive
        self._offers: dict[int, Offer] = {}
        self._grades: dict[int, int] = {}
        self._stood: dict[int, tuple[int, int]] = {}
        self._before: dict[int, int] = {}
        self.report = SpeculationReport(plan.name, most)
        self.forced: ForcedAcceptance | None = None
        self._began = self._step_began = self._draft_s = self._verify_s = self._joining_s = 0.0

    def check_prompt(self, num_tokens: int) -> None:
        """Raise RequestError for a prompt that the draft cannot hold."""
        self.plan.check_prompt(num_tokens)

    def begin(self) -> None:
        """A generate call starts: its figures are its own, what was learnt stays."""
        self.report = SpeculationReport(self.plan.name, self.most)
        self._chooser.begin()

    def warm_up(self, target: ModelRunner) -> None:
        """Compile what drafting runs, and time steps of draft and target. Every rank calls it."""
        timed = self.drafter.warm_up()
        if not self._adaptive:
            return
        for size, seconds in timed.items():
            self._chooser.draft.seed(size, seconds)
        for size, seconds in time_steps(target, TARGET_SIZES, self.drafter.clock).items():
            self._chooser.target.seed(size, seconds)

    def budget(self, decoding: int, running: int) -> int:
        """Tokens that may be drafted in all: `decoding` of the `running` rows decode, others read prompts."""
        most = self.step_tokens if decoding == running else min(self.step_tokens, self.max_tokens // 2)
        return max(0, most - decoding)

    def propose(self, running: Sequence[Answer]) -> None:
        """Draft for the rows that decode; what is drafted becomes their next tokens."""
        self._began = self.drafter.clock()
        self._offers.clear()
        self._stood.clear()
        self.drafter.steps = ()
        candidates, rows, decoding = [], [], 0
        for answer in running:
            answer.draft = ()
            left = answer.params.max_new_tokens - len(answer.output)
            limit = min(self.most, left - 1)
            decoding += bool(answer.output)
            if not answer.output or limit < 1:
                continue
            grade = self.drafter.grade(answer)
            if grade is not None:
                self._grades[id(answer)] = grade
                behind = self.drafter.behind(answer)
                candidates.append(Candidate(id(answer), grade, limit, behind, left))
                rows.append(answer)
        budget = self.budget(decoding, len(running))
        if self._adaptive:
            counts = self._chooser.choose(candidates, decoding, budget)
        else:
            counts = deal([candidate.limit for candidate in candidates], budget)
        wanted = [(answer, count) for answer, count in zip(rows, counts, strict=True) if count]
        if wanted:
            for (answer, _), offer in zip(wanted, self.drafter.draft(wanted), strict=True):
                answer.draft = offer.tokens
                self._offers[id(answer)] = offer
        self._draft_s = self.drafter.clock() - self._began
        self._joining_s = self._joined(len(wanted))

    def _joined(self, rows: int) -> float:
        """Seconds of drafting that went into reading what these rows were behind.

        At most two tokens a row are a draft's ordinary step: the last one drafted may have stood.
        """
        ordinary = self._chooser.draft.seconds(rows) or 0.0
        return sum(
            max(0.0, seconds - ordinary) for tokens, seconds in self.drafter.steps if tokens > 2 * rows
        )

    def begin_step(self) -> None:
        """The target's step begins."""
        self._step_began = self.drafter.clock()

    def end_step(self) -> None:
        """It has returned its logits. A GPU is waited for: before that it has only been told what to do."""
        settle(self.device)
        self._verify_s = self.drafter.clock() - self._step_began

    def decide(self, answer: Answer, logits_NV: Tensor) -> tuple[int, ...]:
        """The row's new tokens, from the target's logits behind its last known and its drafted tokens."""
        offer = self._offers.get(id(answer), NOTHING)
        self._before[id(answer)] = len(answer.output)
        if self.forced is None:
            tokens = decide(logits_NV, offer, answer.params, answer.prompt, answer.output)
        else:
            assert answer.params.plain_greedy, "acceptance is forced on greedy rows alone"
            tokens = self.forced.decide(logits_NV, offer)
        self._stood[id(answer)] = (logits_NV.shape[0] - 1, len(tokens) - 1)
        return tokens

    def end_pass(self, rows: Sequence[tuple[Answer, tuple[int, ...]]]) -> None:
        """All rows have taken their tokens. rows: with the tokens each ran."""
        size = sum(len(tokens) for _, tokens in rows)
        decoding = all(id(a) in self._stood and len(t) == 1 + self._stood[id(a)][0] for a, t in rows)
        for answer, _ in rows:
            offered, stood = self._stood.get(id(answer), (0, 0))
            if offered:
                self._chooser.see(id(answer), self._grades[id(answer)], offered, stood)
            self.drafter.rollback(answer)
        if not decoding:
            return
        for tokens_run, seconds in self.drafter.steps:
            self._chooser.draft.add(tokens_run, seconds)
        self._chooser.target.add(size, self._verify_s, len(rows))
        taken = [self._taken(answer) for answer, _ in rows]
        new_tokens, drafting_s = sum(new for _, _, new in taken), self._draft_s - self._joining_s
        self._chooser.book(len(rows), size, drafting_s, new_tokens, self._joining_s)
        total_s = self.drafter.clock() - self._began
        self.report.add(Pass(tuple(taken), self._draft_s, self._verify_s, total_s))

    def _taken(self, answer: Answer) -> tuple[int, int, int]:
        """Tokens offered, tokens that stood, tokens taken (an end token may have cut them short)."""
        return (*self._stood[id(answer)], len(answer.output) - self._before[id(answer)])

    def release(self, answer: Answer) -> None:
        """The row has ended, whatever ended it. Nothing of it stays: a later row may have its id."""
        self.drafter.release(answer)
        self._chooser.forget(id(answer))
        kept: tuple[dict[int, Any], ...] = (self._offers, self._grades, self._stood, self._before)
        for of_rows in kept:
            of_rows.pop(id(answer), None)
