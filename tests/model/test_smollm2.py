"""SmolLM2-135M (9 heads, 3 KV heads: they divide over no even number of ranks) against transformers.

fp32 greedy tokens are identical at every world size, compiled or not, alone or in a batch of three
prompts of different lengths. 576 hidden values and 49152 tokens divide unevenly over 3 ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tp_testing.ranks import run_ranks

BATCHES = {1: [[i] for i in range(8)], 3: [[0, 1, 2], [3, 4, 5], [6, 7, 0]]}
MATRIX = [
    (world, compiled, batch) for world in (1, 2, 3, 4) for compiled in (False, True) for batch in (1, 3)
]
SELECTED = {(1, False, 3), (2, True, 1), (3, False, 1), (4, True, 3)}


def body(
    path: str, prompts: Any, batches: list[list[int]], settings: dict[str, Any]
) -> list[list[tuple[int, ...]]]:
    from tp_runtime.config import SamplingParams
    from tp_runtime.engine.llm import LLM

    params = SamplingParams(max_new_tokens=64, ignore_eos=True)
    with LLM(path, max_batch=3, context=256, **settings) as llm:
        return [
            [done.tokens for done in llm.generate([prompts[i] for i in batch], params)] for batch in batches
        ]


def cases() -> list[Any]:
    return [pytest.param(*case, marks=[] if case in SELECTED else [pytest.mark.full]) for case in MATRIX]


@pytest.mark.parametrize(("world", "compiled", "batch"), cases())
def test_greedy_tokens(
    world: int, compiled: bool, batch: int, smollm2_gguf: Path, smollm2_reference: Any
) -> None:
    settings = {"dtype": "fp32", "compile": compiled, "native_step": compiled and batch == 1}
    prompts, batches = smollm2_reference.prompts, BATCHES[batch]
    for answers in run_ranks(world, body, str(smollm2_gguf), prompts, batches, settings, timeout=900):
        for numbers, found in zip(batches, answers, strict=True):
            for number, tokens in zip(numbers, found, strict=True):
                assert tokens == smollm2_reference.answers[number], f"prompt {number}"
