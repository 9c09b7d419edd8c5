"""Sampling: filters against slow obvious ones, draws that depend on their arguments alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tp_runtime.config import SamplingParams
from tp_runtime.engine.sampling import Purpose, distribution, draw, logprobs, penalise, sample, uniform
from tp_runtime.errors import CheckpointError

V = 40


def random_logits(seed: int) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


def obvious(logits: Tensor, params: SamplingParams) -> list[float]:
    """The definition, token by token."""
    weights = [math.exp(v / params.temperature) for v in logits.tolist()]
    probs = [w / sum(weights) for w in weights]

    def renormalise(keep: set[int]) -> None:
        total = sum(probs[i] for i in keep)
        for i in range(V):
            probs[i] = probs[i] / total if i in keep else 0.0

    order = sorted(range(V), key=lambda i: -probs[i])
    if params.top_k:
        renormalise(set(order[: params.top_k]))
    if params.top_p < 1:
        mass, keep = 0.0, set()
        for i in order:
            if mass >= params.top_p:
                break
            keep.add(i)
            mass += probs[i]
        renormalise(keep)
    if params.min_p:
        renormalise({i for i in range(V) if probs[i] >= params.min_p * max(probs)})
    return probs


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 10, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"top_k": 1000},
    ],
)
def test_distribution(seed: int, settings: dict) -> None:
    params = SamplingParams(**{"temperature": 1.0, **settings})
    found = distribution(random_logits(seed), params, (), ())
    wanted = torch.tensor(obvious(random_logits(seed).double(), params), dtype=torch.float64)
    worst = (found - wanted).abs().max().item()
    print(f"largest {worst:.2e} mean {(found - wanted).abs().mean().item():.2e}")
    assert worst < 1e-6


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 1e-3])
def test_almost_no_temperature_is_greedy(temperature: float, settings: dict) -> None:
    logits = random_logits(0)
    wanted = sample(logits, SamplingParams(), (), (), 3)
    assert sample(logits, SamplingParams(temperature=temperature, **settings), (), (), 3) == wanted


def test_penalties() -> None:
    logits = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    found = penalise(logits, params, prompt=[0, 1], output=[2, 2, 3])
    assert torch.allclose(found, torch.tensor([0.5, -2.0, 1.0 - 0.5 - 0.5, -4.0 - 0.5 - 0.25, 0.5]))
    assert logits.tolist() == [1.0, -1.0, 2.0, -2.0, 0.5], "the caller's logits must not change"


def test_greedy() -> None:
    logits = random_logits(0)
    assert sample(logits, SamplingParams(), (), (), 3) == int(logits.argmax())
    assert distribution(logits, SamplingParams(), (), ()).max() == 1
    punished = SamplingParams(frequency_penalty=100.0)
    best = int(logits.argmax())
    assert sample(logits, punished, (), (best,), 3) != best


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.1}, {"temperature": 1.0, "top_p": 0.9}])
def test_nan_is_no_token(settings: dict) -> None:
    logits_V = torch.randn(1000)
    logits_V[123] = torch.nan
    with pytest.raises(CheckpointError, match="logits of position 7 are not numbers.*--dtype bf16"):
        sample(logits_V, SamplingParams(**settings), (1,), (2,), 7)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 positions; 39 degrees of freedom, 99.99% below 84."""
    params = SamplingParams(temperature=2.0, seed=7)
    probs = distribution(random_logits(1), params, (), ())
    counts = torch.zeros(V, dtype=torch.float64)
    for position in range(20_000):
        counts[draw(probs, uniform(7, position, Purpose.TARGET))] += 1
    expected = probs * 20_000
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 84, chi


def test_a_draw_depends_on_its_arguments_alone() -> None:
    numbers = {
        uniform(seed, position, purpose)
        for seed in range(20)
        for position in range(20)
        for purpose in Purpose
    }
    assert len(numbers) == 20 * 20 * 4
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(3, 4, Purpose.ACCEPT) == uniform(3, 4, Purpose.ACCEPT)


def test_draw_at_the_edges() -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    assert draw(probs, 0.0) == 1
    assert draw(probs, 0.5) == 3
    assert draw(probs, math.nextafter(1.0, 0.0)) == 3


def test_logprobs() -> None:
    logits = random_logits(2)
    found = logprobs(logits, 5, 3)
    wanted = torch.log_softmax(logits, 0)
    assert found.logprob == pytest.approx(float(wanted[5]))
    assert [token for token, _ in found.top] == wanted.argsort(descending=True)[:3].tolist()


def test_ties_and_large_nuclei_need_no_whole_sort() -> None:
    """Of equal values the first are kept; a flat distribution's nucleus is larger than the head that is sorted."""
    tied = torch.zeros(5000)
    for settings, kept in (({"top_k": 7}, 7), ({"top_p": 0.49995}, 2500), ({"top_k": 10, "top_p": 0.45}, 5)):
        probs = distribution(tied, SamplingParams(temperature=1.0, **settings), (), ())
        assert torch.equal(probs.nonzero()[:, 0], torch.arange(kept)), settings
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    found = distribution(logits, SamplingParams(temperature=1.0, top_p=0.95), (), ())
    ordered, order = torch.softmax(logits.double(), 0).sort(descending=True)
    keep = order[ordered.cumsum(0) - ordered < 0.95]
    assert set(found.nonzero()[:, 0].tolist()) == set(keep.tolist()) and keep.numel() > 512


def test_what_is_sampled_follows_distribution() -> None:
    for settings in (
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.05},
    ):
        params = SamplingParams(temperature=1.3, seed=11, **settings)
        probs = distribution(random_logits(4), params, (), ())
        for position in range(50):
            token = sample(random_logits(4), params, (), (), position)
            assert token == draw(probs, uniform(11, position, Purpose.TARGET)), settings
