"""The block pool: whatever is done to it, no block is lost or handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_runtime.engine.kv_blocks import BlockPool


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 9)), max_size=60))
def test_any_history_is_sane(history: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(12, 4), []
    for action, number in history:
        if action == "allocate" and number <= pool.num_free:
            held.append(pool.allocate(number))
        elif action == "share" and held:
            blocks = held[number % len(held)]
            pool.share(blocks)
            held.append(list(blocks))
        elif action == "release" and held:
            pool.release(held.pop(number % len(held)))
        pool.sanity_checks()
    for blocks in held:
        pool.release(blocks)
    pool.sanity_checks()
    assert pool.num_free == 11


def test_misuse_is_caught() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(blocks)
    with pytest.raises(AssertionError, match="4 blocks wanted, 3 free"):
        pool.allocate(4)


def test_blocks_for() -> None:
    pool = BlockPool(4, 32)
    assert [pool.blocks_for(n) for n in (0, 1, 32, 33, 64)] == [0, 1, 1, 2, 2]
