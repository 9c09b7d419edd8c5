"""The step descriptor travels unharmed, and its tensors place every token where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_runtime.engine.step import Row, Step, StepTensors, bucket

BLOCK = 4


@st.composite
def rows(draw: st.DrawFn) -> Row:
    tokens = tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=9)))
    start = draw(st.integers(0, 20))
    count = -(-(start + len(tokens)) // BLOCK)
    blocks = tuple(draw(st.permutations(range(1, 12)))[:count])
    return Row(tokens, start, blocks, draw(st.integers(0, len(tokens))))


steps = st.lists(rows(), min_size=1, max_size=4).map(lambda found: Step(tuple(found)))


@given(steps)
@settings(max_examples=100, deadline=None)
def test_pack_round_trip(step: Step) -> None:
    words = step.pack()
    assert words.dtype == np.int32
    assert Step.unpack(words) == step


@given(steps, st.booleans())
@settings(max_examples=100, deadline=None)
def test_tensors_against_the_obvious(step: Step, pad: bool) -> None:
    made = StepTensors.build(
        step, block_size=BLOCK, max_blocks=12, max_rows=4, max_tokens=64, pad=pad, device="cpu"
    )
    tokens, positions, slots, wanted = [], [], [], []
    for row in step.rows:
        for i, token in enumerate(row.tokens):
            position = row.start + i
            if i >= len(row.tokens) - row.num_logits:
                wanted.append(len(tokens))
            tokens.append(token)
            positions.append(position)
            slots.append(row.blocks[position // BLOCK] * BLOCK + position % BLOCK)
    n = step.num_tokens
    assert made.tokens_T[:n].tolist() == tokens
    assert made.positions_T[:n].tolist() == positions
    assert made.slots_T[:n].tolist() == slots
    assert made.logit_rows_L[: made.num_logits].tolist() == wanted
    assert made.query_start[len(step.rows) :].tolist() == [n] * (made.query_start.numel() - len(step.rows))
    assert made.context_lens_R[: len(step.rows)].tolist() == [row.context_len for row in step.rows]
    assert all(slot < BLOCK for slot in made.slots_T[n:].tolist()), "padding must write to the scratch block"
    if not pad:
        assert made.tokens_T.numel() == n and made.block_table_RB.shape[0] == len(step.rows)


@pytest.mark.parametrize(
    ("count", "limit", "size"),
    [(1, 512, 1), (2, 512, 2), (3, 512, 4), (300, 512, 512), (5, 6, 6), (6, 6, 6), (0, 8, 1), (7, 4, 7)],
)
def test_bucket(count: int, limit: int, size: int) -> None:
    assert bucket(count, limit) == size
