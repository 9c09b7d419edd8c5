"""ModelConfig: what config.json dialects mean, and the sentence for what describes no model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tp_runtime.models.config import ModelConfig, ModelConfigError

# As Meta-Llama-3.1-8B's config.json has it, in the old spelling.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
# As Qwen2.5-7B-Instruct's: a window that is switched off, and no word of the biases it has.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def test_llama_8b() -> None:
    config = ModelConfig.from_hf(LLAMA_8B)
    assert config == ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=LLAMA_8B["rope_scaling"],
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_qwen2_has_biases_and_no_window() -> None:
    config = ModelConfig.from_hf(QWEN)
    assert config.attention_bias and not config.attention_out_bias
    assert config.window(27) == 0
    assert config.eos_token_ids == (151645,)


def test_windows() -> None:
    switch = {"use_sliding_window": True, "max_window_layers": 20}
    switched_on = ModelConfig.from_hf(QWEN | switch)
    assert [switched_on.window(layer) for layer in (0, 19, 20, 27)] == [0, 0, 131072, 131072]
    mistral = LLAMA_8B | {"architectures": ["MistralForCausalLM"], "rope_scaling": None}
    assert ModelConfig.from_hf(mistral).window(0) == 4096, "the default of its class"
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).window(0) == 0
    llama = ModelConfig.from_hf(LLAMA_8B | {"use_sliding_window": True, "sliding_window": 3})
    assert llama.window(31) == 0, "Llama has none"
    default = ModelConfig.from_hf({k: v for k, v in QWEN.items() if k != "sliding_window"} | switch)
    assert default.window(27) == 4096, "the default of its class"


@pytest.mark.parametrize("full", [0, 5, 32])
def test_layer_types_say_which_layers_have_the_window(full: int) -> None:
    kinds = ["full_attention"] * full + ["sliding_attention"] * (32 - full)
    mistral = LLAMA_8B | {"architectures": ["MistralForCausalLM"], "rope_scaling": None, "layer_types": kinds}
    config = ModelConfig.from_hf(mistral | {"sliding_window": 9})
    assert [config.window(layer) for layer in range(32)] == [0] * full + [9] * (32 - full)
    with pytest.raises(ModelConfigError, match="mixes windows in an order that is not supported"):
        ModelConfig.from_hf(mistral | {"layer_types": [*kinds[1:], "sliding_attention", "full_attention"]})


def test_rope_scaling_wins_over_rope_parameters() -> None:
    """As in transformers, whose rope_parameters then count for nothing."""
    from transformers import LlamaConfig

    new = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    old = {"rope_type": "linear", "factor": 4.0}
    both = ModelConfig.from_hf(LLAMA_8B | {"rope_parameters": new, "rope_scaling": old, "rope_theta": 300.0})
    theirs = LlamaConfig(rope_parameters=dict(new), rope_scaling=dict(old), rope_theta=300.0).rope_parameters
    assert both.rope_scaling == old
    assert (both.rope_theta, both.rope_scaling["factor"]) == (theirs["rope_theta"], theirs["factor"])
    alone = ModelConfig.from_hf(
        LLAMA_8B | {"rope_parameters": new, "rope_scaling": None, "rope_theta": 300.0}
    )
    assert (alone.rope_theta, alone.rope_scaling) == (500.0, {"rope_type": "linear", "factor": 2.0})


def test_model_type_alone_is_enough() -> None:
    without = {key: value for key, value in QWEN.items() if key != "architectures"}
    assert ModelConfig.from_hf(without) == ModelConfig.from_hf(QWEN)


def test_yarn_fills_in_what_is_unsaid() -> None:
    scaling = {"type": "yarn", "original_max_position_embeddings": 8192, "finetuned": True}
    found = ModelConfig.from_hf(QWEN | {"rope_scaling": scaling}).rope_scaling
    assert found == {"rope_type": "yarn", "original_max_position_embeddings": 8192, "factor": 4.0}


MIXED = ["full_attention", "sliding_attention"] * 14


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
            "'MixtralForCausalLM' is not of the",
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
            "'Gemma2ForCausalLM' is not of the",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "'LlamaForSequenceClassification' is not of the",
        ),
        ({"architectures": None, "model_type": None}, "architecture 'None' is not of the"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"hidden_size": "many"}, "config.json has hidden_size='many'; a whole number is needed"),
        ({"num_hidden_layers": None}, "config.json has num_hidden_layers=None"),
        ({"num_attention_heads": 0}, "num_heads=0 is not a whole number of at least 1"),
        ({"num_key_value_heads": 5}, "num_heads=28 is no multiple of num_kv_heads=5"),
        ({"head_dim": 127}, "head_dim=127 is odd"),
        ({"head_dim": 12.5}, "head_dim=12.5 is not a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a number above 0"),
        ({"vocab_size": -1}, "vocab_size=-1 is not a whole number"),
        ({"eos_token_id": ["x"]}, "bos or eos token 'x'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rotary scaling of type 'dynamic' is not supported",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rotary scaling 'linear' lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0, which is no number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "'linear' has beta, which this type"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "needs a high_freq_factor above its low_freq_factor",
        ),
        ({"rope_scaling": 4.0}, "rope_scaling=4.0 is no table of numbers"),
        ({"rope_theta": 1}, "rope_theta=1 is not above 1"),
        ({"use_sliding_window": True, "layer_types": MIXED}, "mixes windows in an order"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000 is above 4096"),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelConfigError) as error:
        ModelConfig.from_hf(QWEN | changes)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


SCALARS = [None, True, 0, -1, 3, 2**70, 10**400, 0.0, 0.5, float("nan"), float("inf"), "", "x"]
KINDS = ["linear", "llama3", "yarn", "default"]
JUNK = st.one_of(
    st.sampled_from(SCALARS),
    st.lists(st.sampled_from(SCALARS), max_size=2),
    st.dictionaries(
        st.sampled_from(["type", "rope_type", "factor", "original_max_position_embeddings", "rope_theta"]),
        st.sampled_from(SCALARS + KINDS),
        max_size=4,
    ),
)
KEYS = st.sampled_from([*QWEN, "rope_scaling", "rope_parameters", "layer_types"])


@given(st.dictionaries(KEYS, JUNK, max_size=4))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_junk_is_refused_in_our_words(changes: dict[str, Any]) -> None:
    """Whatever stands in a config.json, the outcome is a config or a ModelConfigError."""
    try:
        ModelConfig.from_hf(QWEN | changes)
    except ModelConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("vocab_size = ", "is no TOML"),
        ("vocab_size = 9\nlayers = 2", "has 'layers', which is no field"),
        ("vocab_size = 9", "lacks hidden_size, intermediate_size"),
    ],
)
def test_broken_files(tmp_path: Any, text: str, sentence: str) -> None:
    path = tmp_path / "model.toml"
    path.write_text(text)
    with pytest.raises(ModelConfigError, match=sentence):
        ModelConfig.from_toml(path)


def test_frozen_and_checked_again_when_changed() -> None:
    config = ModelConfig.from_hf(QWEN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 2  # type: ignore[misc]
    assert dataclasses.replace(config, num_layers=2).num_layers == 2
    with pytest.raises(ModelConfigError, match="num_layers=0"):
        dataclasses.replace(config, num_layers=0)
