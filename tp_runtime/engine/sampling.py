"""From logits to a token, one row at a time, on the one rank that samples.

A draw is a pure function of (seed, position, purpose): the row's seed, the position the token will
take, and what it is for. Batch mates, world size and step shapes cannot change it. Filters apply in
the order penalties, temperature, top-k, top-p, min-p; the token is the one at which the cumulative
probability, in vocabulary order, passes the drawn number.

Legend: V vocabulary, C candidates.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SamplingParams
from ..errors import CheckpointError

_MASK = (1 << 64) - 1
_HEAD = 512  # likeliest tokens that are sorted first


class Purpose(enum.IntEnum):
    """What a draw is for; draws of different purposes at one position are independent."""

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """A number in [0, 1) that depends on its arguments alone, with 53 random bits."""
    return (_mix(_mix(_mix(seed) ^ position) ^ int(purpose)) >> 11) * 2.0**-53


def penalise(
    logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> Tensor:
    """Logits with the repetition, presence and frequency penalties applied (a new tensor if any is on)."""
    if params.repetition_penalty != 1 and (prompt or output):
        seen = torch.tensor(sorted({*prompt, *output}), device=logits_V.device)
        values = logits_V[seen]
        scaled = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
        logits_V = logits_V.index_copy(0, seen, scaled)
    if output and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.tensor(output, device=logits_V.device).unique(return_counts=True)
        drop = params.presence_penalty + params.frequency_penalty * counts.to(logits_V.dtype)
        logits_V = logits_V.index_add(0, tokens, -drop.to(logits_V.dtype))
    return logits_V


def _first_largest(values_C: Tensor, count: int, least: Tensor) -> Tensor:
    """Indices, ascending, of the `count` largest values, `least` being the last; of equal ones the first."""
    above, equal = (values_C > least).nonzero()[:, 0], (values_C == least).nonzero()[:, 0]
    missing = count - above.numel()
    return above if missing == 0 else torch.cat((above, equal[:missing])).sort().values


def _heated(logits_C: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, the largest 0: the others may end at -inf, and none overflows. float64."""
    return (logits_C.double() - logits_C.max()) / temperature


def _nucleus(logits_C: Tensor, temperature: float, top_p: float) -> Tensor:
    """Indices, ascending, of the fewest likeliest values whose probabilities reach top_p.

    Of a large vocabulary only its head is sorted: the mass is that of all, and few values hold most of it.
    """
    mass = torch.logsumexp(_heated(logits_C, temperature), dim=-1)
    size = min(_HEAD, logits_C.numel())
    while True:
        head = torch.topk(logits_C, size).values
        probs = torch.exp(_heated(head, temperature) - mass)
        count = max(1, int((probs.cumsum(0) - probs < top_p).sum()))
        if count < size or size == logits_C.numel():
            return _first_largest(logits_C, count, head[count - 1])
        size = min(8 * size, logits_C.numel())


def _candidates(
    logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> tuple[Tensor | None, Tensor]:
    """(ids, ascending, that may be drawn, or None for all; their probabilities, float64, sum 1)."""
    values = penalise(logits_V.float(), params, prompt, output)
    if params.temperature == 0:
        return values.argmax().view(1), torch.ones(1, dtype=torch.float64, device=values.device)
    ids: Tensor | None = None
    if params.top_k and params.top_k < values.numel():
        ids = _first_largest(values, params.top_k, torch.topk(values, params.top_k).values[-1])
        values = values[ids]
    if params.top_p < 1:
        kept = _nucleus(values, params.temperature, params.top_p)
        ids, values = kept if ids is None else ids[kept], values[kept]
    if params.min_p > 0:
        kept = (values >= values.max() + params.temperature * math.log(params.min_p)).nonzero()[:, 0]
        ids, values = kept if ids is None else ids[kept], values[kept]
    return ids, torch.softmax(_heated(values, params.temperature), dim=-1)


def distribution(
    logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> Tensor:
    """The probabilities [V] (float64, sum 1) the next token is drawn from; one-hot where greedy.

    Raises CheckpointError where a logit is NaN.
    """
    refuse_nan(float(logits_V.max()), len(prompt) + len(output))
    ids, probs = _candidates(logits_V, params, prompt, output)
    if ids is None:
        return probs
    zeros_V = torch.zeros(logits_V.numel(), dtype=torch.float64, device=logits_V.device)
    return zeros_V.index_copy_(0, ids, probs)


def draw(probs_V: Tensor, number: float) -> int:
    """The index at which the cumulative probability passes `number` in [0, 1)."""
    cumulative = probs_V.cumsum(0)
    token = int(torch.searchsorted(cumulative, number * float(cumulative[-1]), right=True))
    if token < probs_V.numel() and probs_V[token] > 0:
        return token
    return int(probs_V.nonzero()[-1])  # rounding pushed the number past the last possible token


def _largest(logits_V: Tensor) -> int:
    # numpy's argmax runs on vectors; torch's takes ten times as long on one thread.
    if logits_V.device.type == "cpu" and logits_V.dtype is torch.float32:
        return int(logits_V.numpy().argmax())
    return int(logits_V.argmax())


def refuse_nan(value: float, position: int) -> None:
    """Raise CheckpointError where `value`, the largest logit of the token at `position`, is NaN."""
    if math.isnan(value):
        raise CheckpointError(
            f"the logits of position {position} are not numbers: the weights hold NaN, or the model "
            "overflows in this dtype; check the files, or use --dtype bf16 or fp32"
        )


def sample(
    logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], position: int
) -> int:
    """The token at `position`, after `prompt` and `output`. logits_V: [V], any float dtype.

    Raises CheckpointError where one of them is NaN.
    """
    if params.plain_greedy:
        token = _largest(logits_V)  # of NaN where there is any
        refuse_nan(float(logits_V[token]), position)
        return token
    refuse_nan(float(logits_V.max()), position)
    if params.temperature == 0:
        return int(penalise(logits_V.float(), params, prompt, output).argmax())
    ids, probs = _candidates(logits_V, params, prompt, output)
    drawn = draw(probs, uniform(params.seed, position, Purpose.TARGET))
    return drawn if ids is None else int(ids[drawn])


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of the chosen token, and of the likeliest ones as (id, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of the model's own distribution: raw logits, before penalties and temperature."""
    values_V = torch.log_softmax(logits_V.float(), dim=-1)
    top = torch.topk(values_V, min(count, values_V.numel()))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprobs(token, float(values_V[token]), pairs)
