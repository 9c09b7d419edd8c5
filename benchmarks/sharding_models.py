"""Known models, small and random, for benchmarks/sharding_table.py: 4 layers of width 512, 256 tokens.

Configurations are settings of the libraries' own classes; where one is not given, the class's default holds
(Falcon: one key-value head, Bloom: ALiBi).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

TOKENS = 256
VOCABULARY = {"vocab_size": 4096, "pad_token_id": 0}
DECODER = {**VOCABULARY, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
TOWER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
IMAGE = {"image_size": 256, "patch_size": 16}
MLA = {"q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
BART = {
    f"{part}_{key}": n
    for part in ("encoder", "decoder")
    for key, n in (("layers", 4), ("attention_heads", 8), ("ffn_dim", 2048))
}
UNET = {
    "block_out_channels": (256, 512),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 512,
    "attention_head_dim": 8,
    "sample_size": 16,
}


@dataclass(frozen=True)
class Case:
    """A class, its configuration, what its forward takes (ids, pairs, images, both or noise), and a factor of
    its weights, where drawn ones would make a model that amplifies what fp32 rounds.
    """

    model: str
    settings: dict[str, Any]
    takes: str = "ids"
    library: str = "transformers"
    scale: float = 1.0


CASES = {
    "Llama": Case("LlamaForCausalLM", {**DECODER, **HEADS}),
    "Qwen2": Case("Qwen2ForCausalLM", {**DECODER, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "Qwen3": Case("Qwen3ForCausalLM", {**DECODER, **HEADS}),
    "Mixtral": Case(
        "MixtralForCausalLM", {**DECODER, **HEADS, "intermediate_size": 704, "num_local_experts": 4}
    ),
    "DeepSeek-V3": Case(
        "DeepseekV3ForCausalLM",
        {
            **DECODER,
            **MLA,
            **ROUTED,
            "v_head_dim": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "n_shared_experts": 1,
            "moe_intermediate_size": 384,
            "first_k_dense_replace": 1,
        },
    ),
    "GPT-2": Case("GPT2LMHeadModel", {**VOCABULARY, "n_embd": 512, "n_layer": 4, "n_head": 8}),
    "GPT-NeoX": Case("GPTNeoXForCausalLM", {**VOCABULARY, **TOWER}),
    "Falcon": Case(
        "FalconForCausalLM",
        {**VOCABULARY, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    ),
    "Phi-3": Case("Phi3ForCausalLM", {**DECODER, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "Gemma-3": Case("Gemma3ForCausalLM", {**DECODER, **HEADS, "sliding_window": 128}),
    "OPT": Case(
        "OPTForCausalLM",
        {
            **VOCABULARY,
            "hidden_size": 512,
            "ffn_dim": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "word_embed_proj_dim": 512,
        },
    ),
    "Bloom": Case("BloomForCausalLM", {**VOCABULARY, "hidden_size": 512, "n_layer": 4, "n_head": 8}),
    "T5": Case(
        "T5ForConditionalGeneration",
        {
            **VOCABULARY,
            "d_model": 512,
            "d_ff": 1408,
            "d_kv": 64,
            "num_layers": 4,
            "num_heads": 8,
            "feed_forward_proj": "gated-gelu",
        },
        "pairs",
        scale=64**-0.25,  # its scores are not divided by the root of d_kv
    ),
    "BART": Case("BartForConditionalGeneration", {**VOCABULARY, **BART, "d_model": 512}, "pairs"),
    "ViT": Case("ViTForImageClassification", {**TOWER, **IMAGE}, "images"),
    "SAM's vision encoder": Case(
        "SamVisionModel",
        {**TOWER, **IMAGE, "mlp_dim": 2048, "window_size": 8, "global_attn_indexes": (1, 3)},
        "images",
    ),
    "CLIP": Case(
        "CLIPModel",
        {
            "text_config": {**TOWER, "vocab_size": 4096, "eos_token_id": 2},
            "vision_config": {**TOWER, **IMAGE},
        },
        "both",
    ),
    "UNet with GEGLU": Case("UNet2DConditionModel", UNET, "noise", "diffusers"),
}


def build(case: Case) -> tuple[Any, dict[str, Any]]:
    """(the fp32 model with all weights drawn, so that a wrong cut shows; its keyword inputs)."""
    made = getattr(importlib.import_module(case.library), case.model)
    torch.manual_seed(0)
    if case.library == "diffusers":
        model = made(**case.settings).eval()
    else:
        model = made(made.config_class(**case.settings)).eval()
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn_like(parameter)
            if parameter.dim() > 1:
                fan = prod(parameter.shape[1:]) if parameter.dim() == 4 else parameter.shape[-1]
                parameter.copy_(drawn * (0.5 if id(parameter) in tables else case.scale * fan**-0.5))
            else:
                parameter.add_(0.1 * drawn)
    ids = torch.randint(5, 4000, (1, TOKENS))
    image = torch.randn(1, 3, 256, 256)
    noise = {"sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3])}
    inputs = {
        "ids": {"input_ids": ids, "use_cache": False},
        "pairs": {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :128], "use_cache": False},
        "images": {"pixel_values": image},
        "both": {"input_ids": ids[:, :64], "pixel_values": image},
        "noise": {**noise, "encoder_hidden_states": torch.randn(1, 77, 512)},
    }
    return model, inputs[case.takes]


def product_weights(model: Any) -> dict[str, Any]:
    """Parameters that are factors of products, by name: those of two dimensions or more, without embeddings,
    the head, and tables with a first dimension of 1 (positions, class tokens).
    """
    outside = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside.update(id(p) for p in head.parameters())
    return {
        name: p
        for name, p in model.named_parameters()
        if p.dim() > 1 and p.shape[0] > 1 and id(p) not in outside
    }


def layers_of(model: Any) -> list[Any]:
    """Transformer blocks of a UNet, else children of the outermost lists of modules that have children."""
    found = [m for m in model.modules() if type(m).__name__ == "BasicTransformerBlock"]
    if found:
        return found
    lists = {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.ModuleList) and any(list(child.children()) for child in m)
    }
    outermost = [p for p in lists if not any(p.startswith(other + ".") for other in lists)]
    return [child for path in outermost for child in lists[path]]
