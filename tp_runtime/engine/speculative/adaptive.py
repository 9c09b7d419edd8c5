"""How many tokens to draft for each row, so that tokens a second are most; none where drafting loses.

If each drafted token stands with probability a, given that those before it stood, k of them bring
1 + a + ... + a^k tokens. A pass costs target(rows + sum of k) and, with a draft that is a model, one draft
step for each k, all as measured (costs.py). Tokens are added one at a time where the next is likeliest to
stand, and the best point on that path is taken: costs rise in steps, so the first losing token may be
followed by winning ones.

a is learnt for each row and grade of the draft, beginning with what the grade showed in other rows, and old
passes fade. Where the best is none, a short draft is tried now and then, ever more rarely while it fails.

The ledger bounds what all of this may cost. Every drafted pass is booked: what its tokens would have cost
without a draft, minus what it cost. While the balance is below -ALLOWANCE of the time run so far (plus a
start of FIRST_PASSES passes), nothing is drafted. Gains are not saved up, so a good stretch does not pay
for a bad one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .costs import StepCosts

ALLOWANCE = 0.03
FIRST_PASSES = 100  # a start for the ledger, in passes: the allowance of a run that is this long
_LEARN_PLAIN = 2  # passes without a draft before the first with one
_PLAIN_AGAIN = 64  # drafted passes between passes without, so that their cost stays known
_MARGIN = 1.02  # what drafting must promise over not drafting
_FADE = 0.97
_PRIOR = (1.3, 0.7)  # tokens that stood and fell before anything was seen
_INHERITED = 4.0  # tokens that a grade's experience counts for in a new row
_PROBE = 2  # tokens
_FIRST_WAIT, _LONGEST_WAIT = 8, 128  # passes between probes


@dataclass
class Acceptance:
    """Tokens that stood and fell, the older counting less."""

    stood: float = _PRIOR[0]
    fell: float = _PRIOR[1]

    @property
    def rate(self) -> float:
        """Probability that the next drafted token stands."""
        return self.stood / (self.stood + self.fell)

    def see(self, offered: int, stood: int) -> None:
        """Of `offered` tokens the first `stood` stood."""
        self.stood = self.stood * _FADE + stood
        self.fell = self.fell * _FADE + (stood < offered)

    def heir(self) -> Acceptance:
        """A start for a new row."""
        weight = min(1.0, _INHERITED / (self.stood + self.fell))
        return Acceptance(self.stood * weight, self.fell * weight)


@dataclass(frozen=True)
class Candidate:
    """A row that could be drafted for. row: what it is known by. limit: most tokens, at least 1."""

    row: int
    grade: int
    limit: int


@dataclass
class _Probe:
    wait: int = _FIRST_WAIT
    passed: int = _FIRST_WAIT


@dataclass
class Adaptive:
    """Chooses k for each row of each pass. costs_steps: a drafted token takes a step of a model."""

    costs_steps: bool
    target: StepCosts = field(default_factory=StepCosts)
    draft: StepCosts = field(default_factory=StepCosts)
    balance_s: float = 0.0
    elapsed_s: float = 0.0
    _rates: dict[tuple[int, int], Acceptance] = field(default_factory=dict)
    _grades: dict[int, Acceptance] = field(default_factory=dict)
    _probes: dict[int, _Probe] = field(default_factory=dict)
    _since_plain: int = 0

    def rate(self, row: int, grade: int) -> float:
        """The acceptance expected of a row."""
        found = self._rates.get((row, grade))
        return (found or self._grades.get(grade) or Acceptance()).rate

    def choose(self, candidates: Sequence[Candidate], num_rows: int) -> list[int]:
        """Tokens to draft for each candidate. num_rows: rows of the pass, candidates or not."""
        nothing = [0] * len(candidates)
        plain = self.target.seconds(num_rows)
        if plain is None or self.target.known(num_rows) < _LEARN_PLAIN or not candidates:
            return nothing
        allowance = ALLOWANCE * (self.elapsed_s + FIRST_PASSES * plain)
        if self.balance_s < -allowance or self._since_plain >= _PLAIN_AGAIN:
            return nothing
        counts = self._best(candidates, num_rows)
        if any(counts):
            return counts
        due, counts = self._probing(candidates)
        worst = self.pass_seconds(counts, num_rows) - plain
        if not due or self.balance_s - worst < -allowance:
            return nothing
        for probe in due:
            probe.passed, probe.wait = 0, min(2 * probe.wait, _LONGEST_WAIT)
        return counts

    def pass_seconds(self, counts: Sequence[int], num_rows: int) -> float:
        """The expected cost of a pass. An unknown draft is taken to cost as much as the target."""
        plain = self.target.seconds(num_rows)
        assert plain is not None, "asked only once passes have run"
        seconds = self.target.seconds(num_rows + sum(counts)) or plain
        if self.costs_steps:
            for step in range(max(counts, default=0)):
                active = sum(count > step for count in counts)
                seconds += self.draft.seconds(active) or plain
        return seconds

    def _best(self, candidates: Sequence[Candidate], num_rows: int) -> list[int]:
        rates = [self.rate(c.row, c.grade) for c in candidates]
        counts, tokens = [0] * len(candidates), float(num_rows)
        best, best_speed = counts, _MARGIN * num_rows / self.pass_seconds(counts, num_rows)
        if self.costs_steps and self.draft.seconds(1) is None:
            return counts  # a probe finds out first
        while True:
            open_rows = [i for i, c in enumerate(candidates) if counts[i] < c.limit]
            if not open_rows:
                return best
            i = max(open_rows, key=lambda r: rates[r] ** (counts[r] + 1))
            counts = [*counts[:i], counts[i] + 1, *counts[i + 1 :]]
            tokens += rates[i] ** counts[i]
            speed = tokens / self.pass_seconds(counts, num_rows)
            if speed > best_speed:
                best, best_speed = counts, speed

    def _probing(self, candidates: Sequence[Candidate]) -> tuple[list[_Probe], list[int]]:
        """The probes whose turn it is, and the short drafts they would make."""
        grades = {c.grade for c in candidates}
        probes = {grade: self._probes.setdefault(grade, _Probe()) for grade in grades}
        for probe in probes.values():
            probe.passed += 1
        due = {grade: probe for grade, probe in probes.items() if probe.passed >= probe.wait}
        return list(due.values()), [min(_PROBE, c.limit) if c.grade in due else 0 for c in candidates]

    def see(self, row: int, grade: int, offered: int, stood: int) -> None:
        """Verification let the first `stood` of a row's `offered` tokens stand."""
        shared = self._grades.setdefault(grade, Acceptance())
        own = self._rates.setdefault((row, grade), shared.heir())
        shared.see(offered, stood)
        own.see(offered, stood)
        if stood == offered and grade in self._probes:
            self._probes[grade].wait = _FIRST_WAIT

    def book(self, num_rows: int, size: int, drafted_s: float, new_tokens: int) -> None:
        """A pass has run. size: tokens in it. drafted_s: seconds of drafting. new_tokens: it brought."""
        cost, plain = self.target.seconds(size), self.target.seconds(num_rows)
        if cost is None:
            return
        self.elapsed_s += cost + drafted_s
        if size == num_rows:
            self._since_plain = 0
        elif plain is not None:
            self._since_plain += 1
            saved = plain * new_tokens / num_rows
            self.balance_s = min(0.0, self.balance_s + saved - cost - drafted_s)

    def forget(self, row: int) -> None:
        """The row has ended."""
        for key in [key for key in self._rates if key[0] == row]:
            del self._rates[key]
