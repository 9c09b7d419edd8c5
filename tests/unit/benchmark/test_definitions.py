"""The definitions against sums done by hand, and a card that names what it ran on."""

from __future__ import annotations

import math

import pytest

from tp_runtime.benchmark import card, definitions
from tp_runtime.benchmark.definitions import Spread, quantile
from tp_runtime.config import EngineConfig
from tp_runtime.engine.figures import weight_bytes_per_token
from tp_runtime.engine.memory import formats, sharding_plan
from tp_runtime.models.config import ModelConfig
from tp_runtime.models.registry import find

TINY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip


def test_a_prompt_is_held_to_the_matmuls_of_its_turn() -> None:
    """A host twice as slow in one turn slows both: 0.8, 0.8, and 0.5 of its own."""
    assert definitions.prefill_share(1000, [1.25, 2.5, 2.0], [1000.0, 500.0, 1000.0]) == pytest.approx(0.8)


def test_mbu_is_bytes_over_ceiling() -> None:
    """1 GB a token at 20 tokens/s is 20 GB/s, of 25."""
    assert definitions.mbu(10**9, 20.0, 1, 25.0) == pytest.approx(0.8)


def test_mbu_by_turn_holds_each_to_its_own_readings() -> None:
    turns = [{"tok_s": s, "read_ceiling_gb_s": c} for s, c in ((20.0, 25.0), (30.0, 40.0), (36.0, 40.0))]
    document = {"weight_bytes_per_token": 10**9, "batch": 1, "turns": turns}
    assert definitions.mbu_by_turn(document) == pytest.approx(0.8)


def test_mbu_of_a_batch_counts_steps() -> None:
    """Four rows of 20 tokens/s each share one reading of the weights."""
    assert definitions.mbu(10**9, 80.0, 4, 25.0) == pytest.approx(0.8)


def test_quantiles_are_linear_between_samples() -> None:
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.median, spread.p10, spread.p90) == pytest.approx((3.0, 1.4, 4.6))
    assert quantile([7.0], 0.99) == 7.0


@pytest.mark.parametrize("world_size", [1, 2])
def test_linears_are_a_rank_s_part(world_size: int) -> None:
    shapes = {name: (n, k) for name, n, k in definitions.linears(TINY, world_size)}
    assert shapes == {
        "qkv": (128 // world_size, 64),
        "o": (64, 64 // world_size),
        "gate_up": (256 // world_size, 64),
        "down": (64, 128 // world_size),
        "head": (512 // world_size, 64),
    }


def test_linears_hold_all_the_bytes_of_a_token() -> None:
    """The shapes that are measured add up to the weight bytes of the engine's own definition."""
    entry = find("llama-1b")
    assert entry is not None
    config = entry.config
    per_layer = sum(n * k for name, n, k in definitions.linears(config) if name != "head")
    values = per_layer * config.num_layers + config.vocab_size * config.hidden_size
    engine = EngineConfig(model="llama-1b")
    found = weight_bytes_per_token(sharding_plan(config, 1), True, formats(engine), 2)
    assert found == 2 * values


def test_prefill_runs_the_head_once() -> None:
    body = 2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128) * TINY.num_layers
    assert definitions.prefill_operations(TINY, 10) == 10 * body + 2 * 512 * 64


def test_cache_bytes() -> None:
    assert definitions.cache_bytes_per_token(TINY, 100, 16 * 2) == 2 * 2 * 2 * 16 * 2 * 100


@pytest.mark.parametrize(
    ("quant", "bits"),
    [("none", 16), ("int8", 8), ("int8-g32", 8.5), ("int4", 4.5), ("int4-g64", 4.25), ("int4-g128", 4.125)],
)
def test_bits_per_weight(quant: str, bits: float) -> None:
    assert definitions.bits_per_weight(quant) == bits


def test_cache_resident_below_four_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definitions, "last_level_cache_bytes", lambda: 100)
    assert definitions.is_cache_resident(399)
    assert not definitions.is_cache_resident(400)
    assert definitions.ceiling_bytes() == 8 << 20  # a cache of less than 1 MiB is not believed


def test_card_names_hardware_versions_and_commit() -> None:
    import torch

    found = card.card()
    assert found["torch"] == torch.__version__
    assert found["cpus"] >= 1 and found["memory_bytes"] > 0 and math.isfinite(found["load_average"])
    assert found["commit"] is None or found["commit"] in card.card_lines(found)
