"""A GGUF file as a Hugging Face checkpoint: names, row order, config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tp_testing.checkpoints import LLAMA_METADATA, dequantized, random_blocks, write_gguf

from tp_runtime.checkpoint.gguf_file import gguf_config, hf_name, llama3_factors
from tp_runtime.checkpoint.gguf_header import read_gguf_header
from tp_runtime.checkpoint.gguf_reader import GGUFCheckpoint
from tp_runtime.errors import CheckpointError
from tp_runtime.layout import WeightLayout
from tp_runtime.models.config import ModelConfig
from tp_runtime.quant import reference

Q_PROJ, K_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def converted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: halves of a head become alternating rows."""
    return values.reshape(num_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def written(path: Path, architecture: str, changes: dict[str, Any] | None = None, **tensors: Any) -> Path:
    rng = np.random.default_rng(1)
    base = {
        "token_embd.weight": (random_blocks(rng, (50, 64), "F32"), "F32"),
        "blk.0.attn_q.weight": (random_blocks(rng, (64, 64), "Q8_0"), "Q8_0"),
        "blk.0.attn_k.weight": (random_blocks(rng, (32, 64), "Q4_1"), "Q4_1"),
    }
    metadata = {**LLAMA_METADATA, **(changes or {})}
    return write_gguf(path, {**base, **tensors}, architecture=architecture, metadata=metadata)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.12.attn_norm.weight", "model.layers.12.input_layernorm.weight"),
        ("blk.0.attn_v.bias", "model.layers.0.self_attn.v_proj.bias"),
        ("blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight"),
        ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
        ("blk.3.ffn_gate_exps.weight", "blk.3.ffn_gate_exps.weight"),
        ("vision.weight", "vision.weight"),
    ],
)
def test_names(theirs: str, ours: str) -> None:
    assert hf_name(theirs) == ours


def test_llama_rows_come_back_in_the_models_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    q_NK, k_NK = (rng.standard_normal((n, 64), dtype=np.float32) for n in (64, 32))
    bias_N = rng.standard_normal(64, dtype=np.float32)
    tensors = {
        "blk.0.attn_q.weight": (converted(q_NK, 4), "F32"),
        "blk.0.attn_k.weight": (converted(k_NK, 2), "F32"),
        "blk.0.attn_q.bias": (converted(bias_N, 4), "F32"),
    }
    checkpoint = GGUFCheckpoint(written(tmp_path / "llama.gguf", "llama", **tensors))
    assert torch.equal(checkpoint.read(Q_PROJ), torch.from_numpy(q_NK))
    assert torch.equal(checkpoint.read(K_PROJ, ((5, 21), (2, 3))), torch.from_numpy(k_NK[[*range(5, 21), 2]]))
    assert torch.equal(
        checkpoint.read(Q_PROJ.replace("weight", "bias"), ((3, 40),)), torch.from_numpy(bias_N[3:40])
    )


def test_llama_blocks_are_reordered_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    blocks = random_blocks(rng, (64, 64), "Q4_0")
    tensors = {"blk.0.attn_q.weight": (converted(blocks, 4), "Q4_0")}
    checkpoint = GGUFCheckpoint(written(tmp_path / "llama.gguf", "llama", **tensors))
    form = checkpoint.block_format(Q_PROJ)
    layout = WeightLayout((64, 64), (10, 50), (0, 64), form)
    found = reference.dequantize(checkpoint.read_blocks(Q_PROJ, ((10, 50),), layout))
    assert torch.equal(found, torch.from_numpy(dequantized(blocks, "Q4_0")[10:50]))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_stay(tmp_path: Path, architecture: str) -> None:
    blocks = random_blocks(np.random.default_rng(4), (64, 64), "Q8_0")
    path = written(tmp_path / "qwen.gguf", architecture, **{"blk.0.attn_q.weight": (blocks, "Q8_0")})
    assert torch.equal(GGUFCheckpoint(path).read(Q_PROJ), torch.from_numpy(dequantized(blocks, "Q8_0")))


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "odd.gguf", "llama", {"{arch}.attention.head_count": 5})
    with pytest.raises(CheckpointError, match="not 5 heads of an even size"):
        GGUFCheckpoint(path)


def test_the_demo_models_config(smollm2_gguf: Path) -> None:
    config = ModelConfig.from_hf(gguf_config(read_gguf_header(smollm2_gguf)))
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (576, 1536, 49152)
    assert config.rms_norm_eps == 1e-5 and config.rope_theta == 100000.0 and config.tie_word_embeddings
    assert config.rope_scaling is None and config.sliding_window is None and config.eos_token_ids == (2,)


def config_of(path: Path) -> ModelConfig:
    return ModelConfig.from_hf(gguf_config(read_gguf_header(path)))


def test_untied_windowed_yarn_config(tmp_path: Path) -> None:
    changes = {
        "{arch}.attention.sliding_window": 77,
        "{arch}.attention.key_length": 32,
        "{arch}.rope.scaling.type": "yarn",
        "{arch}.rope.scaling.factor": 4.0,
        "{arch}.rope.scaling.original_context_length": 32,
    }
    head = {"output.weight": (random_blocks(np.random.default_rng(0), (50, 64), "F16"), "F16")}
    config = config_of(written(tmp_path / "m.gguf", "qwen3", changes, **head))
    assert not config.tie_word_embeddings and config.head_dim == 32 and config.qk_norm
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert config.sliding_window == 77 and config.window(0) == 77
    mistral = config_of(written(tmp_path / "l.gguf", "llama", {"{arch}.attention.sliding_window": 77}))
    assert mistral.window(0) == 77


def test_linear_scaling_and_qwen2_bias(tmp_path: Path) -> None:
    changes = {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": 2.0}
    config = config_of(written(tmp_path / "m.gguf", "qwen2", changes))
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0} and config.attention_bias


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path, factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, scaled = (
        LlamaConfig(
            hidden_size=512,
            num_attention_heads=4,
            max_position_embeddings=131072,
            rope_parameters={"rope_theta": 500000.0, **chosen},
        )
        for chosen in ({"rope_type": "default"}, scaling)
    )
    base = LlamaRotaryEmbedding(plain).inv_freq
    factors = (base / ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")[0]).numpy()
    assert np.allclose(llama3_factors(scaling, 500000.0, 128), factors, rtol=1e-5)
    changes = {
        "{arch}.rope.freq_base": 500000.0,
        "{arch}.context_length": 131072,
        "{arch}.attention.key_length": 128,
    }
    path = written(tmp_path / "m.gguf", "llama", changes, **{"rope_freqs.weight": (factors, "F32")})
    assert config_of(path).rope_scaling == scaling
    assert "rope_freqs.weight" not in GGUFCheckpoint(path).names()


BAD_FILES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "other architecture": ("gemma3", {}, {}, "gemma3"),
    "experts": ("llama", {"{arch}.expert_count": 8}, {}, "mixture of experts"),
    "split": ("llama", {"split.count": 3}, {}, "split GGUF"),
    "missing key": ("llama", {"{arch}.block_count": "six"}, {}, "block_count"),
    "fraction": ("llama", {"{arch}.attention.head_count": 2.5}, {}, "no count"),
    "layers differ": ("llama", {"{arch}.attention.head_count_kv": [2, 1]}, {}, "head_count_kv"),
    "unknown scaling": ("llama", {"{arch}.rope.scaling.type": "longrope"}, {}, "longrope"),
    "odd factors": (
        "llama",
        {},
        {"rope_freqs.weight": (np.linspace(1, 3, 8, dtype=np.float32), "F32")},
        "llama3",
    ),
    "factors no vector": (
        "llama",
        {},
        {"rope_freqs.weight": (np.ones(8, dtype=np.float16), "F16")},
        "short F32",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_is_not_supported_is_one_sentence(tmp_path: Path, case: str) -> None:
    architecture, changes, tensors, said = BAD_FILES[case]
    path = written(tmp_path / "bad.gguf", architecture, changes, **tensors)
    with pytest.raises(CheckpointError, match=said) as error:
        gguf_config(read_gguf_header(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_one_value_a_layer_is_taken_where_they_agree(tmp_path: Path) -> None:
    config = config_of(written(tmp_path / "m.gguf", "llama", {"{arch}.attention.head_count_kv": [2, 2]}))
    assert config.num_kv_heads == 2
