"""What a run will hold in memory, from shapes alone: bytes of weights and cache on every rank, fits or not.

No torch, no weights: a 70B plan over 8 ranks takes milliseconds. The same sums refuse a load that
cannot fit before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.inventory import TensorInfo
from ..config import EngineConfig
from ..errors import ConfigError, MemoryLimitError
from ..layout import WeightFormat, weight_format
from ..models.config import ModelConfig
from ..sharding.plan import Plan
from ..sharding.rules import DecoderShape, plan_decoder

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
# The interpreter, torch, compiled code, a prompt's activations, and room to read the next tensor.
OVERHEAD_BYTES = 700 << 20
MOST_DEFAULT_CONTEXT = 8192


def sharding_plan(config: ModelConfig, world_size: int) -> Plan:
    """This family's declared plan. Raises ShardingError where the heads do not bear that many ranks."""
    return plan_decoder(
        DecoderShape(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            tied=config.tie_word_embeddings,
            attention_bias=config.attention_bias,
            attention_out_bias=config.attention_out_bias,
            qk_norm=config.qk_norm,
        ),
        world_size,
    )


# Storage types of a GGUF whose 4-bit groups have an offset, or have none; kept by 4-bit formats.
_ASYMMETRIC = {"Q4_1": True, "Q4_0": False}


def formats(
    config: EngineConfig, stored: Mapping[str, TensorInfo] | None = None
) -> Callable[[str], WeightFormat | None]:
    """Parameter name -> its format: head and embedding as --head-quant says, other matrices as --quant.

    stored: what the checkpoint holds. A 4-bit format keeps the scheme of a GGUF's 4-bit blocks.
    """
    body = weight_format(config.quant, asymmetric=config.int4_asym)
    head_name = config.head_quant or ("int8" if body is not None and body.bits == 4 else config.quant)
    head = weight_format(head_name, asymmetric=config.int4_asym)

    def format_of(name: str) -> WeightFormat | None:
        if not name.endswith(".weight") or name.endswith("norm.weight"):
            return None
        form = head if name.endswith(("embed_tokens.weight", "lm_head.weight")) else body
        kept = _ASYMMETRIC.get(stored[name].type_name) if stored and name in stored else None
        return form if form is None or form.bits != 4 or kept is None else replace(form, asymmetric=kept)

    return format_of


def layer_of(name: str) -> int:
    """The number in model.layers.N.x; -1 for other names. --layers leaves the later ones unread."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2].isdigit() else -1


def context_limit(config: EngineConfig, model: ModelConfig) -> int:
    """Most tokens a row may hold: --context, else the model's limit and at most 8192.

    Raises ConfigError where --context is beyond the model's limit.
    """
    if config.context is None:
        return min(model.max_position_embeddings, MOST_DEFAULT_CONTEXT)
    if config.context > model.max_position_embeddings:
        raise ConfigError(
            f"--context {config.context} is beyond this model's {model.max_position_embeddings} positions; "
            f"use at most that"
        )
    return config.context


@dataclass(frozen=True)
class RankMemory:
    """One rank's sums, in bytes. limit: free memory it may use; None: unknown."""

    rank: int
    weight_bytes: int
    cache_bytes: int
    limit_bytes: int | None

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + OVERHEAD_BYTES

    @property
    def fits(self) -> bool | None:
        return None if self.limit_bytes is None else self.total_bytes <= self.limit_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """All ranks' sums. context: tokens a row may hold; cache is that for one row (the least that runs)."""

    ranks: tuple[RankMemory, ...]
    context: int
    dtype: str
    quant: str

    def check(self, model: str) -> None:
        """Raise MemoryLimitError, with the numbers and a way out, where some rank cannot hold its part."""
        for rank in self.ranks:
            if rank.fits is False:
                assert rank.limit_bytes is not None
                raise MemoryLimitError(
                    f"{model} as {self.quant}/{self.dtype} over {len(self.ranks)} ranks needs "
                    f"{gib(rank.total_bytes)} on rank {rank.rank} (weights {gib(rank.weight_bytes)}, cache "
                    f"of {self.context} tokens {gib(rank.cache_bytes)}, the rest {gib(OVERHEAD_BYTES)}) and "
                    f"{gib(rank.limit_bytes)} are free there; use more ranks, a smaller --quant or --context"
                )

    def to_dict(self) -> dict[str, Any]:
        ranks = [
            {
                "rank": r.rank,
                "weight_bytes": r.weight_bytes,
                "cache_bytes": r.cache_bytes,
                "total_bytes": r.total_bytes,
                "limit_bytes": r.limit_bytes,
                "fits": r.fits,
            }
            for r in self.ranks
        ]
        return {"context": self.context, "dtype": self.dtype, "quant": self.quant, "ranks": ranks}


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"


def local_kv_heads(plan: Plan, rank: int, model: ModelConfig) -> int:
    """KV heads a rank holds."""
    return plan["model.layers.0.self_attn.k_proj.weight"].local_shape(rank)[0] // model.head_dim


def cache_vector_bytes(head_dim: int, number_bytes: int) -> int:
    """Bytes of one token's key, or value, of one head; numbers of one byte (int8) have an fp32 scale."""
    return head_dim * number_bytes + (4 if number_bytes == 1 else 0)


def memory_plan(
    model: ModelConfig,
    plan: Plan,
    config: EngineConfig,
    *,
    dtype: str,
    format_of: Callable[[str], WeightFormat | None],
    limits: Sequence[int | None],
) -> MemoryPlan:
    """Every rank's bytes. limits: free bytes of each rank; None where unknown."""
    world, context = plan.world_size, context_limit(config, model)
    cache_dtype = dtype if config.cache_dtype == "auto" else config.cache_dtype
    vector_bytes = cache_vector_bytes(model.head_dim, DTYPE_BYTES[cache_dtype])
    ranks = []
    for rank in range(world):
        weights = sum(
            weight.weight_bytes(rank, DTYPE_BYTES[dtype], format_of(weight.name)) for weight in plan.weights
        )
        vectors = 2 * model.num_layers * local_kv_heads(plan, rank, model) * context
        ranks.append(RankMemory(rank, weights, vectors * vector_bytes, limits[rank]))
    return MemoryPlan(tuple(ranks), context, dtype, config.quant)
