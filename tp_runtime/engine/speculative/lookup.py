"""Prompt lookup: the answer repeats what prompt or answer said before. No model, no torch.

An index holds, for every token and every pair of neighbouring ones, where it was seen last and some times
before. A draft is what followed the place whose past agrees longest with the end of the sequence; on equal
length, the one that agrees at most of the last _LONGEST tokens although others differ (records that vary in
one field), then the latest. Where the last two tokens never stood together the last one alone is looked up:
seldom right, and so its grade begins with a low acceptance. Past the end of what is known a draft goes on
from its own tokens, so a loop is drafted as a loop.

Looking up takes tens of microseconds and the index two entries a token. After: Saxena, Prompt Lookup
Decoding, 2023 (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import eq

from ..sequence import Sequence
from .interface import Drafter, Offer

_PLACES = 16  # of one pair, or one token, that are compared; the oldest is dropped
_LONGEST = 32  # agreement beyond this is not counted


@dataclass(frozen=True)
class Match:
    """An earlier place. position: of the token that followed there. length: tokens that agree before it."""

    position: int
    length: int


class NgramIndex:
    """Where tokens and pairs of neighbouring ones were seen in one growing list of tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: Seq[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self.tokens.append(token)
            at = len(self.tokens) - 1  # what stands before `token` is now known to be followed by it
            for length in range(1, min(2, at) + 1):
                places = self._places.setdefault(tuple(self.tokens[at - length : at]), [])
                places.append(at)
                if len(places) > _PLACES:
                    del places[0]

    def find(self) -> Match | None:
        """The place that agrees best with the end; None where the last token is new."""
        pair, one = tuple(self.tokens[-2:]), tuple(self.tokens[-1:])
        places = self._places.get(pair) or self._places.get(one) or ()
        lengths = {position: self._agreement(position) for position in places}
        longest = max(lengths.values(), default=0)
        best = [position for position in places if lengths[position] == longest]
        if not best:
            return None
        if len(best) == 1 or longest == _LONGEST:
            return Match(best[-1], longest)
        return Match(max(best, key=lambda position: (self._resemblance(position), position)), longest)

    def _agreement(self, position: int) -> int:
        """Tokens before `position` that equal those at the end of the list."""
        tokens, end, length = self.tokens, len(self.tokens), 0
        most = min(position, _LONGEST)
        while length < most and tokens[position - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length

    def _resemblance(self, position: int) -> int:
        """How many of the _LONGEST tokens before `position` equal those at the end, in their places."""
        past, end = self.tokens[max(0, position - _LONGEST) : position], self.tokens[-_LONGEST:]
        return sum(map(eq, reversed(past), reversed(end)))

    def continuation(self, match: Match, count: int) -> tuple[int, ...]:
        """The `count` tokens that followed the match, read on into themselves where they run out."""
        found: list[int] = []
        for at in range(match.position, match.position + count):
            found.append(self.tokens[at] if at < len(self.tokens) else found[at - len(self.tokens)])
        return tuple(found)


class LookupDraft(Drafter):
    """Drafts by NgramIndex, one for each sequence."""

    costs_steps = False
    priors = {1: (0.5, 1.5)}

    def __init__(self) -> None:
        self._indices: dict[int, NgramIndex] = {}
        self._matches: dict[int, Match] = {}

    def grade(self, sequence: Sequence) -> int | None:
        """Tokens in agreement up to 3, then 4 for 4-7, 5 for 8-15, 6 for more."""
        index = self._indices.setdefault(id(sequence), NgramIndex())
        held, prompt = len(index.tokens), sequence.prompt
        if held < len(prompt):
            index.extend(prompt[held:])
            held = len(prompt)
        index.extend(sequence.output[held - len(prompt) :])
        match = index.find()
        if match is None:
            return None
        self._matches[id(sequence)] = match
        return match.length if match.length < 4 else min(match.length.bit_length() + 1, 6)

    def draft(self, rows: Seq[tuple[Sequence, int]]) -> list[Offer]:
        return [
            Offer(self._indices[id(sequence)].continuation(self._matches[id(sequence)], count))
            for sequence, count in rows
        ]

    def release(self, sequence: Sequence) -> None:
        self._indices.pop(id(sequence), None)
        self._matches.pop(id(sequence), None)
