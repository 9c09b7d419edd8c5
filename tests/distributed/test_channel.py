"""Messages from rank 0 arrive whole and in order; while it is silent the others stay patient."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tp_testing.ranks import run_ranks

from tp_runtime.engine.channel import INLINE, Operation, from_words, to_words


@given(st.text(max_size=50))
def test_words_hold_text(text: str) -> None:
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert from_words(to_words(text)) == text


def talk_body(sizes: list[int], silence_s: float, limit_s: float) -> list[list[int]]:
    from tp_runtime.collectives import attach
    from tp_runtime.engine.channel import Channel
    from tp_runtime.mesh import init_mesh, tp_group

    group = tp_group(init_mesh())
    attach(group, 60.0)
    channel = Channel(group, limit_s=limit_s, patience_s=60.0)
    channel.begin()
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


def pause_body(transport: str, pauses: list[float], limit_s: float) -> list[int]:
    """Three conversations; this rank pauses for its own time before the second and the third."""
    from tp_runtime.collectives import all_reduce, attach
    from tp_runtime.engine.channel import Channel
    from tp_runtime.mesh import init_mesh, tp_group

    group = tp_group(init_mesh())
    assert attach(group, 60.0, transport=transport) == transport
    channel = Channel(group, limit_s=limit_s, patience_s=60.0)
    received = []
    for index in range(3):
        if index:
            time.sleep(pauses[group.rank()])
        channel.begin()
        words = np.asarray([index], np.int32)
        if channel.is_source:
            channel.end(Operation.RESULT, words)
        else:
            operation, words = channel.receive()
            assert operation is Operation.RESULT
        # Between conversations the group is anybody's.
        received += [int(words[0]), int(all_reduce(torch.ones(1, dtype=torch.int32), group))]
    channel.close()
    return received


PAUSES = {
    (who, transport): pytest.param(
        transport,
        pauses,
        id=f"{who}-{transport}",
        marks=[] if (who, transport) in (("both", "shm"), ("rank 0", "c10d")) else [pytest.mark.full],
    )
    for who, pauses in {"both": [2.5, 2.5], "rank 0": [2.5, 0.0], "rank 1": [0.0, 2.5]}.items()
    for transport in ("shm", "c10d")
}


@pytest.mark.parametrize(("transport", "pauses"), PAUSES.values())
def test_pauses_between_calls_are_no_fault(transport: str, pauses: list[float]) -> None:
    """Longer than the deadline, of both ranks or of one alone, and no message meets another collective."""
    assert run_ranks(2, pause_body, transport, pauses, 1.0) == [[0, 2, 1, 2, 2, 2]] * 2
