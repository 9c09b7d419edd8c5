"""Speculative sampling leaves the target's distribution as it is: chi-square over whole runs of tokens.

Target and draft are Markov chains over six tokens, so the probability of every three tokens is known
exactly, penalties and filters included. 20,000 runs, each with its own seed, are counted.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tp_runtime.config import SamplingParams
from tp_runtime.engine import sampling
from tp_runtime.engine.sampling import Purpose, draw, uniform
from tp_runtime.engine.speculative import verify
from tp_runtime.engine.speculative.interface import NOTHING, Offer
from tp_runtime.engine.speculative.verify import accept_or_replace, decide, draw_draft
from tp_runtime.errors import CheckpointError

V, LENGTH, DRAFTED, RUNS = 6, 3, 2, 20_000
PROMPT = (0,)
ALL_FILTERS = {
    "temperature": 0.9, "top_k": 5, "top_p": 0.97, "min_p": 0.02, "repetition_penalty": 1.2,
    "presence_penalty": 0.3, "frequency_penalty": 0.1,
}  # fmt: skip
Replace = Callable[[Tensor, Tensor, int, int, int], int]


def chain(seed: int) -> Tensor:
    """Logits of the next token by the last one."""
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * 1.5


TARGET, DRAFT = chain(0), chain(1)


@pytest.fixture(autouse=True)
def remembered_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same few distributions are asked for 20,000 times; each is computed once."""
    real = sampling.distribution
    found: dict[object, Tensor] = {}

    def remembered(logits_V: Tensor, params: SamplingParams, prompt: object, output: object) -> Tensor:
        key = (tuple(logits_V.tolist()), params.temperature, params.top_k, tuple(output))  # type: ignore[call-overload]
        if key not in found:
            found[key] = real(logits_V, params, prompt, output)  # type: ignore[arg-type]
        return found[key]

    monkeypatch.setattr(sampling, "distribution", remembered)
    monkeypatch.setattr(verify, "distribution", remembered)


def one_run(params: SamplingParams, *, drawn: bool) -> tuple[int, ...]:
    """LENGTH tokens. drawn: the draft samples; else it offers fixed tokens, as a lookup does."""
    output: list[int] = []
    while len(output) < LENGTH:
        last, drafted, probs = (*PROMPT, *output)[-1], [], []
        for place in range(DRAFTED):
            if drawn:
                token, probs_V = draw_draft(DRAFT[last], params, PROMPT, [*output, *drafted], V)
                assert probs_V is not None
                probs.append(probs_V)
            else:
                token = (last + place + 1) % V
            drafted.append(token)
            last = token
        offer = Offer(tuple(drafted), tuple(probs) if drawn else None)
        rows = TARGET[[(*PROMPT, *output)[-1], *drafted]]
        output += decide(rows, offer, params, PROMPT, output)
    return tuple(output[:LENGTH])


@cache
def counted(settings: tuple[tuple[str, float], ...], drawn: bool) -> Counter[tuple[int, ...]]:
    return Counter(one_run(SamplingParams(seed=seed, **dict(settings)), drawn=drawn) for seed in range(RUNS))  # type: ignore[arg-type]


def expected(settings: dict[str, float]) -> dict[tuple[int, ...], float]:
    """The probability of every run of LENGTH tokens, by the chain rule."""
    params, found = SamplingParams(**settings), {}  # type: ignore[arg-type]
    for tokens in itertools.product(range(V), repeat=LENGTH):
        chance = 1.0
        for place, token in enumerate(tokens):
            last = (*PROMPT, *tokens[:place])[-1]
            chance *= float(sampling.distribution(TARGET[last], params, PROMPT, tokens[:place])[token])
        found[tokens] = chance
    return found


def chi_square(
    counts: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]
) -> tuple[float, float]:
    """(the statistic, what 99.99% of right samplers stay below). Runs of under 5 expected are one cell."""
    assert all(chances[tokens] > 0 for tokens in counts), "a token that the filters forbid was drawn"
    cells = [(counts[tokens], RUNS * chance) for tokens, chance in chances.items() if RUNS * chance >= 5]
    rest = RUNS - sum(seen for seen, _ in cells), RUNS - sum(wanted for _, wanted in cells)
    cells += [rest] if rest[1] >= 5 else []
    freedom = len(cells) - 1
    # Wilson and Hilferty's normal approximation; 3.719 is the normal's 99.99%.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in cells), limit


@pytest.mark.parametrize("drawn", [True, False], ids=["draft model", "lookup"])
@pytest.mark.parametrize("settings", [{"temperature": 1.0}, ALL_FILTERS], ids=["plain", "all filters"])
def test_the_distribution_is_the_targets(settings: dict[str, float], drawn: bool) -> None:
    found, limit = chi_square(counted(tuple(settings.items()), drawn), expected(settings))
    print(f"chi-square {found:.1f}, limit {limit:.1f}")
    assert found < limit


def replace_from_target(p: Tensor, q: Tensor, token: int, seed: int, position: int) -> int:
    """Wrong: what falls is replaced from the target, not from what the draft left of it."""
    if uniform(seed, position, Purpose.ACCEPT) * float(q[token]) < float(p[token]):
        return token
    return draw(p, uniform(seed, position, Purpose.RESIDUAL))


def accept_always(p: Tensor, q: Tensor, token: int, seed: int, position: int) -> int:
    """Wrong: the draft's own distribution."""
    return token


def reuse_the_number(p: Tensor, q: Tensor, token: int, seed: int, position: int) -> int:
    """Wrong: the number that let the token fall also chooses its replacement."""
    number = uniform(seed, position, Purpose.ACCEPT)
    if number * float(q[token]) < float(p[token]):
        return token
    return draw((p - q).clamp(min=0), number)


@pytest.mark.parametrize("wrong", [replace_from_target, accept_always, reuse_the_number])
def test_the_test_catches_a_wrong_sampler(wrong: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "accept_or_replace", wrong)
    counts = Counter(one_run(SamplingParams(seed=seed, temperature=1.0), drawn=True) for seed in range(RUNS))
    found, limit = chi_square(counts, expected({"temperature": 1.0}))
    print(f"{wrong.__name__}: chi-square {found:.1f}, limit {limit:.1f}")
    assert found > limit


@pytest.mark.parametrize("settings", [{"temperature": 1.3, "top_p": 0.9}, {"temperature": 0.0}])
def test_fixed_drafts_change_no_token(settings: dict[str, float]) -> None:
    """A draft without a draw is verified by the target's own draw: the same tokens as without a draft."""
    for seed in range(50):
        params = SamplingParams(seed=seed, **settings)  # type: ignore[arg-type]
        without: list[int] = []
        while len(without) < LENGTH:
            without += decide(TARGET[[(*PROMPT, *without)[-1]]], NOTHING, params, PROMPT, without)
        assert one_run(params, drawn=False) == tuple(without)


def test_a_draft_that_agrees_stands_whole() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    probs = [sampling.distribution(TARGET[last], params, PROMPT, ()) for last in (0, 1, 2)]
    offer = Offer((1, 2), tuple(probs[:2]))
    assert decide(TARGET[[0, 1, 2]], offer, params, PROMPT, ())[:2] == (1, 2)


def test_greedy_keeps_the_agreeing_part_and_adds_one() -> None:
    best = TARGET.argmax(-1).tolist()
    right = [best[0], best[best[0]]]
    wrong = (right[1] + 1) % V
    rows = TARGET[[0, right[0], wrong]]
    found = decide(rows, Offer((right[0], wrong)), SamplingParams(), PROMPT, ())
    assert found == (right[0], right[1])
    assert decide(rows[:2], Offer((right[0], wrong)), SamplingParams(), PROMPT, ()) == (right[0], right[1])
    punished = SamplingParams(frequency_penalty=100.0)
    assert decide(TARGET[[0, 0]], Offer((best[0],)), punished, PROMPT, ())[1] != best[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_nan_is_refused_where_it_counts(settings: dict[str, float], dtype: torch.dtype) -> None:
    """Behind a token that fell nothing counts."""
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    nan = TARGET[[0, 1, 2]].to(dtype)
    nan[1, 3] = torch.nan
    one_hot = torch.zeros(V, dtype=torch.float64)
    one_hot[best := int(nan[0].argmax())] = 1.0
    offer = Offer((best, 1), (one_hot, one_hot) if params.temperature else None)
    with pytest.raises(CheckpointError, match="logits of position [12] are not numbers"):
        for seed in range(20):  # a sampled token may fall
            decide(nan, offer, replace(params, seed=seed), PROMPT, ())
    with pytest.raises(CheckpointError, match="logits of position 1 are not numbers"):
        decide(nan[1:2], NOTHING, params, PROMPT, ())
    with pytest.raises(CheckpointError, match="logits of position 1 are not numbers"):
        draw_draft(nan[1], params, PROMPT, (), V)
    if not params.temperature:
        assert len(decide(nan, Offer(((best + 1) % V, 1)), params, PROMPT, ())) == 1


def test_replacement_when_nothing_is_left() -> None:
    """p equal to q but for rounding, and a token that fell all the same: drawn from p."""
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64) * (1 + 1e-9)
    for seed in range(100):
        assert accept_or_replace(p, q, 0, seed, 7) in (0, 1)


def test_draft_models_draw_inside_the_targets_vocabulary() -> None:
    logits = torch.zeros(8)
    logits[7] = 50.0
    params = SamplingParams(temperature=1.0)
    token, probs = draw_draft(logits, params, PROMPT, (), 6)
    assert token < 6 and probs is not None and probs.shape == (6,)
    assert draw_draft(logits, SamplingParams(), PROMPT, (), 6)[0] < 6
    _, padded = draw_draft(logits, params, PROMPT, (), 10)
    assert padded is not None and padded.shape == (10,) and float(padded[8:].sum()) == 0
