"""The real model's answers according to transformers: the reference of every path here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village at the edge of a great forest, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "1, 2, 3, 5, 8, 13,",
    "The three most important things to know about tensor parallelism are",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the largest planet in the solar system?\nA:",
)
NEW_TOKENS = 64


@dataclass(frozen=True)
class Reference:
    """Prompts as ids, and transformers' fp32 greedy continuation of each."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_gguf: Path) -> Reference:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = smollm2_gguf.parent, smollm2_gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    prompts = tuple(tuple(tokenizer.encode(text)) for text in PROMPTS)
    answers = []
    torch.set_num_threads(1)  # two, on a busy machine of two cores, spend their time waiting for each other
    with torch.inference_mode():
        for ids in prompts:
            past, step, found = None, torch.tensor([ids]), []
            for _ in range(NEW_TOKENS):
                out = model(input_ids=step, past_key_values=past, use_cache=True)
                past = out.past_key_values
                found.append(int(out.logits[0, -1].argmax()))
                step = torch.tensor([[found[-1]]])
            answers.append(tuple(found))
    return Reference(prompts, tuple(answers))
