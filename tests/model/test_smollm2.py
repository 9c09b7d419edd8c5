"""SmolLM2-135M (9 heads, 3 KV heads: they divide over no even number of ranks) against transformers.

fp32 greedy tokens are identical at every world size, compiled or not, alone or in a batch of three
prompts of different lengths. 576 hidden values and 49152 tokens divide unevenly over 3 ranks.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tp_testing.ranks import run_ranks

BATCHES = {1: [[i] for i in range(8)], 3: [[0, 1, 2], [3, 4, 5], [6, 7, 0]]}
PATHS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "compiled": {"native_step": False},
    "native": {},
}
MATRIX = list(product((1, 2, 3, 4), PATHS, (1, 3)))
# Every world on every path but (4, compiled), every path in both batches.
SELECTED = {
    (1, "eager", 3), (1, "native", 1), (2, "compiled", 1), (2, "native", 3),
    (3, "eager", 1), (3, "compiled", 3), (4, "native", 1), (4, "eager", 3),
}  # fmt: skip


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


@pytest.mark.parametrize(("world", "how", "batch"), cases())
def test_greedy_tokens(world: int, how: str, batch: int, smollm2_gguf: Path, smollm2_reference: Any) -> None:
    settings = {"dtype": "fp32", **PATHS[how]}
    prompts, batches = smollm2_reference.prompts, BATCHES[batch]
    for answers in run_ranks(world, body, str(smollm2_gguf), prompts, batches, settings, timeout=900):
        for numbers, found in zip(batches, answers, strict=True):
            for number, tokens in zip(numbers, found, strict=True):
                assert tokens == smollm2_reference.answers[number], f"prompt {number}"
