"""Drafts in bursts over two ranks, on tiny random models.

Bursts are for GPUs; here a runner of the CPU plays one, so that what ranks tell each other is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tp_testing import draft_pair
from tp_testing.ranks import run_ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return draft_pair.write(tmp_path_factory.mktemp("pair"))


def burst_body(models: tuple[str, str], settings: dict[str, Any]) -> tuple[list[Any], int, float]:
    """Greedy answers with a runner that runs bursts; how many this rank started, and the acceptance."""
    import torch

    from tp_runtime.config import SamplingParams
    from tp_runtime.engine.llm import LLM
    from tp_runtime.engine.runner import ModelRunner
    from tp_runtime.engine.step import Row, Step

    started: list[int] = []

    def start_burst(self: Any, step: Step, steps: int) -> None:
        started.append(steps)
        self.chosen = []
        for _ in range(steps):
            tokens = self.execute(step).argmax(-1).tolist()
            self.chosen.append(tokens)
            pairs = zip(step.rows, tokens, strict=True)
            step = Step(tuple(Row((t,), row.start + 1, row.blocks, 1) for row, t in pairs))

    def burst_tokens(self: Any, rows: int, steps: int) -> Iterator[list[int]]:
        yield from self.chosen

    ModelRunner.burst_steps = property(lambda self: 16)  # type: ignore[assignment, method-assign]
    ModelRunner.start_burst = start_burst  # type: ignore[method-assign]
    ModelRunner.burst_tokens = burst_tokens  # type: ignore[method-assign]
    torch.set_num_threads(1)
    prompts = [[(7 * i * i + 3 * n) % 120 + 3 for i in range(n)] for n in (3, 45, 17)]
    params = [SamplingParams(max_new_tokens=20 + n, ignore_eos=True) for n in range(3)]
    with LLM(models[0], random_weights=True, dtype="fp32", max_batch=3, compile=False, **settings) as llm:
        done = llm.generate(prompts, params)
        done += llm.generate(
            prompts[:1], [SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.8)]
        )
        llm.pool.sanity_checks()
        assert llm.pool.num_free == llm.pool.num_blocks - 1, "blocks were not given back"
        rate = 0.0
        if llm.speculator is not None:
            pool = getattr(llm.speculator.drafter, "pool", None)
            if pool is not None:
                pool.sanity_checks()
                assert pool.num_free == pool.num_blocks - 1, "blocks of the draft were not given back"
            rate = llm.speculator.report.acceptance() or 0.0
    return [one.tokens for one in done[:3]], len(started), rate


@pytest.mark.parametrize("where", ["all", "one"])
def test_drafting_in_bursts_over_two_ranks(models: tuple[str, str], where: str) -> None:
    """The target itself as the draft, so that tokens stand and rows catch up; and another model."""
    wanted = run_ranks(1, burst_body, models, {})[0][0]
    for draft, least in ((models[0], 0.9), (models[1], 0.0)):
        settings = {"draft": draft, "draft_adaptive": False, "draft_tokens": 4, "draft_ranks": where}
        results = run_ranks(2, burst_body, models, settings, timeout=200)
        assert all(tokens == wanted for tokens, _, _ in results)
        bursts = [started for _, started, _ in results]
        assert bursts[0] >= 5 and bursts[1] == (bursts[0] if where == "all" else 0), bursts
        assert results[0][2] >= least
