"""Acceptance by decree: how fast speculation would be if a drafted token stood with a given probability.

At random weights a draft never agrees with its target, so a pair whose weights are not at hand cannot be
timed as it is. Here all work is done (draft steps, the target's pass, the choice of its likeliest token
behind every one it ran, rollback), and only the comparison is replaced by a draw. The times are real and the
text is not.

No setting leads here: tp-bench decode --force-acceptance puts one on the Speculator that it measures.
Legend: N rows of logits, one behind the last known token and one behind each drafted token; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..sampling import Purpose, uniform
from .interface import Offer
from .verify import likeliest


@dataclass
class ForcedAcceptance:
    """Lets each drafted token stand with `probability`, given that those before it stood.

    probability: above 0 and at most 1. seed: of the draws; the n-th is a function of (seed, n) alone, so that
    rows of a batch and repetitions of a run have different ones. draws: made so far.
    """

    probability: float
    seed: int = 0
    draws: int = 0

    def decide(self, logits_NV: Tensor, offer: Offer) -> tuple[int, ...]:
        """As verify.decide of a greedy row: the drafted tokens that stand, and the target's next one.

        logits_NV: of the target, any float dtype and device; N - 1 tokens of the offer were run.
        """
        drafted, (best, _) = offer.tokens[: logits_NV.shape[0] - 1], likeliest(logits_NV)
        stand = 0
        while stand < len(drafted) and self._stands():
            stand += 1
        return (*drafted[:stand], best[stand])

    def _stands(self) -> bool:
        number = uniform(self.seed, self.draws, Purpose.ACCEPT)
        self.draws += 1
        return number < self.probability
