"""A tiny target and a draft of half its neurons, as folders without weights."""

from __future__ import annotations

import json
from pathlib import Path

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 131, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip


def write(folder: Path) -> tuple[str, str]:
    """Both folders below `folder`: (target, draft)."""
    paths = []
    for name, neurons in (("target", 128), ("draft", 64)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**TINY, "intermediate_size": neurons}))
        paths.append(str(folder / name))
    return paths[0], paths[1]
