"""Prompt lookup against a slow search through all earlier places."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tp_runtime.config import SamplingParams
from tp_runtime.engine.sequence import Sequence
from tp_runtime.engine.speculative.lookup import LookupDraft, Match, NgramIndex
from tp_runtime.engine.tokenizing import NoText


def obvious(tokens: list[int]) -> Match | None:
    """The latest of the earlier places whose past agrees longest with the end."""
    best = None
    for position in range(len(tokens) - 1, 1, -1):
        length = 0
        while (
            length < min(position, 32) and tokens[position - 1 - length] == tokens[len(tokens) - 1 - length]
        ):
            length += 1
        if length >= 2 and (best is None or length > best.length):
            best = Match(position, length)
    return best


@given(st.lists(st.integers(0, 6), max_size=50))
@settings(max_examples=300, deadline=None)
def test_find_against_the_obvious(tokens: list[int]) -> None:
    """Up to 50 tokens a pair has at most 16 places or it repeats itself so that the kept ones agree best."""
    index = NgramIndex()
    index.extend(tokens)
    found, wanted = index.find(), obvious(tokens)
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert found.length == wanted.length or len(tokens) > 18
        assert found.position == wanted.position or found.length != wanted.length


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
