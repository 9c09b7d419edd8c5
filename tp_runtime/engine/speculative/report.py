"""What speculation brought and what it cost, pass by pass. No torch.

A pass is one step of the target in which every row decodes. Times are seconds of rank 0's clock: drafting;
the target's step with its announcement and gathering; and the rest (choosing, sampling, text).

Speed-up is tokens a second against the same rows without a draft. Measured: each row's new tokens times what
a pass without a draft cost in this very run, over the time taken; there must have been such passes.
Predicted, for acceptance a, drafts of k tokens, c a draft step and v a verification, both in passes without
a draft: (1 - a^(k+1)) / ((1 - a)(k c + v)), sums over passes of both halves where k varies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .costs import StepCosts


@dataclass(frozen=True)
class Pass:
    """One pass. rows: (tokens offered, tokens of them that stood, tokens taken) of each."""

    rows: tuple[tuple[int, int, int], ...]
    draft_s: float
    verify_s: float
    total_s: float

    @property
    def drafted(self) -> int:
        """Tokens offered in all rows."""
        return sum(offered for offered, _, _ in self.rows)


@dataclass
class SpeculationReport:
    """Sums over the passes of a run. draft: as the user named it. most: largest k allowed."""

    draft: str
    most: int
    passes: list[Pass] = field(default_factory=list)

    def add(self, done: Pass) -> None:
        self.passes.append(done)

    def acceptance_by_position(self) -> list[float]:
        """Of the tokens drafted at each place in a draft, the share that stood."""
        rows = [row for done in self.passes for row in done.rows]
        found = []
        for place in range(max((offered for offered, _, _ in rows), default=0)):
            offers = [stood > place for offered, stood, _ in rows if offered > place]
            found.append(sum(offers) / len(offers))
        return found

    def acceptance(self) -> float | None:
        """The probability that a drafted token stands, given that those before it stood."""
        rows = [row for done in self.passes for row in done.rows]
        stood = sum(row[1] for row in rows)
        fell = sum(stood < offered for offered, stood, _ in rows)
        return stood / (stood + fell) if stood + fell else None

    def speedups(self, plain_s: float | None = None) -> tuple[float | None, float | None]:
        """(measured, predicted); None where there is no pass without a draft to compare with.

        plain_s: seconds of such a pass, of any number of rows, where it was measured apart; None: those of
        this run.
        """
        plain, rate = StepCosts(), self.acceptance() or 0.0
        for done in self.passes:
            if plain_s is not None:
                plain.add(len(done.rows), plain_s)
            elif not done.drafted:
                plain.add(len(done.rows), done.total_s)
        saved = taken = expected = cost = 0.0
        for done in self.passes:
            one = plain.seconds(len(done.rows))
            if one is None:
                return None, None
            share = one / len(done.rows)
            saved += share * sum(new for _, _, new in done.rows)
            taken += done.total_s
            expected += share * sum(rate**i for offered, _, _ in done.rows for i in range(offered + 1))
            cost += done.draft_s + done.verify_s if done.drafted else one
        return (saved / taken, expected / cost) if taken and cost else (None, None)

    def to_dict(self) -> dict[str, Any]:
        """The figures of --json. Times are means a pass, in milliseconds."""
        count = len(self.passes)
        rows = [row for done in self.passes for row in done.rows]
        measured, predicted = self.speedups()

        def mean_ms(total_s: float) -> float | None:
            return 1000 * total_s / count if count else None

        draft_s, verify_s = sum(p.draft_s for p in self.passes), sum(p.verify_s for p in self.passes)
        return {
            "draft": self.draft,
            "draft_tokens": self.most,
            "target_passes": count,
            "drafted_tokens": sum(offered for offered, _, _ in rows),
            "accepted_tokens": sum(stood for _, stood, _ in rows),
            "acceptance": self.acceptance(),
            "acceptance_by_position": self.acceptance_by_position(),
            "tokens_per_target_pass": sum(new for _, _, new in rows) / len(rows) if rows else None,
            "draft_ms": mean_ms(draft_s),
            "verify_ms": mean_ms(verify_s),
            "overhead_ms": mean_ms(sum(p.total_s for p in self.passes) - draft_s - verify_s),
            "speedup_measured": measured,
            "speedup_predicted": predicted,
        }


def speculation_words(figures: dict[str, Any]) -> str:
    """The figures for people, one part of the line of figures."""
    tokens, rate = figures["tokens_per_target_pass"], figures["acceptance"]
    if tokens is None:
        return f"draft {figures['draft']}: no pass to draft for"
    stood = "nothing drafted" if rate is None else f"{rate:.0%} of drafted tokens stood"
    speed = figures["speedup_measured"]
    times = "" if speed is None else f", {speed:.2f} times the speed without"
    return f"draft {figures['draft']}: {stood}, {tokens:.2f} tokens a pass{times}"
