"""The declared plan of the Llama family: which heads, neurons and tokens each rank holds.

Attention divides by key-value groups (a KV head and the query heads that read it), so that no rank needs
another's keys. Where there are at least as many KV heads as ranks, each rank has whole groups. Where
there are fewer, each KV head is copied to several ranks, and each of them has some of its query heads.
Either way every KV head of a rank serves the same number of its query heads.

Groups rarely divide evenly, but the MLP divides by single neurons: each rank's share of it is what its
attention leaves, so that all ranks read about as many weight bytes a token (the step takes as long as
its fullest rank). Boundaries lie at multiples of 32 neurons, a group of the common 4-bit formats, or of
16, 8, ... where 32 would leave a rank more than 3% above the mean.

Two all-reduces a layer, one for the embedding, one all-gather for the logits. No torch.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from ..errors import ShardingError
from .plan import Collective, Plan, Ranges, WeightPlan

BALANCE = 1.03  # bytes of the fullest rank over the mean, where boundaries may still be rounded
MLP_UNITS = (32, 16, 8, 4, 2, 1)
VOCAB_UNITS = (16, 1)


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of a Llama-family model that decide its plan; words as in Hugging Face's config.json.

    tied: the head is the embedding's weight. attention_bias: of q, k and v; attention_out_bias: of o.
    qk_norm: per-head norms of queries and keys.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class RankHeads:
    """Half-open ranges of the query heads and KV heads of one rank."""

    q: tuple[int, int]
    kv: tuple[int, int]


def plan_decoder(shape: DecoderShape, world_size: int) -> Plan:
    """The plan over world_size ranks; parameters are named as in Hugging Face checkpoints.

    Raises ShardingError for more ranks than query heads, MLP neurons or tokens of the vocabulary.
    """
    _check_world(shape, world_size)
    heads = split_heads(shape.num_heads, shape.num_kv_heads, world_size)
    neurons = _split_mlp(shape, heads)
    tokens = split_range(shape.vocab_size, [0] * world_size, 1, VOCAB_UNITS)
    reduced = Collective("all_reduce", shape.hidden_size)
    gathered = Collective("all_gather", shape.vocab_size)
    table = (shape.vocab_size, shape.hidden_size)
    embedding = (reduced, gathered) if shape.tied else (reduced,)
    weights = [WeightPlan("model.embed_tokens.weight", table, "vocab", 0, tokens, "token", "", embedding)]
    for layer in range(shape.num_layers):
        weights += _layer(f"model.layers.{layer}.", shape, heads, neurons)
    weights.append(_norm("model.norm.weight", shape.hidden_size))
    if not shape.tied:
        weights.append(WeightPlan("lm_head.weight", table, "vocab", 0, tokens, "token", "", (gathered,)))
    return Plan(world_size, tuple(weights))


def _check_world(shape: DecoderShape, world_size: int) -> None:
    if world_size < 1:
        raise ShardingError(f"a model cannot be split over {world_size} ranks; use --nproc 1 or more")
    limits = (
        ("num_heads", shape.num_heads, "query head"),
        ("intermediate_size", shape.intermediate_size, "MLP neuron"),
        ("vocab_size", shape.vocab_size, "token of the vocabulary"),
    )
    for field, limit, unit in limits:
        if world_size > limit:
            raise ShardingError(
                f"{field}={limit} cannot be split over {world_size} ranks: at most one rank a {unit}; "
                f"use --nproc {limit} or fewer"
            )


def _even(total: int, parts: int) -> list[tuple[int, int]]:
    """`parts` contiguous ranges of `total`, the first ones longer by one where it does not divide."""
    size, longer = divmod(total, parts)
    bounds = [part * size + min(part, longer) for part in range(parts + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def split_heads(num_heads: int, num_kv_heads: int, world_size: int) -> tuple[RankHeads, ...]:
    """The heads of each rank, in order. num_kv_heads divides num_heads and world_size <= num_heads."""
    group = num_heads // num_kv_heads
    if num_kv_heads >= world_size:
        return tuple(RankHeads((a * group, b * group), (a, b)) for a, b in _even(num_kv_heads, world_size))
    found = []
    for kv_head, (first, last) in enumerate(_even(world_size, num_kv_heads)):
        for start, stop in _even(group, last - first):
            found.append(RankHeads((kv_head * group + start, kv_head * group + stop), (kv_head, kv_head + 1)))
    return tuple(found)


def split_range(total: int, loads: list[int], cost: int, units: tuple[int, ...]) -> tuple[Ranges, ...]:
    """One contiguous range of `total` elements a rank, so that loads plus cost an element come out even.

    loads: what each rank bears already. Ranges begin at multiples of the first of `units` (descending,
    ending in 1) that leaves no rank more than 3% above the mean load; of 1 where none does. Every rank
    gets an element at least.
    """
    mean = (sum(loads) + cost * total) / len(loads)
    for unit in units:
        if -(-total // unit) < len(loads):
            continue
        counts = _fill(-(-total // unit), loads, cost * unit)
        bounds = [min(sum(counts[:rank]) * unit, total) for rank in range(len(loads) + 1)]
        ranges = tuple(((start, stop),) for start, stop in zip(bounds, bounds[1:], strict=False))
        if unit == 1 or max(_loads(ranges, loads, cost)) <= BALANCE * mean:
            return ranges
    raise AssertionError(f"units {units} must end in 1, and {total} elements must reach {len(loads)} ranks")


def _loads(ranges: tuple[Ranges, ...], loads: list[int], cost: int) -> list[int]:
    return [load + cost * (stop - start) for load, ((start, stop),) in zip(loads, ranges, strict=True)]


def _fill(count: int, loads: list[int], cost: int) -> list[int]:
    """How many of `count` equal pieces each rank gets: one each, then each to the rank least loaded."""
    counts = [1] * len(loads)
    queue = [(load + cost, rank) for rank, load in enumerate(loads)]
    heapq.heapify(queue)
    for _ in range(count - len(loads)):
        load, rank = queue[0]
        counts[rank] += 1
        heapq.heapreplace(queue, (load + cost, rank))
    return counts


def _split_mlp(shape: DecoderShape, heads: tuple[RankHeads, ...]) -> tuple[Ranges, ...]:
    """The neurons of each rank. Loads are counted in rows (or columns) of hidden_size values: two a query
    head's element (q, o), two a KV head's (k, v), three a neuron (gate, up, down)."""
    loads = [2 * shape.head_dim * (h.q[1] - h.q[0] + h.kv[1] - h.kv[0]) for h in heads]
    return split_range(shape.intermediate_size, loads, 3, MLP_UNITS)


def _norm(name: str, size: int) -> WeightPlan:
    return WeightPlan(name, (size,), "replicate", reason="norm")


def _layer(
    prefix: str, shape: DecoderShape, heads: tuple[RankHeads, ...], neurons: tuple[Ranges, ...]
) -> list[WeightPlan]:
    hidden, dim, mlp = shape.hidden_size, shape.head_dim, prefix + "mlp."
    attn = prefix + "self_attn."
    q_parts = tuple(((h.q[0] * dim, h.q[1] * dim),) for h in heads)
    kv_parts = tuple(((h.kv[0] * dim, h.kv[1] * dim),) for h in heads)
    q_size, kv_size = shape.num_heads * dim, shape.num_kv_heads * dim
    q_unit = "kv group" if shape.num_kv_heads >= len(heads) else "query head"
    weights = [_norm(prefix + "input_layernorm.weight", hidden)]
    for name, size, parts, unit in (
        ("q_proj", q_size, q_parts, q_unit),
        ("k_proj", kv_size, kv_parts, "kv head"),
        ("v_proj", kv_size, kv_parts, "kv head"),
    ):
        weights.append(WeightPlan(f"{attn}{name}.weight", (size, hidden), "column", 0, parts, unit))
        if shape.attention_bias:
            weights.append(WeightPlan(f"{attn}{name}.bias", (size,), "column", 0, parts, unit))
    weights.append(WeightPlan(attn + "o_proj.weight", (hidden, q_size), "row", 1, q_parts, q_unit))
    if shape.attention_out_bias:
        added_once = "added after the all-reduce"
        weights.append(WeightPlan(attn + "o_proj.bias", (hidden,), "replicate", reason=added_once))
    if shape.qk_norm:
        weights += [_norm(attn + "q_norm.weight", dim), _norm(attn + "k_norm.weight", dim)]
    width = shape.intermediate_size
    return [
        *weights,
        _norm(prefix + "post_attention_layernorm.weight", hidden),
        WeightPlan(mlp + "gate_proj.weight", (width, hidden), "column", 0, neurons, "neuron"),
        WeightPlan(mlp + "up_proj.weight", (width, hidden), "column", 0, neurons, "neuron"),
        WeightPlan(mlp + "down_proj.weight", (hidden, width), "row", 1, neurons, "neuron"),
    ]
