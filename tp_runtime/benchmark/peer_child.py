"""One peer in a process of its own: prefill and decode of one prompt, between readings of the ceiling.

    python -m tp_runtime.benchmark.peer_child SPEC        (a JSON object that peers.py writes)

Both peers are fed given tokens: their sampling is left out, which favours them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..models.config import ModelConfig
from .definitions import ceiling_bytes
from .read import ReadCeiling

Evaluate = Callable[[list[int]], object]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Figures of one runtime, medians over spec["repeat"] runs after a warm-up."""
    threads = spec["threads"] or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    config = ModelConfig(**{**spec["config"], "eos_token_ids": tuple(spec["config"]["eos_token_ids"])})
    num_tokens = spec["prompt_tokens"] + spec["new_tokens"]
    load = _LOADERS[spec["runtime"]]
    start, evaluate = load(spec, config, num_tokens, threads)
    prompt = [1 + place % min(100, config.vocab_size - 1) for place in range(spec["prompt_tokens"])]
    ceiling, speeds, prefills = ReadCeiling(spec["ceiling_bytes"] or ceiling_bytes()), [], []
    for run in range(spec["repeat"] + 1):
        ceiling.read()
        start()
        began = time.perf_counter()
        evaluate(prompt)
        first = time.perf_counter()
        for place in range(spec["new_tokens"] - 1):
            evaluate([1 + place % 50])
        ended = time.perf_counter()
        if run:
            prefills.append(len(prompt) / (first - began))
            speeds.append((spec["new_tokens"] - 1) / (ended - first))
    ceiling.read()
    return {
        "tok_s": statistics.median(speeds),
        "prefill_tok_s": statistics.median(prefills),
        "read_ceiling_gb_s": ceiling.best,
        "threads": threads,
    }


def _llama_cpp(
    spec: dict[str, Any], config: ModelConfig, num_tokens: int, threads: int
) -> tuple[Callable[[], object], Evaluate]:
    from llama_cpp import Llama

    llm = Llama(
        spec["path"],
        n_ctx=num_tokens,
        n_batch=max(512, spec["prompt_tokens"]),
        n_threads=threads,
        n_threads_batch=threads,
        use_mmap=False,
        verbose=False,
    )
    return llm.reset, llm.eval


def _transformers(
    spec: dict[str, Any], config: ModelConfig, num_tokens: int, threads: int
) -> tuple[Callable[[], object], Evaluate]:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    theirs = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(theirs).eval()
    finally:
        torch.set_default_dtype(before)
    cache, place = StaticCache(config=theirs, max_cache_len=num_tokens), [0]

    @torch.inference_mode()
    def start() -> None:
        cache.reset()
        place[0] = 0

    @torch.inference_mode()
    def evaluate(tokens: list[int]) -> object:
        positions = torch.arange(place[0], place[0] + len(tokens))
        place[0] += len(tokens)
        return model(
            input_ids=torch.tensor([tokens]),
            past_key_values=cache,
            position_ids=positions.unsqueeze(0),
            logits_to_keep=1,
            use_cache=True,
        ).logits

    return start, evaluate


_LOADERS = {"llama.cpp": _llama_cpp, "transformers": _transformers}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
