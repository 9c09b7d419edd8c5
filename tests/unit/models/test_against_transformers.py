"""Logits and greedy tokens of tiny random models equal transformers' own classes on the same weights.

fp32. The tolerance is 2e-5 on logits of size about 1: the two differ only in the order of sums.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tp_runtime.models.config import ModelConfig
from tp_runtime.models.llama import Llama

TOLERANCE = 2e-5
SHAPE = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama all biases": ("Llama", {"attention_bias": True}),
    "llama head_dim apart from hidden_size": ("Llama", {"head_dim": 16}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "llama yarn, mscale": (
        "Llama",
        {"rope_parameters": dict(YARN, mscale=1.0, mscale_all_dim=0.7, beta_fast=16.0)},
    ),
    "llama yarn, given factor": (
        "Llama",
        {"rope_parameters": dict(YARN, attention_factor=1.3, truncate=False)},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3 window, biases": (
        "Qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
            "attention_bias": True,
        },
    ),
}


def _pair(family: str, changes: dict[str, Any]) -> tuple[Any, Llama]:
    """transformers' model with random weights and ours with the same ones, read through its config.json."""
    hf_config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(hf_config).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    ours = Llama(ModelConfig.from_hf(hf_config.to_dict()))
    state = {
        k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight" or ours.lm_head is not None
    }
    ours.load_state_dict(state)
    return theirs, ours


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_and_greedy_tokens(case: str) -> None:
    theirs, ours = _pair(*CASES[case])
    ids = torch.randint(0, SHAPE["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40).expand(3, 40)
    wanted, got = theirs(ids).logits, ours(ids, positions)
    error = (got - wanted).abs()
    print(
        f"{case}: logits up to {wanted.abs().max():.2f}, error max {error.max():.2e} mean {error.mean():.2e}"
    )
    assert wanted.std() > 0.3, "logits too flat for the comparison to mean anything"
    assert error.max() < TOLERANCE * max(1.0, wanted.abs().max().item())
    wanted_ids = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for _ in range(12):
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        ids = torch.cat((ids, ours(ids, positions)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(ids, wanted_ids)


@torch.inference_mode()
def test_yarn_in_the_old_spelling() -> None:
    raw = dict(
        transformers.Qwen2Config(**SHAPE).to_dict(),
        architectures=["Qwen2ForCausalLM"],
        rope_parameters=None,
        rope_theta=500.0,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    )
    new = ModelConfig.from_hf(dict(raw, rope_theta=None, rope_scaling=None, rope_parameters=YARN))
    assert ModelConfig.from_hf(raw) == new


@pytest.mark.parametrize("case", ["llama", "mistral window", "qwen3"])
@torch.inference_mode()
def test_leading_dims_do_not_matter(case: str) -> None:
    """[S], [B, S] and [A, B, S] give the same bits."""
    _, ours = _pair(*CASES[case])
    ids = torch.randint(0, SHAPE["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20)
    flat = ours(ids[0], positions)
    assert flat.shape == (20, SHAPE["vocab_size"])
    assert torch.equal(flat, ours(ids, positions[None])[0])
    assert torch.equal(flat, ours(ids[None], positions[None, None])[0, 0])


@torch.inference_mode()
def test_bf16_rounds_where_transformers_does() -> None:
    """RMSNorm bit for bit in bf16; whole logits within bf16's own noise (angles here stay fp32)."""
    theirs, ours = _pair("Llama", {})
    theirs, ours = theirs.to(torch.bfloat16), ours.to(torch.bfloat16)
    x = torch.randn(7, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(theirs.model.norm(x), ours.model.norm(x))
    ids = torch.randint(0, SHAPE["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(1))
    wanted, got = theirs(ids).logits.float(), ours(ids, torch.arange(20)[None]).float()
    error = (got - wanted).abs()
    print(f"bf16: logits up to {wanted.abs().max():.2f}, error max {error.max():.2e} mean {error.mean():.2e}")
    assert error.max() < 0.1 * wanted.abs().max()
