"""The GPU engine on small models: captured decoding against the model's own forward and transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tp_testing.ranks import run_ranks

SHAPE = {
    "vocab_size": 515, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
    "initializer_range": 0.08, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = ([5, 9, 250, 33, 71], [(7 * i * i + 3) % 500 + 3 for i in range(45)], [101, 102])
NEW_TOKENS = 20
GPUS = [1, pytest.param(2, marks=pytest.mark.gpus(2))]


def save(folder: Path, kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, tie_word_embeddings=kind == "Qwen3")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.float()


def _compare(folder: str, quant: str, cache_dtype: str = "auto") -> dict[str, Any]:
    """Greedy answers by bursts; and one decoding step, captured and layer by layer, on the same cache."""
    import torch.distributed as dist

    from tp_runtime import LLM, SamplingParams
    from tp_runtime.engine.runner import ModelRunner
    from tp_runtime.engine.step import Row, Step

    torch.cuda.set_device(dist.get_rank())
    with LLM(folder, device="cuda", quant=quant, cache_dtype=cache_dtype, context=256, max_batch=4) as llm:
        assert llm.runner.burst_steps, "the captured step is not in use"
        params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        together = [done.tokens for done in llm.generate(PROMPTS, params)]
        # Reporting log-probabilities needs the host at every step: the same graph, without bursts.
        watched = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
        stepwise = [done.tokens for done in llm.generate(PROMPTS, watched)]
        drawn = llm.generate([PROMPTS[1]], SamplingParams(max_new_tokens=6, temperature=0.8, seed=3))[
            0
        ].tokens
        prompt = tuple(PROMPTS[1])
        llm.runner.execute(Step((Row(prompt, 0, (1, 2), 1),)))
        steps = [Step((Row((17, 18, 19), len(prompt), (1, 2), 3), Row((44,), 0, (3,), 1)))]
        steps += [Step((Row(tuple(range(20, 20 + n)), len(prompt), (1, 2), n),)) for n in (5, 11)]
        layerwise = torch.cat([ModelRunner.execute(llm.runner, each).float().cpu() for each in steps])
        captured = torch.cat([llm.runner.execute(each).float().cpu() for each in steps])
        assert {4, 5, 12} <= set(llm.runner._graphs), "a step was padded to another size"
        mixed = Step((Row(prompt, 0, (1, 2), 45), Row((44,), 0, (3,), 1), Row(prompt[::-1], 0, (4, 5), 40)))
        many = (prompt * 5)[:200]
        long = Step((Row(many, 0, tuple(range(1, 8)), 2), Row(many[::-1], 0, tuple(range(8, 15)), 1)))
        gaps, prompts = [], []
        # A size comes for the first time, is captured, and is replayed, also for other rows.
        again = (Step((Row(prompt * 2, 0, (6, 7, 8), 3),)), Step(mixed.rows[::-1]), long, long, long)
        for few in (mixed, mixed, mixed, *again):
            twin = ModelRunner.execute(llm.runner, few)
            prompts.append(llm.runner.execute(few).float().cpu())
            gaps.append((prompts[-1] - twin.float().cpu()).abs() / twin.float().std().cpu())
        assert {128, 512} <= set(llm.runner._prompts._graphs), "a pass was not captured"
        assert torch.equal(prompts[0], prompts[1]) and torch.equal(prompts[0], prompts[2])
        assert torch.equal(prompts[5], prompts[6]) and torch.equal(prompts[5], prompts[7])
        return {
            "together": together, "stepwise": stepwise, "drawn": drawn, "layerwise": layerwise,
            "captured": captured, "prompt": torch.cat(prompts), "prompt_gap": torch.cat(gaps),
        }  # fmt: skip


@pytest.mark.parametrize("world", GPUS)
@pytest.mark.parametrize("quant", ["none", "int8", "int4-g64", "fp8"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_against_twins(kind: str, quant: str, world: int, tmp_path: Path, device: str) -> None:
    if kind != "Llama" and quant not in ("none", "int8"):
        pytest.skip("bias and head norms do not meet the weight's format")
    model = save(tmp_path, kind)
    found = run_ranks(world, _compare, str(tmp_path), quant, timeout=150)
    first = found[0]
    for other in found[1:]:
        assert torch.equal(other["captured"], first["captured"]), "ranks differ"
        assert other["together"] == first["together"] and other["drawn"] == first["drawn"]
    spread = first["layerwise"].std()
    gap = (first["captured"] - first["layerwise"]).abs() / spread
    print(f"{kind} {quant} x{world}: captured against layers: largest {gap.max():.1e}, mean {gap.mean():.1e}")
    # Both compute in bf16 between weights and round at other places: 2^-9 a rounding, a dozen a layer.
    assert gap.max() < 0.15 and gap.mean() < 0.02
    assert all(torch.equal(other["prompt"], first["prompt"]) for other in found), "ranks differ"
    gap = first["prompt_gap"]
    print(f"a prompt against layers: largest {gap.max():.1e}, mean {gap.mean():.1e}")
    assert gap.max() < 0.15 and gap.mean() < 0.02
    assert first["together"] == first["stepwise"], "a burst chose other tokens than the host would"
    if quant == "none":
        ids = list(PROMPTS[1]) + [17, 18, 19]
        with torch.inference_mode():
            wanted = model(torch.tensor([ids])).logits[0, -3:]
        gap = (first["captured"][:3] - wanted).abs() / wanted.std()
        print(f"against transformers in fp32: largest {gap.max():.1e}, mean {gap.mean():.1e}")
        assert gap.max() < 0.15 and gap.mean() < 0.02


@pytest.mark.parametrize("world", GPUS)
def test_an_fp8_cache(world: int, tmp_path: Path, device: str) -> None:
    save(tmp_path, "Llama")
    plain = run_ranks(world, _compare, str(tmp_path), "none", timeout=150)[0]
    found = run_ranks(world, _compare, str(tmp_path), "none", "fp8", timeout=150)
    first, spread = found[0], plain["captured"].std()
    for other in found[1:]:
        assert torch.equal(other["captured"], first["captured"]), "ranks differ"
    gap = (first["captured"] - first["layerwise"]).abs() / spread
    price = (first["captured"] - plain["captured"]).abs() / spread
    print(f"x{world}: against layers: largest {gap.max():.1e}, mean {gap.mean():.1e}; "
          f"against a bf16 cache: largest {price.max():.1e}, mean {price.mean():.1e}")  # fmt: skip
    # A number that bf16 rounds elsewhere may fall to the next of fp8's, 2^-3 away. Of what all of them are
    # rounded by, 2^-5 at the mean, attention averages most away.
    assert gap.max() < 0.25 and gap.mean() < 0.03
    assert 0 < price.mean() < 0.1
    assert first["together"] == first["stepwise"], "a burst chose other tokens than the host would"


def _no_room_to_capture(folder: str) -> dict[str, Any]:
    """A prompt three times, its capture failing for want of memory on the last rank alone; then a longer one."""
    import torch.distributed as dist

    from tp_runtime import LLM
    from tp_runtime.engine.step import Row, Step
    from tp_runtime.log import get_logger

    torch.cuda.set_device(rank := dist.get_rank())
    said: list[str] = []
    get_logger().addHandler(handler := _Keep(said))
    with LLM(folder, device="cuda", context=256, max_batch=1) as llm:
        short = Step((Row(tuple(PROMPTS[1]), 0, (1, 2), 1),))
        longer = Step((Row(tuple(PROMPTS[1] * 2), 0, (1, 2, 3), 1),))
        logits = [llm.runner.execute(short).float().cpu()]
        llm.runner.execute(longer)
        if rank == dist.get_world_size() - 1:
            torch.cuda.set_per_process_memory_fraction(1e-6)
        logits += [llm.runner.execute(short).float().cpu() for _ in range(2)]
        torch.cuda.set_per_process_memory_fraction(1.0)
        llm.runner.execute(longer)
        captured = sorted(llm.runner._prompts._graphs)
    get_logger().removeHandler(handler)
    return {"logits": logits, "captured": captured, "said": said}


class _Keep(logging.Handler):
    """The lines that were logged."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


@pytest.mark.parametrize("world", GPUS)
def test_no_memory_to_capture_a_prompt(world: int, tmp_path: Path, device: str) -> None:
    save(tmp_path, "Llama")
    found = run_ranks(world, _no_room_to_capture, str(tmp_path), timeout=150)
    first = found[0]["logits"][0]
    for each in found:
        assert each["captured"] == [], "a rank has a graph that another lacks"
        assert all(torch.equal(logits, first) for logits in each["logits"])
    assert sum("no memory left to capture" in line for line in found[0]["said"]) == 1, found[0]["said"]
