"""The shape of one Llama-family model: a frozen record, checked when it is made.

The family: pre-norm decoder layers of grouped-query attention with rotary positions and a SwiGLU MLP,
RMSNorm everywhere, embeddings tied to the head or not. What its members differ in are fields here
(biases of Qwen2, per-head q/k norm of Qwen3, the window of Mistral), so no code asks for a model's name.
Field names are those of Hugging Face's config.json, shortened (num_heads for num_attention_heads).

Imports neither torch nor the rest of the project: bad input is refused before torch is loaded, and
models stay usable alone. That is why the error here is a plain ValueError of its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


class ModelConfigError(ValueError):
    """A configuration that describes no model of this family; the message is one sentence for users."""


# Above any model's, and low enough that an absurd file is refused before it costs time or memory.
_LARGEST = {"num_layers": 4096, "max_position_embeddings": 2**31}  # all other sizes: 2**24

# Keys of each kind of rotary scaling: those it needs, and those it may have.
_ROPE_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
}

# What config.json leaves unsaid because transformers' class of that model_type says it.
_SWITCHED_WINDOW = {"sliding_window": 4096, "window_switch": True}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"output_bias_follows": True},
    "mistral": {"sliding_window": 4096, "attention_bias": False},
    "qwen2": {**_SWITCHED_WINDOW, "attention_bias": True, "output_bias_follows": False},
    "qwen3": {**_SWITCHED_WINDOW, "qk_norm": True, "head_dim": 128, "output_bias_follows": True},
}
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define one model.

    attention_bias: q, k and v projections have a bias; attention_out_bias: the output projection has one.
    qk_norm: RMSNorm over head_dim of every query and key head, before the rotation.
    rope_scaling: None, or a mapping with "rope_type" ("linear", "llama3", "yarn") and that type's numbers.
    sliding_window: tokens a query sees, itself included (None: all before it), in the layers from
    max_window_layers on; the layers before see everything. eos_token_ids: any of them ends a text.

    Raises ModelConfigError for numbers that describe no model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.rope_scaling is not None:
            _check_rope(self.rope_scaling)

    def window(self, layer: int) -> int:
        """Tokens that a query of `layer` sees, itself included; 0: all before it."""
        return self.sliding_window if self.sliding_window and layer >= self.max_window_layers else 0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The record of a Hugging Face config.json. Raises ModelConfigError for another family."""
        family = _FAMILY[_model_type(raw)]
        _refuse_outside(raw)
        num_layers = _required(raw, "num_hidden_layers")
        num_heads = _required(raw, "num_attention_heads")
        hidden_size = _required(raw, "hidden_size")
        head_dim = raw.get("head_dim") or family.get("head_dim") or hidden_size // max(num_heads, 1)
        bias = bool(family.get("attention_bias", raw.get("attention_bias", False)))
        window, first = _window_from_hf(raw, family, num_layers)
        theta, scaling = _rope_from_hf(raw)
        eos = raw.get("eos_token_id")
        kv_heads = raw.get("num_key_value_heads")
        return cls(
            vocab_size=_required(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_required(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_required(raw, "max_position_embeddings"),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=bias,
            attention_out_bias=bias and family.get("output_bias_follows", False),
            qk_norm=family.get("qk_norm", False),
            sliding_window=window,
            max_window_layers=first,
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )

    @classmethod
    def from_toml(cls, path: str | Path) -> ModelConfig:
        """The record in a file of configs/models. Raises ModelConfigError; a missing file is an OSError."""
        return cls.from_table(read_toml(path), source=str(path))

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, source: str) -> ModelConfig:
        """The record of a parsed file; its [weights] table is the registry's. Unknown keys are refused."""
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in table.items() if key != "weights"}
        for key in given:
            if key not in known:
                raise ModelConfigError(
                    f"{source} has {key!r}, which is no field; use some of {sorted(known)}"
                )
        missing = [field.name for field in fields(cls)[:8] if field.name not in given]
        if missing:
            raise ModelConfigError(f"{source} lacks {', '.join(missing)}; every shape field must be given")
        if "eos_token_ids" in given:
            given["eos_token_ids"] = tuple(given["eos_token_ids"])
        return cls(**given)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ModelConfigError where it is none."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelConfigError(f"{path} is no TOML: {error}; repair that line") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _check_numbers(config: ModelConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            least = 0 if field.name == "max_window_layers" else 1
            if not _is_int(value) or value < least:
                raise ModelConfigError(f"{field.name}={value!r} is not a whole number of at least {least}")
            most = _LARGEST.get(field.name, 2**24)
            if value > most:
                raise ModelConfigError(f"{field.name}={value} is above {most}, the most that is accepted")
        elif field.type == "float" and not (_is_number(value) and value > 0):
            raise ModelConfigError(f"{field.name}={value!r} is not a number above 0")
        elif field.type == "bool" and not isinstance(value, bool):
            raise ModelConfigError(f"{field.name}={value!r} is neither true nor false")
    window = config.sliding_window
    if window is not None and not (_is_int(window) and window > 0):
        raise ModelConfigError(
            f"sliding_window={window!r} is not a whole number above 0; leave it out for none"
        )
    tokens = (*config.eos_token_ids, *(() if config.bos_token_id is None else (config.bos_token_id,)))
    for token in tokens:
        if not _is_int(token) or token < 0:
            raise ModelConfigError(f"the bos or eos token {token!r} is not a whole number of at least 0")
    if config.num_heads % config.num_kv_heads:
        raise ModelConfigError(
            f"num_heads={config.num_heads} is no multiple of num_kv_heads={config.num_kv_heads}: "
            "each key-value head must serve the same number of query heads"
        )
    if config.rope_theta <= 1:
        raise ModelConfigError(f"rope_theta={config.rope_theta} is not above 1: later pairs must turn slower")
    if config.head_dim % 2:
        raise ModelConfigError(f"head_dim={config.head_dim} is odd: rotary positions turn pairs of elements")


def _check_rope(scaling: Mapping[str, Any]) -> None:
    kind = scaling.get("rope_type")
    if kind not in _ROPE_KEYS:
        known = ", ".join(_ROPE_KEYS)
        raise ModelConfigError(
            f"rotary scaling of type {kind!r} is not supported; the known types are: {known}"
        )
    needed, optional = _ROPE_KEYS[kind]
    given = set(scaling) - {"rope_type"}
    if needed - given:
        raise ModelConfigError(f"rotary scaling {kind!r} lacks {', '.join(sorted(needed - given))}")
    if given - needed - optional:
        strange = ", ".join(sorted(given - needed - optional))
        raise ModelConfigError(f"rotary scaling {kind!r} has {strange}, which this type does not know")
    for key in sorted(given - {"truncate"}):
        if not _is_number(scaling[key]) or scaling[key] <= 0:
            raise ModelConfigError(
                f"rotary scaling {kind!r} has {key}={scaling[key]!r}, which is no number above 0"
            )
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ModelConfigError("rotary scaling 'llama3' needs a high_freq_factor above its low_freq_factor")


def _required(raw: Mapping[str, Any], key: str) -> int:
    if not _is_int(raw.get(key)):
        raise ModelConfigError(f"config.json has {key}={raw.get(key)!r}; a whole number is needed there")
    return raw[key]


def _model_type(raw: Mapping[str, Any]) -> str:
    """The known model_type of a config.json, by its architecture where it names one."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list):
        architectures = []
    asked = str(architectures[0] if architectures else raw.get("model_type"))
    found = _ARCHITECTURES.get(asked, "") if architectures else asked
    if found not in _FAMILY:
        known = ", ".join(_ARCHITECTURES)
        raise ModelConfigError(
            f"architecture {asked!r} is not of the Llama family; the known ones are: {known}"
        )
    return found


def _refuse_outside(raw: Mapping[str, Any]) -> None:
    """Settings that the four classes allow and no known model of theirs uses."""
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelConfigError(f"hidden_act={raw['hidden_act']!r} is not supported; the family's is 'silu'")
    if raw.get("mlp_bias", False):
        raise ModelConfigError("mlp_bias=true is not supported; the family's MLP has no bias")


def _window_from_hf(
    raw: Mapping[str, Any], family: Mapping[str, Any], num_layers: int
) -> tuple[int | None, int]:
    """(sliding_window, first layer that has it).

    Llama has none. Mistral's applies to every layer. Qwen's is switched by use_sliding_window and begins
    at max_window_layers. layer_types, where present, says which layers have it: they must be the last ones.
    """
    switched = bool(family.get("window_switch"))
    window = raw.get("sliding_window", family.get("sliding_window"))
    if window is None or "sliding_window" not in family or (switched and not raw.get("use_sliding_window")):
        return None, 0
    kinds = raw.get("layer_types")
    if not isinstance(kinds, list):
        return window, raw.get("max_window_layers", 28) if switched else 0
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else num_layers
    if kinds != ["full_attention"] * first + ["sliding_attention"] * (num_layers - first):
        raise ModelConfigError(
            f"layer_types={kinds} mixes windows in an order that is not supported: "
            "only the last layers may have the window"
        )
    return window, first


def _rope_from_hf(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) of either spelling: rope_parameters, or rope_theta and rope_scaling.

    Where both are there, rope_scaling alone counts, as in transformers.
    """
    spelling = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    table = raw.get(spelling) or {}
    if not isinstance(table, Mapping):
        raise ModelConfigError(f"{spelling}={table!r} is no table of numbers; leave it out for no scaling")
    given = {key: value for key, value in table.items() if value is not None}
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    theta = given.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    partial = given.pop("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    if partial != 1.0:
        raise ModelConfigError(
            f"partial_rotary_factor={partial} is not supported; the family turns whole heads"
        )
    if kind == "default":
        return theta, None
    given.pop("finetuned", None)
    if kind in ("llama3", "yarn"):
        longest = _required(raw, "max_position_embeddings")
        before = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = before or longest
        if kind == "yarn":
            given.setdefault("factor", _ratio(longest, given["original_max_position_embeddings"]))
    return theta, {"rope_type": kind, **given}


def _ratio(longest: int, original: Any) -> float | None:
    """How much longer the context is; None (which the check refuses) where `original` is no length."""
    return longest / original if _is_number(original) and original > 0 else None
