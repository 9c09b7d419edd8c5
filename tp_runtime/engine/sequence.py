"""One sequence on its way through the engine: tokens, blocks, text so far, and why it ended. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..config import SamplingParams


class TextStream(Protocol):
    """A streaming detokeniser: text that is certain so far."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class Completion:
    """What became of one prompt.

    tokens: new ids, the end token included where one was drawn. finish_reason: "stop" (an end token or
    a stop string), "length", or "cancelled" (on_text returned False). logprobs: one entry a new token, where
    asked for.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    logprobs: tuple[Any, ...] | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)


class StopFinder:
    """Watches text for stop strings; holds back what may still become one."""

    def __init__(self, stops: Seq[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def push(self, piece: str) -> str:
        """Text that is certain to belong to the answer, after `piece` arrived."""
        if self.found:
            return ""
        text = self._held + piece
        hits = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)]
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self.stops), default=0) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                return size
        return 0


@dataclass
class Sequence:
    """A prompt being answered.

    num_cached: tokens whose keys and values lie in the blocks. text: the answer as emitted so far.
    draft: tokens that may follow the last known one, to be verified in the next step.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int]
    stream: TextStream
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0
    draft: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[Any] = field(default_factory=list)
    _stops: StopFinder | None = None

    def __post_init__(self) -> None:
        self._stops = StopFinder(self.params.stop)

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def most_tokens(self) -> int:
        """Tokens whose keys and values may come to lie in the cache (the last one drawn never does)."""
        return len(self.prompt) + self.params.max_new_tokens - 1

    def pending(self, limit: int) -> tuple[int, ...]:
        """The next tokens to run, at most `limit`: of the prompt, or the token drawn last and the draft."""
        start = self.num_cached
        if start < len(self.prompt):
            return self.prompt[start : start + limit]
        return (*self.output[start - len(self.prompt) :], *self.draft)[:limit]

    def accept(self, token: int) -> str:
        """Take a drawn token; the text that became certain. Sets finish_reason where this ends it."""
        assert self._stops is not None
        self.output.append(token)
        if token in self.eos_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
            piece = self._stops.push(self.stream.flush()) + self._stops.flush()
        else:
            piece = self._stops.push(self.stream.push(token))
            if len(self.output) >= self.params.max_new_tokens:
                self.finish_reason = "length"
                piece += self._stops.push(self.stream.flush()) + self._stops.flush()
            if self._stops.found:
                self.finish_reason = "stop"
        self.text += piece
        return piece

    def completion(self) -> Completion:
        """The outcome, once finish_reason is set."""
        assert self.finish_reason is not None, "the sequence still runs"
        reported = tuple(self.logprobs) if self.params.logprobs is not None else None
        return Completion(self.text, tuple(self.output), len(self.prompt), self.finish_reason, reported)
