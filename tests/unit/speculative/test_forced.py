"""Acceptance by decree: how often drafted tokens stand, and that the target's own token follows them."""

from __future__ import annotations

import pytest
import torch

from tp_runtime.engine.speculative.forced import ForcedAcceptance
from tp_runtime.engine.speculative.interface import NOTHING, Offer

VOCAB, DRAFTED = 50, (40, 41, 42, 43)
LOGITS = torch.nn.functional.one_hot(torch.tensor([1, 2, 3, 4, 5]), VOCAB).float()  # the target wants 1 .. 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_stand(dtype: torch.dtype) -> None:
    forced = ForcedAcceptance(1.0)
    assert forced.decide(LOGITS.to(dtype), Offer(DRAFTED)) == (*DRAFTED, 5)
    assert forced.decide(LOGITS[:3].to(dtype), Offer(DRAFTED)) == (40, 41, 3), "two of the offer were run"
    assert forced.decide(LOGITS[:1].to(dtype), NOTHING) == (1,)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_the_share_that_stands(probability: float) -> None:
    """Each token apart from its place, and behind those that stand the target's own."""
    forced, other = ForcedAcceptance(probability, seed=7), ForcedAcceptance(probability, seed=7)
    stood = fell = 0
    for _ in range(4000):
        found = forced.decide(LOGITS, Offer(DRAFTED))
        assert found == other.decide(LOGITS, Offer(DRAFTED)), "draws depend on seed and number alone"
        stand = len(found) - 1
        assert found == (*DRAFTED[:stand], stand + 1)
        stood, fell = stood + stand, fell + (stand < len(DRAFTED))
    assert stood + fell == forced.draws
    spread = (probability * (1 - probability) / forced.draws) ** 0.5
    assert stood / forced.draws == pytest.approx(probability, abs=4 * spread)
