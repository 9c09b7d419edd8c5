"""All layers in one C++ call against its slow twin, the same layers module by module.

Tolerance: logits within 2e-5 of their largest where everything is fp32 (sums in another order); quantised
or with bf16 or int8 caches, a difference of one rounding in a key or a value may grow: 2%. Prompts come in two
chunks, of few tokens and of many, then decode, three rows of different lengths in one step, or eighteen, which
take the kernels for many rows also when they decode.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tp_testing.ranks import run_ranks

COMMON = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "window": ("Mistral", {"sliding_window": 20, "num_key_value_heads": 1}),
    "qkv-bias": ("Qwen2", {"intermediate_size": 150}),  # gate and up that do not join
    "all-biases": ("Llama", {"attention_bias": True}),
    "qk-norm": ("Qwen3", {"num_key_value_heads": 6}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "int8": {"dtype": "bf16", "quant": "int8", "head_quant": "int8"},
    "int4": {"dtype": "bf16", "quant": "int4"},
    "int4-asym": {"dtype": "bf16", "quant": "int4", "int4_asym": True},
    "int8-cache": {"dtype": "fp32", "cache_dtype": "int8"},
}
TOLERANCE = {"fp32": 2e-5}
ROUNDED = 2e-2
ROWS = (3, 18)
SELECTED = {
    ("tied", 1, "fp32", 3),
    ("window", 2, "fp32", 18),
    ("qkv-bias", 3, "fp32", 3),
    ("all-biases", 2, "fp32", 3),
    ("qk-norm", 3, "fp32", 3),
    ("tied", 2, "bf16", 18),
    ("window", 1, "int4", 3),
    ("qkv-bias", 2, "int4-asym", 18),
    ("all-biases", 3, "int8", 3),
    ("qk-norm", 1, "int8-cache", 18),
    ("window", 3, "int8-cache", 3),
}
CASES = [
    pytest.param(*case, marks=[] if case in SELECTED else [pytest.mark.full])
    for case in itertools.product(FAMILIES, (1, 2, 3, 4), SETTINGS, ROWS)
]


def save_model(family: str, folder: Path) -> None:
    import torch
    import transformers

    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder)


def logits_body(path: str, settings: dict[str, Any], num_rows: int, native: bool) -> Any:
    """Logits of every step's wanted rows, one after the other."""
    import torch

    from tp_runtime.engine.llm import LLM
    from tp_runtime.engine.step import Row, Step

    lengths = ((30, 7, 45) * num_rows)[:num_rows]
    prompts = [[(7 * i * i + 3 * n + row) % 120 + 3 for i in range(n)] for row, n in enumerate(lengths)]
    found = []
    with LLM(path, compile=native, max_batch=num_rows, prefill_chunk=64 * num_rows, **settings) as llm:
        assert (llm.runner.native is not None) == native and not llm.runner.compiled
        blocks = [tuple(llm.pool.allocate(2)) for _ in prompts]
        for begin, end in ((0, 5), (5, None), (None, None)):
            rows = []
            for ids, own in zip(prompts, blocks, strict=True):
                tokens = tuple(ids[begin:end]) if begin is not None else (9,)
                start = begin if begin is not None else len(ids)
                rows.append(Row(tokens, start, own, len(tokens)))
            found.append(llm.runner.execute(Step(tuple(rows))).float())
    return torch.cat(found).numpy()


@pytest.mark.parametrize(("family", "world", "numbers", "rows"), CASES)
def test_like_the_modules(family: str, world: int, numbers: str, rows: int, tmp_path: Path) -> None:
    import numpy as np

    save_model(family, tmp_path)
    found, expected = (
        run_ranks(world, logits_body, str(tmp_path), SETTINGS[numbers], rows, native)
        for native in (True, False)
    )
    error = np.abs(found[0] - expected[0]) / np.abs(expected[0]).max()
    print(
        f"{family} over {world}, {numbers}, {rows} rows: largest error {error.max():.2e}, mean {error.mean():.2e}"
    )
    assert error.max() <= TOLERANCE.get(numbers, ROUNDED)
    assert all(np.array_equal(found[0], other) for other in found[1:]), "ranks differ"
