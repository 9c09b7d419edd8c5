"""The declared plan: every head, neuron and token is somewhere, and ranks weigh about the same."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_runtime.errors import ShardingError
from tp_runtime.layout import weight_format
from tp_runtime.models import registry
from tp_runtime.models.config import ModelConfig
from tp_runtime.models.llama import Llama
from tp_runtime.sharding.plan import Plan, extent
from tp_runtime.sharding.rules import BALANCE, DecoderShape, plan_decoder, split_heads

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _shape(config: ModelConfig) -> DecoderShape:
    return DecoderShape(
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.tie_word_embeddings,
        config.attention_bias,
        config.attention_out_bias,
        config.qk_norm,
    )


def _layer_bytes(plan: Plan) -> list[int]:
    """Per rank, the bytes of one layer's attention and MLP weights."""
    names = {f"{part}.weight" for part in ATTENTION_AND_MLP}
    weights = [w for w in plan.weights if ".layers.0." in w.name and w.name.split(".", 4)[4] in names]
    return [sum(w.weight_bytes(rank, 2) for w in weights) for rank in range(plan.world_size)]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[DecoderShape, int]:
    """A shape and a world size that its heads can bear."""
    num_kv_heads = draw(st.integers(1, 12))
    num_heads = num_kv_heads * draw(st.integers(1, 12))
    world_size = draw(st.integers(1, min(num_heads, 16)))
    shape = DecoderShape(
        vocab_size=draw(st.integers(world_size, 70_000)),
        hidden_size=draw(st.sampled_from([8, 576, 4096])),
        intermediate_size=draw(st.integers(world_size, 9_000)),
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 64, 128])),
        tied=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )
    return shape, world_size


@given(shapes())
@settings(max_examples=200, deadline=None)
def test_heads(case: tuple[DecoderShape, int]) -> None:
    """Each query head once, in order, beside its KV head, and as many a KV head within a rank."""
    shape, world_size = case
    group = shape.num_heads // shape.num_kv_heads
    heads = split_heads(shape.num_heads, shape.num_kv_heads, world_size)
    assert [q for rank in heads for q in range(*rank.q)] == list(range(shape.num_heads))
    for rank in heads:
        held = range(*rank.kv)
        readers = [[q for q in range(*rank.q) if q // group == kv] for kv in held]
        assert sum(map(len, readers)) == rank.q[1] - rank.q[0] > 0, "a query head without its KV head"
        assert len({len(group_heads) for group_heads in readers}) == 1
    if shape.num_kv_heads >= world_size:
        assert sum(rank.kv[1] - rank.kv[0] for rank in heads) == shape.num_kv_heads, "copies without need"


@given(shapes())
@settings(max_examples=200, deadline=None)
def test_parts_cover_each_weight(case: tuple[DecoderShape, int]) -> None:
    """Neurons and tokens once each; k and v at least once; o and down cut as q and gate are."""
    shape, world_size = case
    plan = plan_decoder(shape, world_size)
    for weight in plan.weights:
        if weight.dim is None:
            continue
        assert len(weight.parts) == world_size
        covered = [i for ranges in weight.parts for start, stop in ranges for i in range(start, stop)]
        assert all(extent(ranges) > 0 for ranges in weight.parts)
        if weight.name.split(".")[-2] in ("k_proj", "v_proj"):
            assert set(covered) == set(range(weight.shape[weight.dim]))
        else:
            assert covered == list(range(weight.shape[weight.dim]))
    layer = "model.layers.0."
    assert plan[layer + "self_attn.o_proj.weight"].parts == plan[layer + "self_attn.q_proj.weight"].parts
    assert plan[layer + "mlp.down_proj.weight"].parts == plan[layer + "mlp.gate_proj.weight"].parts
    vocab = [extent(ranges) for ranges in plan["model.embed_tokens.weight"].parts]
    assert max(vocab) <= max(BALANCE * shape.vocab_size / world_size, min(vocab) + 1)


@given(shapes())
@settings(max_examples=200, deadline=None)
def test_balance(case: tuple[DecoderShape, int]) -> None:
    """The fullest rank is within 3% of the mean unless its attention alone, or one neuron, is more."""
    shape, world_size = case
    plan = plan_decoder(shape, world_size)
    attention = [w for w in plan.weights if "self_attn" in w.name and w.name.endswith("proj.weight")]
    fixed = max(sum(w.weight_bytes(rank, 2) for w in attention) for rank in range(world_size))
    neuron = 3 * 2 * shape.hidden_size
    sizes = _layer_bytes(plan)
    mean = sum(sizes) / world_size
    assert max(sizes) <= max(BALANCE * mean, mean + neuron, fixed + neuron)


def test_smollm2_over_two() -> None:
    """9 query and 3 KV heads over 2 ranks: 6+3 and 2+1; the MLP leans the other way, by 32 neurons."""
    heads = split_heads(9, 3, 2)
    assert [(h.q, h.kv) for h in heads] == [((0, 6), (0, 2)), ((6, 9), (2, 3))]
    plan = plan_decoder(_shape(registry.find("smollm2-135m").config), 2)
    assert plan["model.layers.7.mlp.up_proj.weight"].parts == (((0, 672),), ((672, 1536),))
    sizes = _layer_bytes(plan)
    assert max(sizes) < 1.03 * sum(sizes) / 2


def test_fewer_kv_heads_than_ranks() -> None:
    """9 and 3 over 4: the first KV head is copied to two ranks, which share its query heads."""
    heads = split_heads(9, 3, 4)
    assert [(h.q, h.kv) for h in heads] == [
        ((0, 2), (0, 1)),
        ((2, 3), (0, 1)),
        ((3, 6), (1, 2)),
        ((6, 9), (2, 3)),
    ]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_llama_70b_divides_evenly(world_size: int) -> None:
    shape = _shape(registry.find("llama-70b").config)
    plan = plan_decoder(shape, world_size)
    for weight in plan.weights:
        if weight.dim is not None:
            assert {extent(ranges) for ranges in weight.parts} == {weight.shape[weight.dim] // world_size}
    totals = plan.totals(dtype_bytes=2, format_of=lambda name: weight_format("int8"))
    assert totals.fullest_over_mean == 1.0
    assert totals.fullest_share == pytest.approx(1 / world_size, rel=1e-3)
    assert {kind: count for kind, count, _ in totals.collectives} == {
        "all_reduce": 2 * shape.num_layers + 1,
        "all_gather": 1,
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", registry.names())
def test_shipped_models(name: str, world_size: int) -> None:
    """The plan has the model's parameters in the model's order, and is balanced to 3%."""
    config = registry.find(name).config
    plan = plan_decoder(_shape(config), world_size)
    with torch.device("meta"):
        model = Llama(config)
    assert [(w.name, w.shape) for w in plan.weights] == [
        (n, tuple(p.shape)) for n, p in model.named_parameters()
    ]
    sizes = _layer_bytes(plan)
    assert max(sizes) <= BALANCE * sum(sizes) / world_size


@pytest.mark.parametrize(
    "changes, world_size, sentence",
    [
        (
            {},
            12,
            "num_heads=9 cannot be split over 12 ranks: at most one rank a query head; "
            "use --nproc 9 or fewer",
        ),
        (
            {"intermediate_size": 3},
            4,
            "intermediate_size=3 cannot be split over 4 ranks: at most one rank a MLP neuron",
        ),
        ({"vocab_size": 2}, 3, "vocab_size=2 cannot be split over 3 ranks: at most one rank a token"),
        ({}, 0, "a model cannot be split over 0 ranks"),
    ],
)
def test_refusals(changes: dict[str, int], world_size: int, sentence: str) -> None:
    shape = DecoderShape(
        **{**{"vocab_size": 99, "hidden_size": 72, "intermediate_size": 64, "num_layers": 1}, **changes},
        num_heads=9,
        num_kv_heads=3,
        head_dim=8,
    )
    with pytest.raises(ShardingError) as error:
        plan_decoder(shape, world_size)
    assert str(error.value).startswith(sentence)


def test_text_is_compact() -> None:
    """All 80 layers in one block; the totals say what a rank holds and what a token sends."""
    plan = plan_decoder(_shape(registry.find("llama-70b").config), 8)
    text = plan.to_text(format_of=lambda name: weight_format("int8"))
    print(text)
    assert len(text.splitlines()) < 25 and max(map(len, text.splitlines())) < 140
    assert "model.layers.0-79 (each of 80)" in text
    assert "161 all_reduce (1318912 values), 1 all_gather (128256 values)" in text


def test_text_keeps_layers_apart_that_divide_differently() -> None:
    one = plan_decoder(_shape(registry.find("smollm2-135m").config), 2)
    other = plan_decoder(_shape(registry.find("smollm2-135m").config), 1)
    mixed = tuple(
        a if ".layers.7." not in a.name else b for a, b in zip(one.weights, other.weights, strict=True)
    )
    text = Plan(1, mixed).to_text()
    for block in ("model.layers.0-6 (each of 7)", "model.layers.7\n", "model.layers.8-29 (each of 22)"):
        assert block in text


def test_json_is_the_whole_plan() -> None:
    plan = plan_decoder(_shape(registry.find("smollm2-135m").config), 2)
    document = json.loads(plan.to_json())
    assert document["world_size"] == 2
    assert [weight["name"] for weight in document["weights"]] == [weight.name for weight in plan.weights]
    assert document["weights"][0]["parts"] == [[[0, 24576]], [[24576, 49152]]]


def test_bytes_go_by_the_format() -> None:
    """int4 in groups of 128 on 576 columns: the short last group has its own scale."""
    plan = plan_decoder(_shape(registry.find("smollm2-135m").config), 2)
    up = plan["model.layers.0.mlp.up_proj.weight"]
    assert up.weight_bytes(0, 4, weight_format("int4-g128")) == 672 * (576 // 2 + 5 * 2)
    assert up.weight_bytes(0, 4) == 672 * 576 * 4
    assert up.whole_bytes(4) == 1536 * 576 * 4
    assert plan["model.norm.weight"].weight_bytes(1, 4, weight_format("int8")) == 576 * 4
