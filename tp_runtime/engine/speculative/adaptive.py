"""How many tokens to draft for each row, so that tokens a second are most; none where drafting loses.

If each drafted token stands with probability a, given that those before it stood, k of them bring
1 + a + ... + a^k tokens. A pass costs target(rows + sum of k) and, with a draft that is a model, one draft
step for each k, all as measured (costs.py). Tokens are added one at a time where the next is likeliest to
stand, and the best point on that path is taken: costs rise in steps, so the first losing token may be
followed by winning ones.

a is learnt for each row and grade of the draft, beginning with what the grade showed in other rows, and old
passes fade. Where the best is none, a short draft is tried now and then, ever more rarely while it fails.

The ledger bounds what all of this may cost. Every drafted pass is booked: what its tokens would have cost
without a draft, minus what it cost. No pass is drafted that would, if nothing stood, take the balance below
-ALLOWANCE of the time this call has run (plus a start of FIRST_PASSES passes). Gains are saved up within a
call and up to CREDIT passes, so a good stretch hardly pays for a bad one; time and balance older than some
WINDOW passes are forgotten alike, so a long run earns no right to a long loss.

A draft model that has not read a row's tokens (its prompt, before the first draft) must catch up, which may
cost many passes at once and serves the whole row. So its price is spread over the tokens that the row may
still write, and drafting begins only where what it promises covers that. It is not booked: once paid, it says
nothing about whether the next pass is worth drafting. A probe has to afford it within the allowance, and
books it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .costs import StepCosts

ALLOWANCE = 0.03
FIRST_PASSES = 20  # a start for the ledger, in passes: the allowance of a run that is this long
CREDIT = 4.0  # passes
WINDOW = 200.0  # passes
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
    """A row that could be drafted for.

    row: what it is known by. limit: most tokens, at least 1. behind: tokens the draft must read before its
    first step. left: tokens the row may still write.
    """

    row: int
    grade: int
    limit: int
    behind: int = 0
    left: int = 1


@dataclass
class _Probe:
    wait: int = _FIRST_WAIT
    passed: int = _FIRST_WAIT


def deal(limits: Sequence[int], budget: int) -> list[int]:
    """Tokens for each row, at most its limit and `budget` in all, as even as can be."""
    counts = [0] * len(limits)
    while sum(counts) < min(budget, sum(limits)):
        i = min((i for i, limit in enumerate(limits) if counts[i] < limit), key=lambda i: counts[i])
        counts[i] += 1
    return counts


@dataclass
class Adaptive:
    """Chooses k for each row of each pass.

    costs_steps: a drafted token takes a step of a model. priors: tokens of a grade that stood and fell before
    anything was seen, for grades that are surer or less sure than others.
    """

    costs_steps: bool
    priors: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    target: StepCosts = field(default_factory=StepCosts)
    draft: StepCosts = field(default_factory=StepCosts)
    balance_s: float = 0.0
    elapsed_s: float = 0.0
    _rates: dict[tuple[int, int], Acceptance] = field(default_factory=dict)
    _grades: dict[int, Acceptance] = field(default_factory=dict)
    _probes: dict[int, _Probe] = field(default_factory=dict)
    _since_plain: int = 0
    _is_probe: bool = False

    def begin(self) -> None:
        """A call starts: what earlier ones gained, or had time to lose, is not its to lose."""
        first = ALLOWANCE * FIRST_PASSES * (self.target.seconds(1) or 0.0)
        self.balance_s = max(-first, min(0.0, self.balance_s))
        self.elapsed_s = 0.0

    def rate(self, row: int, grade: int) -> float:
        """The acceptance expected of a row."""
        found = self._rates.get((row, grade)) or self._grades.get(grade)
        return (found or Acceptance(*self.priors.get(grade, _PRIOR))).rate

    def choose(self, candidates: Sequence[Candidate], num_rows: int, budget: int) -> list[int]:
        """Tokens to draft for each candidate.

        num_rows: rows of the pass that decode, candidates or not. budget: most tokens drafted in all.
        """
        nothing = [0] * len(candidates)
        plain = self.target.seconds(num_rows, num_rows)
        if plain is None or self.target.known(num_rows, num_rows) < _LEARN_PLAIN or not candidates:
            return nothing
        room_s = self.balance_s + ALLOWANCE * (self.elapsed_s + FIRST_PASSES * plain)
        if room_s < 0 or budget < 1 or self._since_plain >= _PLAIN_AGAIN:
            return nothing
        self._is_probe = False
        counts = self._best(candidates, num_rows, budget, plain + room_s)
        if any(counts):
            return counts
        due, counts = self._probing(candidates, budget)
        cost = self.pass_seconds(counts, num_rows)
        joining = sum(self._joining_s(c) for c, count in zip(candidates, counts, strict=True) if count)
        if not any(counts) or cost + joining > plain + room_s:
            return nothing
        self._is_probe = True
        for probe in due:
            probe.passed, probe.wait = 0, min(2 * probe.wait, _LONGEST_WAIT)
        return counts

    def pass_seconds(self, counts: Sequence[int], num_rows: int) -> float:
        """The expected cost of a pass. An unknown draft is taken to cost as much as the target."""
        plain = self.target.seconds(num_rows, num_rows)
        assert plain is not None, "asked only once passes have run"
        seconds = self.target.seconds(num_rows + sum(counts), num_rows) or plain
        if self.costs_steps:
            for step in range(max(counts, default=0)):
                active = sum(count > step for count in counts)
                seconds += self.draft.seconds(active) or plain
        return seconds

    def _joining_s(self, candidate: Candidate) -> float:
        """What a row costs the draft before its first step."""
        if not self.costs_steps or candidate.behind < 2:
            return 0.0
        costs = self.target if self.draft.seconds(1) is None else self.draft
        one, several = costs.seconds(1), costs.seconds(1 + candidate.behind)
        return 0.0 if one is None or several is None else max(0.0, several - one)

    def _best(self, candidates: Sequence[Candidate], num_rows: int, budget: int, most_s: float) -> list[int]:
        """The counts that promise most tokens a second, among those whose pass takes at most most_s."""
        rates = [self.rate(c.row, c.grade) for c in candidates]
        prices = [self._joining_s(c) / max(1, c.left) for c in candidates]  # of a token, on top of its pass
        counts, brought = [0] * len(candidates), [1.0] * len(candidates)
        best, best_speed = counts, _MARGIN * num_rows / self.pass_seconds(counts, num_rows)
        step = 0.0  # what a draft step costs, in tokens
        if self.costs_steps:
            seconds = self.draft.seconds(1)
            if seconds is None:
                return counts  # a probe finds out first
            step = seconds * best_speed
        while sum(counts) < budget:
            open_rows = [i for i, c in enumerate(candidates) if counts[i] < c.limit]
            if not open_rows:
                break
            top, so_far = max(counts), counts
            i = max(
                open_rows, key=lambda r: rates[r] ** (so_far[r] + 1) - (step if so_far[r] == top else 0.0)
            )
            counts = [*counts[:i], counts[i] + 1, *counts[i + 1 :]]
            brought[i] += rates[i] ** counts[i]
            cost = self.pass_seconds(counts, num_rows)
            joining = sum(p * b for p, b, count in zip(prices, brought, counts, strict=True) if count)
            speed = (num_rows - len(candidates) + sum(brought)) / (cost + joining)
            if speed > best_speed and cost <= most_s:
                best, best_speed = counts, speed
        return best

    def _probing(self, candidates: Sequence[Candidate], budget: int) -> tuple[list[_Probe], list[int]]:
        """The probes whose turn it is, and the short drafts they would make."""
        grades = {c.grade for c in candidates}
        probes = {grade: self._probes.setdefault(grade, _Probe()) for grade in grades}
        for probe in probes.values():
            probe.passed += 1
        due = {grade: probe for grade, probe in probes.items() if probe.passed >= probe.wait}
        limits = [min(_PROBE, c.limit) if c.grade in due else 0 for c in candidates]
        return list(due.values()), deal(limits, budget)

    def see(self, row: int, grade: int, offered: int, stood: int) -> None:
        """Verification let the first `stood` of a row's `offered` tokens stand."""
        shared = self._grades.setdefault(grade, Acceptance(*self.priors.get(grade, _PRIOR)))
        own = self._rates.setdefault((row, grade), shared.heir())
        shared.see(offered, stood)
        own.see(offered, stood)
        if stood and grade in self._probes:
            self._probes[grade].wait = _FIRST_WAIT

    def book(
        self, num_rows: int, size: int, drafted_s: float, new_tokens: int, joining_s: float = 0.0
    ) -> None:
        """A pass has run.

        size: tokens in it. drafted_s: seconds of drafting, without joining_s of catching up. new_tokens: of
        all rows.
        """
        cost, plain = self.target.seconds(size, num_rows), self.target.seconds(num_rows, num_rows)
        if cost is None or plain is None:
            return
        cost += drafted_s + (joining_s if self._is_probe else 0.0)
        kept = 1 - min(1.0, cost / (WINDOW * plain))
        drafted = size > num_rows
        self._since_plain = self._since_plain + 1 if drafted else 0
        saved = plain * new_tokens / num_rows - cost if drafted else 0.0
        self.elapsed_s = self.elapsed_s * kept + cost
        self.balance_s = min(CREDIT * plain, self.balance_s * kept + saved)

    def forget(self, row: int) -> None:
        """The row has ended."""
        for key in [key for key in self._rates if key[0] == row]:
            del self._rates[key]
