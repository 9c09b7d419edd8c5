"""What every figure of the benchmarks means, in one place. No torch.

read ceiling      the best that any of 1, 2, 4 and 8 streams a thread reads, in GB/s (10^9 bytes), over at
                  least CACHES_READ times the last-level cache, all ranks reading at once (their rates added
                  up). Taken before and after each case (kernels: between its passes too); the largest counts,
                  so that a noisy neighbour during one of the readings cannot flatter the case. Another number
                  of threads has its own.
kernels           run over rotating copies of their weight, together as large as the memory of the ceiling,
                  in a loop in C++, which is where the engine's step calls them. (Attention, whose calls take
                  far longer, and the matmuls of many rows are called from Python.) On GPUs all of them are
                  captured CUDA graphs; linears of few rows take bf16 activations.
weight bytes      of a token: the unsharded model's matmul weights and scales at the stated format, a tied
                  head once, no padding, no copies (engine/figures.py computes it).
mbu               weight bytes x steps a second / read ceiling. A step makes one token of each row of the
                  batch and reads the weights once, so at batch 1 steps are tokens. Cache bytes are apart.
                  Of the largest reading of all; by turn: the median over timed runs, each held to the larger
                  of the readings just before and after it, for hosts whose speed changes meanwhile.
cache resident    a model under CACHE_FACTOR times the last-level cache, or the L2 of all ranks' GPUs
                  together, may live there: no mbu is claimed.
prefill share     operations done a second over the best oneDNN bf16 matmul of PREFILL_ROWS rows on the
                  model's own shapes, all ranks at once, read before and after each prompt; the larger counts,
                  and the median of these shares. Operations: the linears on every prompt token, the head on
                  the last one only; attention's own are left out, so the share is a lower bound.
                  The peak of a GPU: the best bf16 torch.mm of random numbers, captured, on the model's own
                  shapes with as many rows as the prompt has tokens (PREFILL_ROWS at least), or on matrices of
                  PEAK_SIZE x PEAK_SIZE where that is faster. The head's matmul is among them.
all_reduce        in the step: a compiled chain of CHAIN dependent reductions, called from C++ (inductor's
                  cpp_wrapper) as the engine's step calls them; its time over CHAIN, waiting included.
                  On GPUs in_compiled means inside a captured CUDA graph, as the engine's step is one.
shapes            those the engine runs: q/k/v in one, o, gate and up in one (with the SiLU and the product),
                  down, head; a rank's own part, on fp32 activations that may be rounded as bf16's are.
bits a weight     of a stored format, its scales included: what peers are compared at.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.figures import CACHE_FACTOR, last_level_cache_bytes
from ..kernels.cpu.read_ceiling import CACHES_READ
from ..layout import WeightFormat, weight_format
from ..models.config import ModelConfig

PREFILL_ROWS = 512
PEAK_SIZE = 8192
CHAIN = 64  # dependent reductions in one compiled chain; the time of one is the chain's over CHAIN
_PLAIN_BITS = 16  # bf16, where nothing is quantised


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentiles (linear between the two nearest samples)."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        assert values, "a spread of nothing"
        return cls(statistics.median(values), quantile(values, 0.1), quantile(values, 0.9))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of all lie, linear between the two nearest samples."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def mbu(weight_bytes_per_token: int, tok_s: float, batch: int, read_ceiling_gb_s: float) -> float:
    """Share of the read ceiling that decoding uses. tok_s: of all rows of the batch together."""
    return weight_bytes_per_token * tok_s / batch / (read_ceiling_gb_s * 1e9)


def is_cache_resident(weight_bytes_per_token: int) -> bool:
    """Whether the weights may live in this process's last-level caches."""
    return weight_bytes_per_token < CACHE_FACTOR * last_level_cache_bytes()


def ceiling_bytes() -> int:
    """Memory that a rank reads for the ceiling and rotates its kernels over, by its own CPUs' caches."""
    return CACHES_READ * max(last_level_cache_bytes(), 1 << 20)


def mbu_by_turn(document: Mapping[str, Any]) -> float:
    """The median of the turns of a decode document that claims an mbu."""
    token_bytes, batch = document["weight_bytes_per_token"], document["batch"]
    turns = document["turns"]
    return statistics.median(
        mbu(token_bytes, turn["tok_s"], batch, turn["read_ceiling_gb_s"]) for turn in turns
    )


def linears(config: ModelConfig, world_size: int = 1) -> Iterator[tuple[str, int, int]]:
    """(name, n, k) of one rank's linears in a layer, then the head's; an even split."""
    heads, kv_heads = config.num_heads // world_size, max(1, config.num_kv_heads // world_size)
    inner = config.intermediate_size // world_size
    yield "qkv", (heads + 2 * kv_heads) * config.head_dim, config.hidden_size
    yield "o", config.hidden_size, heads * config.head_dim
    yield "gate_up", 2 * inner, config.hidden_size
    yield "down", config.hidden_size, inner
    yield "head", config.vocab_size // world_size, config.hidden_size


def prefill_operations(config: ModelConfig, num_tokens: int) -> int:
    """Multiplications and additions of one prompt's linears: the head runs on its last token only."""
    body = sum(2 * n * k for name, n, k in linears(config) if name != "head")
    return body * config.num_layers * num_tokens + 2 * config.vocab_size * config.hidden_size


def prefill_share(operations: int, seconds: Sequence[float], rates: Sequence[float]) -> float:
    """The median over turns of a prompt's operations a second over the rate of matmuls of its turn."""
    shares = [operations / taken / rate for taken, rate in zip(seconds, rates, strict=True)]
    return statistics.median(shares)


def cache_bytes_per_token(config: ModelConfig, num_tokens: int, vector_bytes: int) -> int:
    """Bytes of keys and values that decoding one token after `num_tokens` cached ones reads, unsharded.

    vector_bytes: of one token's key of one head, as CacheShape has it.
    """
    return 2 * config.num_layers * config.num_kv_heads * vector_bytes * num_tokens


def bits_per_weight(quant: str) -> float:
    """Bits that a weight of this format takes; a scale a row counts as nothing beside its row."""
    return bits_of(weight_format(quant))


def bits_of(form: WeightFormat | None) -> float:
    """The same of a format, whose groups may have offsets; None: plain bf16."""
    if form is None:
        return float(_PLAIN_BITS)
    each = form.scale_bytes * (2 if form.asymmetric else 1)
    return form.bits + (0 if form.group_size is None else 8 * each / form.group_size)
