"""What a step costs, learnt as steps run: seconds by the number of tokens in it. No torch.

Decoding is bound by reading weights, so a step of several tokens costs little more than one of a single
token, until the kernels become compute-bound; where that is, only the machine knows. The latest runs of
each size are kept and their median counts: one run that something else on the host slowed down does not.
"""

from __future__ import annotations

import statistics
from collections import deque

_KEPT = 9


class StepCosts:
    """Median seconds of the latest steps of each size."""

    def __init__(self) -> None:
        self._runs: dict[int, deque[float]] = {}

    def add(self, size: int, seconds: float) -> None:
        """A step of `size` tokens took `seconds`."""
        self._runs.setdefault(size, deque(maxlen=_KEPT)).append(seconds)

    def known(self, size: int) -> int:
        """How many runs of this size count."""
        return len(self._runs.get(size, ()))

    def seconds(self, size: int) -> float | None:
        """The cost of a step; on a line between the nearest sizes seen, beyond them as the nearest.

        None where nothing was seen. Taking a size beyond the largest for as cheap is optimistic: trying it
        once corrects that.
        """
        if size in self._runs:
            return statistics.median_low(self._runs[size])
        below = max((s for s in self._runs if s < size), default=None)
        above = min((s for s in self._runs if s > size), default=None)
        if below is None or above is None:
            near = above if below is None else below
            return None if near is None else statistics.median_low(self._runs[near])
        low, high = (statistics.median_low(self._runs[s]) for s in (below, above))
        return low + (high - low) * (size - below) / (above - below)
