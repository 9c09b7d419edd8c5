"""From logits to a token, one row at a time, on the one rank that samples.

A draw is a pure function of (seed, position, purpose): the row's seed, the position the token will
take, and what it is for. Batch mates, world size and step shapes cannot change it. Filters apply in
the order penalties, temperature, top-k, top-p, min-p; the token is the one at which the cumulative
probability, in vocabulary order, passes the drawn number.

Legend: V vocabulary.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SamplingParams

_MASK = (1 << 64) - 1


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


def distribution(
    logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> Tensor:
    """The probabilities [V] (float64, sum 1) the next token is drawn from; one-hot where greedy."""
    logits_V = penalise(logits_V.float(), params, prompt, output)
    if params.temperature == 0:
        one_hot = torch.zeros_like(logits_V, dtype=torch.float64)
        one_hot[logits_V.argmax()] = 1.0
        return one_hot
    probs_V = torch.softmax(logits_V.double() / params.temperature, dim=-1)
    if params.top_k and params.top_k < probs_V.numel():
        keep = torch.topk(probs_V, params.top_k).indices
        probs_V = torch.zeros_like(probs_V).index_copy(0, keep, probs_V[keep])
        probs_V = probs_V / probs_V.sum()
    if params.top_p < 1:
        ordered, order = torch.sort(probs_V, descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probs_V = probs_V.index_fill(0, order[before >= params.top_p], 0.0)
        probs_V = probs_V / probs_V.sum()
    if params.min_p > 0:
        probs_V = torch.where(probs_V >= params.min_p * probs_V.max(), probs_V, 0.0)
        probs_V = probs_V / probs_V.sum()
    return probs_V


def draw(probs_V: Tensor, number: float) -> int:
    """The token at which the cumulative probability passes `number` in [0, 1)."""
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


def sample(
    logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], position: int
) -> int:
    """The token at `position`, after `prompt` and `output`. logits_V: [V], any float dtype."""
    if params.plain_greedy:
        return _largest(logits_V)
    if params.temperature == 0:
        return int(penalise(logits_V.float(), params, prompt, output).argmax())
    probs_V = distribution(logits_V, params, prompt, output)
    return draw(probs_V, uniform(params.seed, position, Purpose.TARGET))


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
