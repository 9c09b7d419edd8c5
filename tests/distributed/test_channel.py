"""Messages from rank 0 arrive whole and in order; while it is silent the others stay patient."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tp_testing.ranks import run_ranks

from tp_runtime.engine.channel import INLINE, Operation, from_words, to_words


@given(st.text(max_size=50))
def test_words_hold_text(text: str) -> None:
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert from_words(to_words(text)) == text


def talk_body(sizes: list[int], silence_s: float, limit_s: float) -> list[list[int]]:
    from tp_runtime.collectives import attach, set_timeout
    from tp_runtime.engine.channel import Channel
    from tp_runtime.mesh import init_mesh, tp_group

    group = tp_group(init_mesh())
    attach(group, 60.0)
    set_timeout(group, limit_s)
    channel = Channel(group, idle_s=limit_s / 3)
    received = []
    for index, size in enumerate(sizes):
        words = np.arange(index, index + size, dtype=np.int32)
        if channel.is_source:
            time.sleep(silence_s)
            channel.send(Operation.STEP, words)
        else:
            operation, words = channel.receive()
            assert operation is Operation.STEP
        received.append([len(words), int(words.sum())])
    channel.close()
    channel.close()
    return received


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.full)])
def test_messages_of_every_size(world: int) -> None:
    sizes = [0, 1, INLINE - 1, INLINE, INLINE + 1, 5000]
    results = run_ranks(world, talk_body, sizes, 0.0, 30.0)
    assert results == [results[0]] * world
    assert [size for size, _ in results[0]] == sizes


def test_silence_is_not_death() -> None:
    """Rank 0 says nothing for three times the deadline; its signs of life keep rank 1 waiting."""
    results = run_ranks(2, talk_body, [3], 6.0, 2.0)
    assert results[1] == [[3, 3]]
