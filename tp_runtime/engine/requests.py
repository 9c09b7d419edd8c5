"""What a Python caller brings: prompts and how to sample, looked at before anything runs. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

from ..config import SamplingParams
from ..errors import RequestError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def with_params(
    prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Every prompt with its parameters: one for all, one a prompt, or None for the defaults.

    Raises RequestError for what is no list of prompts, and for other parameters or another number of them.
    """
    if isinstance(prompts, str):
        raise RequestError("prompts is a single string; give a list of prompts")
    try:
        if isinstance(prompts, bytes | bytearray | Mapping | Set):  # a set has no order that ranks agree on
            raise TypeError
        every = iter(prompts)
    except TypeError:
        raise RequestError(f"prompts is of type {type(prompts).__name__}; give a list of prompts") from None
    listed = list(every)
    one = SamplingParams() if params is None else params
    each = list(one) if isinstance(one, Sequence) else [one] * len(listed)
    if not all(isinstance(its, SamplingParams) for its in each):
        raise RequestError("params is no SamplingParams (nor a list of them); give SamplingParams(...)")
    if len(each) != len(listed):
        raise RequestError(f"{len(listed)} prompts came with {len(each)} sampling parameters; give one each")
    return list(zip(listed, each, strict=True))


def prompt_items(prompt: Any) -> list[Any]:
    """The token ids or chat messages of a prompt that is no text; an array or tensor counts as a list.

    Raises RequestError for what is no list.
    """
    try:
        found = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    except NotImplementedError:  # a tensor on the meta device
        raise RequestError("a prompt is a tensor without values; give one of token ids") from None
    if isinstance(found, str | bytes | bytearray) or not isinstance(found, Sequence):
        raise RequestError(
            f"a prompt is of type {type(prompt).__name__}; give a text, a list of chat messages or one of "
            f"token ids"
        )
    return list(found)


def token_ids(found: Sequence[Any], vocab_size: int) -> tuple[int, ...]:
    """Those ids as plain numbers. Raises RequestError for others than 0 .. vocab_size - 1."""
    for token in found:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise RequestError(
                f"a prompt holds a {type(token).__name__} where a token id should be; give whole numbers"
            )
        if not 0 <= int(token) < vocab_size:
            raise RequestError(
                f"the prompt has token ids outside 0..{vocab_size - 1}, the model's vocabulary"
            )
    return tuple(int(token) for token in found)
