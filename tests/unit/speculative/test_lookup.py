"""Prompt lookup against a slow search through all earlier places."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tp_runtime.config import SamplingParams
from tp_runtime.engine.sequence import Sequence
from tp_runtime.engine.speculative.lookup import LookupDraft, Match, NgramIndex
from tp_runtime.engine.tokenizing import NoText


def obvious(tokens: list[int]) -> Match | None:
    """Of the 16 latest places that agree in two tokens, else in one: the longest, most alike, latest."""
    end, best = len(tokens), None
    for least in (2, 1):
        places = [p for p in range(least, end) if tokens[p - least : p] == tokens[end - least :]][-16:]
        for position in places:
            same = [tokens[position - 1 - i] == tokens[end - 1 - i] for i in range(min(position, 32))]
            length = same.index(False) if False in same else len(same)
            key = (length, sum(same), position)
            if best is None or key > best:
                best = key
        if best is not None:
            return Match(best[2], best[0])
    return None


@given(st.lists(st.integers(0, 6), max_size=50) | st.lists(st.integers(0, 1), max_size=150))
@settings(max_examples=300, deadline=None)
def test_find_against_the_obvious(tokens: list[int]) -> None:
    index = NgramIndex()
    index.extend(tokens)
    assert index.find() == obvious(tokens)


@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.integers(0, 5), max_size=40))
@settings(max_examples=100, deadline=None)
def test_extending_in_parts_is_extending_at_once(first: list[int], second: list[int]) -> None:
    parts, whole = NgramIndex(), NgramIndex()
    parts.extend(first)
    parts.find()
    parts.extend(second)
    whole.extend(first + second)
    assert parts.find() == whole.find()


def test_longest_agreement_wins_over_the_latest_place() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3])
    assert index.find() == Match(3, 3)
    assert index.continuation(Match(3, 3), 3) == (9, 7, 2)


def test_loops_go_on() -> None:
    index = NgramIndex()
    index.extend([5, 6, 7, 5, 6, 7, 5, 6])
    match = index.find()
    assert match is not None
    assert index.continuation(match, 7) == (7, 5, 6, 7, 5, 6, 7)


def test_among_equals_the_most_alike_wins() -> None:
    """A record of the same kind, although one field differs, over a later one of another kind."""
    index = NgramIndex()
    index.extend([1, 10, 3, 5, 30, 1, 20, 4, 5, 40, 1, 11, 3, 5])
    assert index.find() == Match(4, 2)
    index.extend([30, 1, 20, 4, 6, 1, 11, 4, 5])
    assert index.find() == Match(9, 2)


def test_one_token_is_looked_up_where_two_are_new() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 2])
    assert index.find() == Match(2, 1)


def test_nothing_to_offer() -> None:
    for tokens in ([], [1], [1, 2], [1, 2, 3]):
        index = NgramIndex()
        index.extend(tokens)
        assert index.find() is None


def test_drafts_follow_a_sequence() -> None:
    draft = LookupDraft()
    answer = Sequence((1, 2, 3, 4, 5, 6), SamplingParams(), frozenset(), NoText())
    answer.output = [9]
    assert draft.grade(answer) is None
    answer.output += [2, 3]
    assert draft.grade(answer) == 2
    assert draft.draft([(answer, 2)])[0].tokens == (4, 5)
    answer.output += [4]
    assert draft.grade(answer) == 3
    assert draft.draft([(answer, 4)])[0].tokens == (5, 6, 9, 2)
    draft.release(answer)
    assert not draft._indices and not draft._matches
