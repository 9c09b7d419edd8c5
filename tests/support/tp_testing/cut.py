"""A small model with real weights: the first layers of SmolLM2 and the first rows of its vocabulary, in bf16.

python -m tp_testing.cut GGUF FOLDER      # where the tests run on another machine than the weights are on
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

LAYERS, VOCABULARY = 4, 8192


def make_cut(gguf: Path, folder: Path) -> Any:
    """Save the cut into `folder` as safetensors with a config.json (about 38 MB); its model, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    settings = whole.config.to_dict()
    settings |= {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "pad_token_id": None}
    cut = LlamaForCausalLM(LlamaConfig(**settings)).bfloat16()
    state = whole.state_dict()
    cut.load_state_dict({name: state[name][: len(value)] for name, value in cut.state_dict().items()})
    cut.save_pretrained(folder)
    return cut.float().eval()


def read_cut(folder: Path) -> Any:
    """The model that make_cut saved, in fp32."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    make_cut(Path(sys.argv[1]), Path(sys.argv[2]))
