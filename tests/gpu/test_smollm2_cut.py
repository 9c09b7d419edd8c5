"""Real weights on GPUs: a cut of SmolLM2 against the CPU path and transformers, 9 heads over 1 and 2.

The cut is made from the package's GGUF; on a machine without it, TP_TEST_CUT names a folder that
tp_testing.cut made elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tp_testing import cut
from tp_testing.ranks import run_ranks

PROMPTS = ([504, 3575, 282, 4649, 314], [17 * i % 8000 + 20 for i in range(40)], [28, 33, 216, 35])
NEW_TOKENS = 24
# Of logits' spread. Between weights the GPU computes in bf16, 2^-9 a rounding, a dozen a layer; both sides
# have the same quantised weights.
LARGEST, MEAN = 0.2, 0.03


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    made = os.environ.get("TP_TEST_CUT")
    if made is not None:
        return Path(made)
    where = tmp_path_factory.mktemp("cut")
    cut.make_cut(request.getfixturevalue("smollm2_gguf"), where)
    return where


def body(path: str, device: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Greedy tokens of all prompts; logits of every token of each, the last three decoded one by one."""
    import torch.distributed as dist

    from tp_runtime import LLM, SamplingParams
    from tp_runtime.engine.step import Row, Step

    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    found = []
    with LLM(path, device=device, context=256, max_batch=4, **settings) as llm:
        params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        answers = [done.tokens for done in llm.generate(PROMPTS, params)]
        for ids in PROMPTS:
            blocks, first = tuple(llm.pool.allocate(2)), max(1, len(ids) - 3)
            rows = [llm.runner.execute(Step((Row(tuple(ids[:first]), 0, blocks, first),)))]
            rows += [
                llm.runner.execute(Step((Row((ids[i],), i, blocks, 1),))) for i in range(first, len(ids))
            ]
            llm.pool.release(blocks)
            found.append(torch.cat([each.float().cpu() for each in rows]).numpy())
    return answers, found


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.gpus(2))])
@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32", "int4-g128"])
def test_like_the_cpu_and_transformers(quant: str, world: int, folder: Path, device: str) -> None:
    reference = {"quant": quant, "kernels": "reference", "dtype": "fp32"}
    wanted_tokens, wanted = run_ranks(1, body, str(folder), "cpu", reference, timeout=300)[0]
    every = run_ranks(world, body, str(folder), device, {"quant": quant, "dtype": "bf16"}, timeout=300)
    for tokens, logits in every:
        assert tokens == every[0][0], "ranks chose different tokens"
        for ids, mine, its in zip(PROMPTS, logits, wanted, strict=True):
            gap = abs(mine - its) / its.std()
            print(f"{quant} x{world}: {len(ids)} tokens, largest {gap.max():.1e}, mean {gap.mean():.1e}")
            assert gap.max() < LARGEST and gap.mean() < MEAN
    same = sum(a == b for a, b in zip(every[0][0], wanted_tokens, strict=True))
    print(f"{same} of {len(PROMPTS)} answers are the CPU's to the token")
    if quant == "none":
        with torch.inference_mode():
            model = cut.read_cut(folder)
            for ids, its in zip(PROMPTS, wanted, strict=True):
                assert abs(model(torch.tensor([ids])).logits[0].numpy() - its).max() < 1e-3
