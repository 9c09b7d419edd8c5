"""Adaptive k over simulated hosts: near the best fixed k where drafting pays, hardly slower where it does not.

A host is the cost of a target step by its tokens and of a draft step, in units of a plain step; a text is the
probability that a drafted token stands, place by place.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tp_runtime.engine.speculative.adaptive import Adaptive, Candidate
from tp_runtime.engine.speculative.costs import StepCosts

MOST = 7
PASSES = 400


def flat(size: int) -> float:
    """Memory-bound: each further token costs 3% of a plain step."""
    return 1 + 0.03 * (size - 1)


def steep(size: int) -> float:
    """Compute-bound: each further token costs 60%."""
    return 1 + 0.6 * (size - 1)


def stepped(size: int) -> float:
    """Other kernels from two tokens on: the second is dear, the next ones are cheap."""
    return 1.0 if size == 1 else 1.5 + 0.02 * size


def run(
    target: Callable[[int], float],
    draft_step: float,
    stands: Callable[[int], float],
    *,
    noise: float = 0.0,
    rows: int = 1,
) -> tuple[float, list[int]]:
    """(speed-up over plain decoding, tokens drafted in each pass)."""
    chance, chooser = random.Random(0), Adaptive(costs_steps=draft_step > 0)
    seconds = saved = 0.0
    drafted = []
    for number in range(PASSES):
        candidates = [Candidate(row, 0, MOST) for row in range(rows)]
        counts = chooser.choose(candidates, rows)
        size, tokens, stood = rows + sum(counts), rows, []
        for count in counts:
            stood.append(0)
            while stood[-1] < count and chance.random() < stands(number):
                stood[-1] += 1
            tokens += stood[-1]
        slow = 1 + noise * chance.random()
        drafting = sum(draft_step for _ in range(max(counts)))
        seconds += target(size) * slow + drafting
        saved += target(rows) * tokens / rows
        drafted.append(sum(counts))
        for step in range(max(counts)):
            chooser.draft.add(sum(count > step for count in counts), draft_step)
        for row, (count, stand) in enumerate(zip(counts, stood, strict=True)):
            if count:
                chooser.see(row, 0, count, stand)
        chooser.target.add(size, target(size) * slow)
        chooser.book(rows, size, drafting, tokens)
    return saved / seconds, drafted


def with_fixed(target: Callable[[int], float], draft_step: float, stands: float, rows: int, k: int) -> float:
    """The speed-up to be expected where every row always drafts k tokens."""
    cost = target(rows * (1 + k)) + k * draft_step
    return sum(stands**i for i in range(k + 1)) * target(rows) / cost


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("stands", [0.0, 0.3, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("draft_step", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("target", [flat, steep, stepped])
def test_near_the_best_fixed_k(
    target: Callable[[int], float], draft_step: float, stands: float, rows: int
) -> None:
    found, drafted = run(target, draft_step, lambda _: stands, noise=0.1, rows=rows)
    best = max(with_fixed(target, draft_step, stands, rows, k) for k in range(MOST + 1))
    print(f"adaptive {found:.3f}, best fixed k {best:.3f}, drafted in the last pass {drafted[-1]}")
    assert found > 0.95 / 1.05, "slower than the bound, after the simulated noise of 5% on average"
    assert found > 0.88 * best


@pytest.mark.parametrize("target", [flat, steep, stepped])
def test_falls_silent_when_the_text_turns(target: Callable[[int], float]) -> None:
    """Everything stands for half of the run, then nothing: gains are not spent on what loses."""
    found, drafted = run(target, 0.3, lambda number: 1.0 if number < PASSES // 2 else 0.0)
    late = drafted[PASSES // 2 + 60 :]
    print(f"{found:.3f}; tokens drafted a pass at the end: {sum(late) / len(late):.3f}")
    assert sum(late) / len(late) < 0.25, "more than the probes"


def test_comes_back_when_the_text_turns() -> None:
    _, drafted = run(flat, 0.1, lambda number: 0.0 if number < PASSES // 2 else 1.0)
    assert drafted[-1] > 0 and sum(drafted[-60:]) > 60 * 3


def test_a_useless_draft_costs_at_most_the_allowance() -> None:
    """Whatever the costs: never more than 5% slower than plain decoding."""
    for target in (flat, steep, stepped):
        for draft_step in (0.2, 1.0, 3.0):
            found, drafted = run(target, draft_step, lambda _: 0.0)
            print(f"{target.__name__}, draft step {draft_step}: {found:.4f}, {sum(drafted)} tokens drafted")
            assert found > 0.95


def test_rows_get_what_they_deserve() -> None:
    """One row repeats itself, its neighbour does not: tokens go to the first."""
    chooser = Adaptive(costs_steps=False)
    for _ in range(3):
        chooser.target.add(2, 1.0)
    for size in (3, 6, 9, 16):
        chooser.target.add(size, 1 + 0.08 * (size - 2))
    for _ in range(20):
        chooser.see(1, 0, 4, 4)
        chooser.see(2, 0, 4, 0)
    first, second = chooser.choose([Candidate(1, 0, MOST), Candidate(2, 0, MOST)], 2)
    assert first == MOST and second == 0


def test_plain_passes_come_first() -> None:
    """Without their cost there is nothing to compare with."""
    chooser = Adaptive(costs_steps=False)
    row = [Candidate(1, 0, MOST)]
    assert chooser.choose(row, 1) == [0]
    chooser.target.add(1, 1.0)
    assert chooser.choose(row, 1) == [0]
    chooser.target.add(1, 1.0)
    assert chooser.choose(row, 1)[0] > 0
    assert chooser.choose([], 1) == []


def test_costs_between_and_beyond_what_was_seen() -> None:
    costs = StepCosts()
    assert costs.seconds(4) is None
    costs.add(2, 1.0)
    assert costs.seconds(1) == costs.seconds(9) == 1.0
    costs.add(6, 3.0)
    assert costs.seconds(4) == 2.0 and costs.seconds(8) == 3.0
    for slow in (100.0, 1.0, 1.0):
        costs.add(2, slow)
    assert costs.seconds(2) == 1.0, "one slow run must not count"
