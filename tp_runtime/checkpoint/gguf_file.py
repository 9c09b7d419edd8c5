"""A GGUF file seen as a Hugging Face checkpoint: its tensors' names, its row order, its config. No torch.

GGUF calls tensors by names of its own (blk.0.attn_q.weight), which map one to one. The converter of
llama.cpp also reorders the rows of q and k for the architecture "llama" (which Mistral models use too):
its rotary embedding pairs neighbouring rows (2i, 2i+1) of a head where Hugging Face pairs (i, i + d/2), so
row h*d + 2i + s of the file is row h*d + s*d/2 + i of the model. qwen2 and qwen3 are not reordered.
Long-context Llama files carry their frequency factors as a tensor, rope_freqs.weight; the parameters that
gave them are recovered and checked against that tensor.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .gguf_header import GGUFEntry, GGUFHeader

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_FREQS = "rope_freqs.weight"
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its name in the file. reordered_heads: heads whose rows the converter paired; 0: none."""

    name: str
    entry: GGUFEntry
    reordered_heads: int = 0


def hf_name(gguf_name: str) -> str:
    """Hugging Face's name of a GGUF tensor; an unknown one keeps its own, and is refused as surplus later."""
    if gguf_name in _TOP:
        return _TOP[gguf_name]
    found = _LAYER_NAME.fullmatch(gguf_name)
    if found is None or found[2] not in _IN_LAYER:
        return gguf_name
    return f"model.layers.{found[1]}.{_IN_LAYER[found[2]]}.{found[3]}"


def gguf_tensors(header: GGUFHeader) -> dict[str, GGUFTensor]:
    """All tensors by Hugging Face's names, rope_freqs.weight (part of the config) left out."""
    keys = _Keys(header)
    heads: dict[str, int] = {}
    if keys.architecture == "llama":
        heads = {"attn_q": keys.integer("attention.head_count")}
        heads["attn_k"] = keys.integer("attention.head_count_kv", heads["attn_q"])
    tensors: dict[str, GGUFTensor] = {}
    for gguf_name, entry in header.tensors.items():
        if gguf_name == ROPE_FREQS:
            continue
        found = _LAYER_NAME.fullmatch(gguf_name)
        num_heads = heads.get(found[2], 0) if found else 0
        if num_heads and entry.shape[0] % (2 * num_heads):
            raise CheckpointError(
                f"{header.path}: tensor {gguf_name!r} has {entry.shape[0]} rows, which are not "
                f"{num_heads} heads of an even size"
            )
        tensors[hf_name(gguf_name)] = GGUFTensor(gguf_name, entry, num_heads)
    return tensors


def gguf_config(header: GGUFHeader) -> dict[str, Any]:
    """The model's config in the words of Hugging Face's config.json.

    Raises CheckpointError where the architecture is not supported or a key is missing.
    """
    keys = _Keys(header)
    if keys.integer("expert_count", 0):
        raise CheckpointError(
            f"{header.path} is a mixture of experts; dense llama, qwen2 and qwen3 models are supported"
        )
    num_heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[keys.architecture]],
        "model_type": keys.architecture,
        "vocab_size": _vocab_size(header),
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": keys.integer("attention.key_length", hidden_size // max(num_heads, 1)),
        "rms_norm_eps": _shortest(keys.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(keys.number("rope.freq_base", 10000.0)),
        "max_position_embeddings": keys.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "hidden_act": "silu",
        "rope_scaling": _rope_scaling(header, keys),
    }
    window = keys.integer("attention.sliding_window", 0)
    if window:
        if keys.architecture == "llama":  # a Mistral: GGUF has one name for both, and Llama has no window
            config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
        config["sliding_window"] = window
        config["use_sliding_window"] = True
        config["max_window_layers"] = 0
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(token) is int:
            config[ours] = token
    return config


class _Keys:
    """The metadata under the architecture's prefix, with types checked."""

    def __init__(self, header: GGUFHeader) -> None:
        self._header = header
        architecture = header.metadata.get("general.architecture")
        if header.metadata.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                f"{header.path} is one part of a split GGUF; join the parts with llama-gguf-split --merge"
            )
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{header.path} holds the architecture {architecture!r}; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.architecture: str = architecture

    def get(self, key: str) -> Any:
        return self._header.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: float | None = None) -> float:
        found = self.get(key)
        if isinstance(found, list) and found and all(item == found[0] for item in found):
            found = found[0]  # one value a layer, all alike
        if found is None and default is not None:
            return default
        if type(found) not in (int, float) or not math.isfinite(found):
            raise CheckpointError(
                f"{self._header.path}: metadata {self.architecture}.{key}={found!r} is no usable number"
            )
        return found

    def integer(self, key: str, default: int | None = None) -> int:
        found = self.number(key, default)
        if found != int(found) or found < 0:
            raise CheckpointError(
                f"{self._header.path}: metadata {self.architecture}.{key}={found!r} is no count"
            )
        return int(found)


def _shortest(value: float) -> float:
    """The shortest decimal that gives the same fp32 number: 1e-05 where fp32 stores 9.99999974e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _vocab_size(header: GGUFHeader) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None:
        return embedding.shape[0]
    raise CheckpointError(f"{header.path} lacks the tensor token_embd.weight; fetch it again")


def _rope_scaling(header: GGUFHeader, keys: _Keys) -> dict[str, Any] | None:
    if ROPE_FREQS in header.tensors:
        return _llama3_scaling(header, keys)
    kind = keys.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": keys.number("rope.scaling.factor"),
            "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
        }
    raise CheckpointError(
        f"{header.path}: rope scaling {kind!r} is not supported; linear, yarn and llama3 are"
    )


def _llama3_scaling(header: GGUFHeader, keys: _Keys) -> dict[str, Any]:
    """The llama3 parameters behind rope_freqs.weight, whose largest factor is the scaling itself."""
    entry = header.tensors[ROPE_FREQS]
    if entry.type.name != "F32" or not 0 < math.prod(entry.shape) <= 4096:
        raise CheckpointError(
            f"{header.path}: {ROPE_FREQS} is {entry.type.name} {list(entry.shape)}, not a short F32 list"
        )
    with header.path.open("rb") as file:
        file.seek(entry.offset)
        factors = struct.unpack(f"<{entry.nbytes // 4}f", file.read(entry.nbytes))
    scaling = {
        "rope_type": "llama3",
        "factor": _shortest(max(factors)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(scaling, keys.number("rope.freq_base", 10000.0), 2 * len(factors))
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected, strict=True)):
        raise CheckpointError(
            f"{header.path}: {ROPE_FREQS} does not come from llama3 scaling by {scaling['factor']} with "
            f"low_freq_factor 1, high_freq_factor 4 and an original context of 8192; use the safetensors "
            f"checkpoint"
        )
    return scaling


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> list[float]:
    """What llama3 scaling divides each of the head_dim / 2 rotary frequencies by.

    Wavelengths under original / high_freq_factor stay, those over original / low_freq_factor are divided
    by `factor`, and between them the frequency is interpolated.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
