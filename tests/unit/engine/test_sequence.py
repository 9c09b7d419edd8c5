"""Stops, lengths and admission: rank 0's bookkeeping, without a model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tp_runtime.config import SamplingParams
from tp_runtime.engine.batch import Batch
from tp_runtime.engine.kv_blocks import BlockPool
from tp_runtime.engine.sequence import Sequence, StopFinder
from tp_runtime.errors import MemoryLimitError


class Letters:
    """A detokeniser whose token n is the letter chr(n)."""

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


def answer(prompt: str = "ab", eos: str = "!", **params: object) -> Sequence:
    return Sequence(tuple(map(ord, prompt)), SamplingParams(**params), frozenset(map(ord, eos)), Letters())


@given(
    st.lists(st.text("abc", max_size=3), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_finder_against_the_obvious(pieces: list[str], stops: list[str]) -> None:
    finder, emitted = StopFinder(stops), ""
    for piece in pieces:
        emitted += finder.push(piece)
        assert not any(stop in emitted for stop in stops)
    text = "".join(pieces)
    found = finder.found
    emitted += finder.flush()
    assert found == any(stop in text for stop in stops)
    if not found:
        assert emitted == text
    else:
        assert text.startswith(emitted)


def drive(sequence: Sequence, text: str) -> str:
    shown = ""
    for letter in text:
        shown += sequence.accept(ord(letter))
        if sequence.finish_reason:
            break
    return shown


@pytest.mark.parametrize(
    ("params", "drawn", "text", "reason", "count"),
    [
        ({"max_new_tokens": 3}, "xyz", "xyz", "length", 3),
        ({}, "xy!z", "xy", "stop", 3),
        ({"ignore_eos": True, "max_new_tokens": 4}, "xy!z", "xy!z", "length", 4),
        ({"stop": ("yz",)}, "wxyz", "wx", "stop", 4),
        ({"stop": ("yz",), "max_new_tokens": 3}, "wxyz", "wxy", "length", 3),
        ({"stop": ("yz",)}, "wxy!", "wxy", "stop", 4),
    ],
)
def test_how_an_answer_ends(params: dict, drawn: str, text: str, reason: str, count: int) -> None:
    sequence = answer(**params)
    assert drive(sequence, drawn) == text
    done = sequence.completion()
    assert (done.text, done.finish_reason, done.new_tokens, done.prompt_tokens) == (text, reason, count, 2)


def test_pending_tokens() -> None:
    sequence = answer("abcdef")
    assert sequence.pending(4) == tuple(map(ord, "abcd"))
    sequence.num_cached = 4
    assert sequence.pending(4) == tuple(map(ord, "ef"))
    sequence.num_cached = 6
    sequence.accept(ord("x"))
    assert sequence.pending(4) == (ord("x"),)


def test_batch_runs_everything_and_loses_no_block() -> None:
    chance = random.Random(0)
    pool = BlockPool(9, 4)
    batch = Batch(pool, max_rows=3, max_tokens=8)
    answers = [answer("a" * chance.randint(1, 12), max_new_tokens=chance.randint(1, 9)) for _ in range(20)]
    for one in answers:
        batch.add(one)
    steps = 0
    while batch.busy:
        batch.admit()
        rows = batch.next_rows()
        assert rows, "a step must do something"
        assert sum(len(tokens) for _, tokens in rows) <= 8 and len(rows) <= 3
        for one, tokens in rows:
            one.num_cached += len(tokens)
            assert one.num_cached <= len(one.blocks) * 4
            if one.num_cached == one.num_tokens:
                one.accept(ord("x"))
        batch.retire()
        pool.sanity_checks()
        steps += 1
        assert steps < 1000
    assert pool.num_free == 8 and all(one.finish_reason == "length" for one in answers)


def test_a_batch_that_is_broken_off_gives_its_blocks_back() -> None:
    pool = BlockPool(9, 4)
    batch = Batch(pool, max_rows=2, max_tokens=8)
    for _ in range(3):
        batch.add(answer("abcdef", max_new_tokens=6))
    batch.admit()
    assert pool.num_free == 2
    batch.clear()
    assert pool.num_free == 8 and not batch.busy
    pool.sanity_checks()


def test_a_pool_that_others_hold_is_a_sentence() -> None:
    pool = BlockPool(9, 4)
    pool.allocate(7)
    batch = Batch(pool, max_rows=2, max_tokens=8)
    batch.add(answer("abcdef", max_new_tokens=6))
    with pytest.raises(MemoryLimitError, match="needs 3 blocks of the cache, of which 1 of 8 are free"):
        batch.admit()
