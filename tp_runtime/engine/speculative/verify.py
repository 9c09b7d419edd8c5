"""Which tokens of a draft stand: the answer has the target's own distribution, whatever the draft offered.

A token x drawn by the draft from q stands with probability min(1, p(x) / q(x)), where p is the target's
distribution after penalties, temperature and filters; the first that falls is replaced by a draw from
max(p - q, 0), normalised. The sum of both ways to a token x is min(p, q)(x) + (p - min(p, q))(x) = p(x).
Where all stand, the target's last row gives one more. Leviathan, Kalman, Matias 2023
(https://arxiv.org/abs/2211.17192); Chen et al. 2023 (https://arxiv.org/abs/2302.01318).

A draft without a draw (lookup; any draft of a greedy row) has q = 1 at its token. Then the rule is carried
out by drawing the target's token as without a draft and comparing: it equals x with probability p(x), and
else it is a draw from p without x. So these rows write the very tokens they write without a draft.

Penalties see each drafted token as if it stood, as the rows behind it do. Every position is decided once,
so its random numbers (position and purpose) are used once.

Legend: N rows of logits, one behind the last known token and one behind each drafted token; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import SamplingParams
from ..sampling import Purpose, distribution, draw, refuse_nan, sample, uniform
from .interface import Offer


def decide(
    logits_NV: Tensor,
    offer: Offer,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
) -> tuple[int, ...]:
    """The row's new tokens: the part of the draft that stands, and one of the target's own. At least one.

    logits_NV: of the target, any float dtype and device; N - 1 tokens of the offer were run. prompt, output:
    the tokens before them. Raises CheckpointError where a row that counts has NaN.
    """
    drafted = offer.tokens[: logits_NV.shape[0] - 1]
    if params.plain_greedy:
        return _greedy(logits_NV, drafted, len(prompt) + len(output))
    logits_NV = logits_NV.cpu()  # one wait for the device, not one a row
    before = list(output)
    for row, token in enumerate(drafted):
        if offer.probs is None:
            position = len(prompt) + len(before)
            chosen = sample(logits_NV[row], params, prompt, before, position)
        else:
            target_V = distribution(logits_NV[row], params, prompt, before)
            chosen = accept_or_replace(
                target_V, offer.probs[row].cpu(), token, params.seed, len(prompt) + len(before)
            )
        before.append(chosen)
        if chosen != token:
            return tuple(before[len(output) :])
    last = sample(logits_NV[len(drafted)], params, prompt, before, len(prompt) + len(before))
    return (*before[len(output) :], last)


def likeliest(logits_NV: Tensor) -> tuple[list[int], list[float]]:
    """The likeliest token of each row, and its logit: NaN where the row has any. Any float dtype, device."""
    if logits_NV.device.type == "cpu" and logits_NV.dtype is torch.float32:
        # numpy's argmax runs on vectors; torch's takes ten times as long on one thread.
        rows = logits_NV.numpy()
        best = rows.argmax(-1).tolist()
        return best, [float(row[token]) for row, token in zip(rows, best, strict=True)]
    values, tokens = logits_NV.max(-1)
    largest, ids = torch.stack((values.double(), tokens.double())).tolist()  # one wait for the device
    return [int(token) for token in ids], largest


def _greedy(logits_NV: Tensor, drafted: Sequence[int], position: int) -> tuple[int, ...]:
    best, largest = likeliest(logits_NV)
    stand = 0
    while stand < len(drafted) and best[stand] == drafted[stand]:
        stand += 1
    for row in range(stand + 1):
        refuse_nan(largest[row], position + row)
    return tuple(best[: stand + 1])


def accept_or_replace(target_V: Tensor, draft_V: Tensor, token: int, seed: int, position: int) -> int:
    """`token`, drawn from draft_V, or its replacement: in sum a draw from target_V. Both float64 [V]."""
    p, q = float(target_V[token]), float(draft_V[token])
    if uniform(seed, position, Purpose.ACCEPT) * q < p:
        return token
    rest_V = (target_V - draft_V).clamp_(min=0)
    # A token falls only where p < q at it, so some other has p > q; rounding alone leaves nothing.
    return draw(rest_V if float(rest_V.sum()) > 0 else target_V, uniform(seed, position, Purpose.RESIDUAL))


def draw_draft(
    logits_V: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    before: Sequence[int],
    vocab_size: int,
) -> tuple[int, Tensor | None]:
    """A draft model's token after prompt and `before`, and the distribution [vocab_size] it came from.

    logits_V: of the draft; ids at and beyond the target's vocab_size are never drawn. The distribution is
    None for a greedy row. The row's own penalties and filters apply: they bring the draft nearer the target.
    """
    logits_V = logits_V[:vocab_size]
    if params.temperature == 0:
        return sample(logits_V, params, prompt, before, len(prompt) + len(before)), None
    probs_V = distribution(logits_V, params, prompt, before)
    number = uniform(params.seed, len(prompt) + len(before), Purpose.DRAFT)
    return draw(probs_V, number), F.pad(probs_V, (0, vocab_size - probs_V.numel()))
