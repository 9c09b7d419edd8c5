"""What a draft is to the engine: it offers tokens that may follow a sequence, and forgets what did not stand.

Rank 0 alone asks for offers. Where a draft needs all ranks (a model split over them), it announces its steps
and the others run `follow`. Legend: K drafted tokens, V the target's vocabulary.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor

    from ..step import Step


Done = TypeVar("Done")


class Announce(Protocol):
    """Tells all ranks of a step of the draft and runs it here; what `execute` returned.

    steps: the step begins a burst of so many (engine/burst.py); 0: it is a step by itself.
    """

    def __call__(self, step: Step, execute: Callable[[Step], Done], steps: int = 0) -> Done: ...


@dataclass(frozen=True)
class Offer:
    """Tokens drafted for one row.

    probs: for each token, the distribution [V] (float64, sum 1) it was drawn from; None where the draft
    made no draw, so that each token was certain given the ones before it.
    """

    tokens: tuple[int, ...] = ()
    probs: tuple[Tensor, ...] | None = None


NOTHING = Offer()


class Drafter(ABC):
    """One kind of draft.

    costs_steps: a drafted token takes a step of a model. steps: (tokens, seconds) of those of the last draft.
    clock: seconds; what all of speculation is timed by. priors: see Adaptive.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)
    costs_steps = True
    steps: Seq[tuple[int, float]] = ()
    priors: Mapping[int, tuple[float, float]] = {}

    @abstractmethod
    def grade(self, sequence: Sequence) -> int | None:
        """How sure an offer for `sequence` would be, as a small number; None where there is none to make.

        Acceptance is learnt for each grade apart. A draft that does not know beforehand says 0.
        """

    @abstractmethod
    def draft(self, rows: Seq[tuple[Sequence, int]]) -> list[Offer]:
        """Offers of at most so many tokens (at least one) for each sequence; `grade` was asked before."""

    def behind(self, sequence: Sequence) -> int:
        """Tokens that the draft must read before the step that drafts first for this sequence."""
        return 0

    def rollback(self, sequence: Sequence) -> None:
        """The sequence has new tokens; what was kept of tokens that did not stand is void."""
        return

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        return

    def warm_up(self) -> Mapping[int, float]:
        """Compile what drafting runs. Every rank calls it. Seconds of its steps by their tokens, as timed."""
        return {}

    def follow(self, step: Step, steps: int) -> None:
        """Ranks other than 0: take part in what rank 0's draft announced (steps: see Announce)."""
        raise AssertionError(f"{type(self).__name__} announces no steps")
