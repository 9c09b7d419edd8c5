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
from .kv_blocks import BLOCK_SIZE

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
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


# Whether groups of a GGUF's storage types have an offset; 4-bit formats keep what the file has.
_ASYMMETRIC = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), True),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "Q6_K"), False),
}


def formats(
    config: EngineConfig, stored: Mapping[str, TensorInfo] | None = None
) -> Callable[[str], WeightFormat | None]:
    """Parameter name -> its format: head and embedding as --head-quant says, other matrices as --quant.

    stored: what the checkpoint holds. A 4-bit format keeps the scheme of a GGUF's blocks.
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
    """One rank's sums, in bytes. row: cache of one row of the context, the least that runs; cache: what is
    taken for certain. limit: free memory it may use; None: unknown."""

    rank: int
    weight_bytes: int
    cache_bytes: int
    limit_bytes: int | None
    row_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + OVERHEAD_BYTES

    @property
    def fits(self) -> bool | None:
        return None if self.limit_bytes is None else self.total_bytes <= self.limit_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """All ranks' sums. context: tokens a row may hold; cache is --cache-bytes, else that of one row."""

    ranks: tuple[RankMemory, ...]
    context: int
    dtype: str
    quant: str

    def check(self, model: str) -> None:
        """Raise MemoryLimitError, with the numbers and a way out, where some rank cannot hold its part."""
        for rank in self.ranks:
            if rank.cache_bytes < rank.row_bytes:
                raise small_cache(self.context, rank.row_bytes, rank.cache_bytes)
            if rank.fits is False:
                assert rank.limit_bytes is not None
                raise MemoryLimitError(
                    f"{model} as {self.quant}/{self.dtype} over {len(self.ranks)} ranks needs "
                    f"{gib(rank.total_bytes)} on rank {rank.rank} (weights {gib(rank.weight_bytes)}, KV "
                    f"cache {gib(rank.cache_bytes)} at a context of {self.context}, the rest "
                    f"{gib(OVERHEAD_BYTES)}) and {gib(rank.limit_bytes)} are free there; use more ranks, a "
                    f"smaller --quant, --context or --cache-bytes"
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


def small_cache(context: int, row_bytes: int, found_bytes: int) -> MemoryLimitError:
    """The refusal of a cache that does not hold one row of the context."""
    return MemoryLimitError(
        f"the KV cache of one row of {context} tokens takes {row_bytes} bytes a rank; {found_bytes} are "
        f"allowed; use a smaller --context, a larger --cache-bytes, or more ranks"
    )


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"


def local_kv_heads(plan: Plan, rank: int, model: ModelConfig) -> int:
    """KV heads a rank holds."""
    return plan["model.layers.0.self_attn.k_proj.weight"].local_shape(rank)[0] // model.head_dim


def cache_vector_bytes(head_dim: int, number_bytes: int, *, scaled: bool) -> int:
    """Bytes of one token's key, or value, of one head. scaled: with an fp32 scale, as int8's are."""
    return head_dim * number_bytes + (4 if scaled else 0)


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
    vector_bytes = cache_vector_bytes(model.head_dim, DTYPE_BYTES[cache_dtype], scaled=cache_dtype == "int8")
    ranks = []
    for rank in range(world):
        weights = sum(
            weight.weight_bytes(rank, DTYPE_BYTES[dtype], format_of(weight.name)) for weight in plan.weights
        )
        block_vectors = 2 * model.num_layers * local_kv_heads(plan, rank, model) * BLOCK_SIZE
        row = -(-context // BLOCK_SIZE) * block_vectors * vector_bytes
        cache = row if config.cache_bytes is None else config.cache_bytes
        ranks.append(RankMemory(rank, weights, cache, limits[rank], row))
    return MemoryPlan(tuple(ranks), context, dtype, config.quant)
