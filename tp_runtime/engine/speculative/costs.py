"""What a step costs, learnt as steps run: seconds by its rows and its tokens. No torch.

Decoding is bound by reading weights, so a step of several tokens costs little more than one of a single
token, until the kernels become compute-bound; where that is, only the machine knows. The latest runs of
each kind are kept and their median counts: one run that something else on the host slowed down does not.

Before the first answer, steps of a few sizes are timed (`seed`). They say how cost grows with tokens; how
high it lies (a long context, a busy host) is known from the runs themselves.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, insort
from collections import deque

_KEPT = 9


class Curve:
    """Values at some sizes; between them on a line, beyond them as the nearest."""

    def __init__(self) -> None:
        self.points: dict[int, float] = {}
        self._sizes: list[int] = []

    def put(self, size: int, value: float) -> None:
        if size not in self.points:
            insort(self._sizes, size)
        self.points[size] = value

    def at(self, size: int) -> float:
        """The value; only where there is a point."""
        found = self.points.get(size)
        if found is not None:
            return found
        i = bisect_left(self._sizes, size)
        if i in (0, len(self._sizes)):
            return self.points[self._sizes[min(i, len(self._sizes) - 1)]]
        low, high = self._sizes[i - 1], self._sizes[i]
        share = (size - low) / (high - low)
        return self.points[low] * (1 - share) + self.points[high] * share

    def rising(self, size: int) -> float:
        """As `at`; beyond the largest size on the line from the smallest through it, if that rises."""
        least, most = self._sizes[0], self._sizes[-1]
        if size <= most or least == most:
            return self.at(size)
        rise = max(0.0, self.points[most] - self.points[least]) / (most - least)
        return self.points[most] + rise * (size - most)


class StepCosts:
    """Median seconds of the latest steps of each number of rows and tokens."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], deque[float]] = {}
        self._seen: dict[int, Curve] = {}  # seconds, by rows
        self._heights: dict[int, Curve] = {}  # of what was seen over the seeds, by rows
        self._seeds = Curve()

    def seed(self, size: int, seconds: float) -> None:
        """A step of one row of `size` tokens took `seconds` before any answer."""
        self._seeds.put(size, seconds)

    def add(self, size: int, seconds: float, rows: int = 1) -> None:
        """A step of `size` tokens in `rows` rows took `seconds`."""
        runs = self._runs.setdefault((rows, size), deque(maxlen=_KEPT))
        runs.append(seconds)
        median = statistics.median_low(runs)
        self._seen.setdefault(rows, Curve()).put(size, median)
        if self._seeds.points:
            self._heights.setdefault(rows, Curve()).put(size, median / self._seeds.rising(size))

    def known(self, size: int, rows: int = 1) -> int:
        """How many runs of this kind count."""
        return len(self._runs.get((rows, size), ()))

    def seconds(self, size: int, rows: int = 1) -> float | None:
        """The cost of a step; None where nothing like it was seen.

        A size that never ran is taken from those that did: as the seeds grow between them, else on a line.
        """
        seen = self._seen.get(rows)
        if seen is not None and size in seen.points:
            return seen.points[size]
        if not self._seeds.points:
            return None if seen is None else seen.rising(size)
        heights = self._heights.get(rows)
        return (1.0 if heights is None else heights.at(size)) * self._seeds.rising(size)
