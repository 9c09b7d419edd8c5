"""Speculation on GPUs: drafts come in bursts, and what a draft of the target itself offers stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tp_testing.ranks import run_ranks

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 515, "hidden_size": 256,
    "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = ([5, 9, 250, 33, 71], [(7 * i * i + 3) % 500 + 3 for i in range(45)], [101, 102])
CASES = [
    (1, "all"),
    pytest.param(2, "all", marks=pytest.mark.gpus(2)),
    pytest.param(2, "one", marks=pytest.mark.gpus(2)),
]


def speculate(folder: str, where: str, forced: float | None, exact: bool) -> dict[str, Any]:
    """Greedy answers of one row, of three and of one that is sampled; steps of the draft, and its figures."""
    import torch
    import torch.distributed as dist

    from tp_runtime import LLM, SamplingParams
    from tp_runtime.engine.cuda_runner import CudaRunner
    from tp_runtime.engine.speculative.forced import ForcedAcceptance

    torch.cuda.set_device(dist.get_rank())
    bursts: list[int] = []
    real = CudaRunner.start_burst

    def counted(self: Any, step: Any, steps: int) -> None:
        bursts.append(steps)
        real(self, step, steps)

    CudaRunner.start_burst = counted  # type: ignore[method-assign]
    params = SamplingParams(max_new_tokens=61, ignore_eos=True)
    settings = {"draft": folder, "draft_adaptive": False, "draft_tokens": 4, "draft_ranks": where}
    settings["speculate_exact"] = exact
    with LLM(folder, random_weights=True, device="cuda", context=256, max_batch=4, **settings) as llm:
        speculator = llm.speculator
        assert speculator is not None
        if forced is not None:
            speculator.forced = ForcedAcceptance(forced)
        tokens = [llm.generate([PROMPTS[1]], params)[0].tokens]
        figures, started = speculator.report.to_dict(), list(bursts)
        tokens += [done.tokens for done in llm.generate(PROMPTS, params)]
        if forced is None:
            drawn = SamplingParams(max_new_tokens=9, ignore_eos=True, temperature=0.8, seed=3)
            tokens += [llm.generate([PROMPTS[2]], drawn)[0].tokens]
        llm.pool.sanity_checks()
        llm.speculator = None
        plain = llm.generate([PROMPTS[1]], params)[0].tokens
        llm.speculator = speculator
    return {"tokens": tokens, "plain": plain, "bursts": started, "figures": figures}


@pytest.mark.parametrize(("forced", "exact"), [(None, False), (1.0, False), (None, True)])
@pytest.mark.parametrize(("world", "where"), CASES)
def test_drafts_in_bursts(
    world: int, where: str, forced: float | None, exact: bool, tmp_path: Path, device: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    found = run_ranks(world, speculate, str(tmp_path), where, forced, exact, timeout=300)
    first = found[0]
    for other in found[1:]:
        assert other["tokens"] == first["tokens"] and other["plain"] == first["plain"], "ranks differ"
        assert other["bursts"] == (first["bursts"] if where == "all" else [])
    figures = first["figures"]
    print(f"x{world} {where}: {figures['acceptance']:.2f} stood, bursts {first['bursts']}")
    assert first["tokens"][0][0] == first["plain"][0]
    assert not exact or first["tokens"][0] == first["plain"]
    # A step of five tokens rounds otherwise than one of one, so near ties may fall; few are so near.
    assert figures["acceptance"] >= (0.7 if forced is None else 1.0)
    # The first draft reads the prompt, and each after one that stood its last token: one step, then a burst.
    assert set(first["bursts"]) <= {1, 2, 3, 4} and len(first["bursts"]) >= 10
