"""Plans found from a trace: what they divide, how they print, what they explain, and what is refused."""

from __future__ import annotations

import itertools
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from tp_testing import architectures
from tp_testing.small_models import MODELS, build

from tp_runtime.errors import ShardingError
from tp_runtime.sharding import planner
from tp_runtime.sharding.plan import extent
from tp_runtime.sharding.shard import explain, plan
from tp_runtime.sharding.shardplan import ShardPlan, plan_from_json, plan_to_json


def planned(name: str, heads: tuple[int, int], world: int, **options: object) -> ShardPlan:
    model, inputs = build(name, heads)
    return plan(model, world, example_inputs=(inputs,), cache=False, **options)  # type: ignore[arg-type]


def fullest_share(made: ShardPlan) -> float:
    matrices = [w for w in made.weights if len(w.shape) > 1]
    held = [sum(prod(w.local_shape(rank)) for w in matrices) for rank in range(made.world_size)]
    return max(held) / sum(prod(w.shape) for w in matrices)


def test_two_collectives_a_layer_as_in_megatron() -> None:
    made = planned("grouped", (8, 4), 2)
    assert sorted(made.sums) == [
        ("layers.0.1.d", ""),
        ("layers.0.3.second", ""),
        ("layers.1.1.d", ""),
        ("layers.1.3.second", ""),
    ]
    assert [g.module for g in made.gathers] == ["head"]
    assert [made[f"layers.0.1.{n}.weight"].style for n in "abcd"] == ["column", "column", "column", "row"]
    assert made["layers.0.1.d.bias"].style == "once"


def test_uneven_heads_go_by_key_value_group() -> None:
    made = planned("grouped", (9, 3), 2)
    q, k = made["layers.0.1.a.weight"], made["layers.0.1.b.weight"]
    assert sorted(extent(q.parts[r]) // 8 for r in range(2)) == [3, 6]
    assert sorted(extent(k.parts[r]) // 8 for r in range(2)) == [1, 2]
    assert {i.name for i in made.integers} == {"heads", "kv_heads"}


def test_fewer_key_value_heads_than_ranks_are_copied() -> None:
    made = planned("grouped", (4, 1), 3)
    q, k = made["layers.0.1.a.weight"], made["layers.0.1.b.weight"]
    assert sorted(extent(q.parts[r]) // 8 for r in range(3)) == [1, 1, 2]
    assert all(k.local_shape(rank) == k.shape for rank in range(3))


def test_shared_rows_of_a_fused_weight_are_copied() -> None:
    both = planned("shared rows", (9, 3), 2)["layers.0.1.both.weight"]
    assert [both.parts[rank][-1][1] for rank in range(2)] == [88, 88]
    assert sorted(extent(both.parts[r]) // 8 for r in range(2)) == [6, 7]


def test_experts_divide_their_neurons_and_the_router_stays_whole() -> None:
    made = planned("experts", (8, 4), 2)
    assert (made["layers.0.3.first"].dim, made["layers.0.3.second"].dim) == (2, 1)
    assert made["layers.0.3.router.weight"].dim is None


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_writing_a_layer_divides(name: str) -> None:
    made = planned(name, (8, 4), 2)
    print(name, fullest_share(made), len(made.sums), len(made.gathers))
    assert fullest_share(made) <= 0.7
    assert len(made.sums) + len(made.gathers) <= 2 * 2 + 4


class Recurrent(nn.Module):
    """Heads whose states start as zeros, in two places, over padded positions."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.out = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            torch.nn.functional.pad(w(x).view(2, 5, self.heads, -1).transpose(1, 2), (0, 0, 0, 3))
            for w in (self.q, self.k, self.v)
        )
        state = torch.zeros(2, self.heads, 4, 4)
        decay = torch.zeros(2, self.heads, 4, 4) + 0.5
        mask = torch.ones(8, 8).tril()
        inner = (q @ k.mT * mask) @ v + q @ state
        state = state * decay + k.mT @ v
        return self.out((inner + q @ state)[:, :, :5].transpose(1, 2).flatten(2))


def test_several_whole_operands_of_one_module_are_cut_together() -> None:
    model = nn.Sequential(Recurrent())
    made = plan(model, 2, example_inputs=(torch.randn(2, 5, 16),), cache=False)
    assert [made[f"0.{name}.weight"].style for name in ("q", "k", "v", "out")] == ["column"] * 3 + ["row"]


class Scaled(nn.Embedding):
    """An embedding with a buffer of its own."""

    def __init__(self) -> None:
        super().__init__(64, 16)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


def test_a_buffer_of_an_embedding_cut_by_tokens_stays_whole() -> None:
    model = nn.Sequential(Scaled(), nn.Linear(16, 64))
    made = plan(model, 2, example_inputs=(torch.randint(64, (2, 5)),), cache=False)
    assert made["0.weight"].style == "vocab"
    assert made["0.scale"].dim is None


def test_layers_of_one_role_are_decided_once() -> None:
    # What one layer of ZAYA leaves whole is so in its like, of which then no second weight need be.
    pytest.importorskip("transformers")
    made = plan(architectures.build("zaya")[0], 2, cache=False)
    print(fullest_share(made))
    assert fullest_share(made) <= 0.75


def test_a_plan_survives_its_json() -> None:
    made = planned("grouped", (9, 3), 2)
    assert plan_from_json(plan_to_json(made)) == made


def test_a_search_cut_short_says_so_and_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TP_CACHE_DIR", str(tmp_path))
    model, inputs = build("grouped", (8, 4))

    def find(budget_s: float) -> ShardPlan:
        monkeypatch.setattr(planner, "BUDGET_S", budget_s)
        return plan(model, 2, example_inputs=(inputs,))

    short = find(0.0)
    assert short.cut_short and not short.gathers and not list(tmp_path.rglob("*.json"))
    assert plan_from_json(plan_to_json(short)) == short
    found = find(600.0)
    assert not found.cut_short and found.gathers
    assert find(0.0) == found  # from the cache


def test_a_busy_host_does_not_shorten_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0, 1000)
    monkeypatch.setattr(planner, "_now", lambda: (float(next(ticks)), 0.0))
    assert not planned("grouped", (8, 4), 2).cut_short


def test_a_plan_prints_and_explains() -> None:
    made = planned("experts", (8, 4), 2)
    text = str(made)
    assert "layers.0-1 (each of 2)" in text or "layers.0" in text
    assert "weights cut" in text and "traffic a token" in text
    assert "row-parallel along dim 1" in explain(made, "layers.0.1.d.weight")
    assert "whole on every rank: " in explain(made, "layers.0.3.router")
    with pytest.raises(ShardingError, match="no weight is called 'nothing'"):
        explain(made, "nothing")


def test_a_declared_plan_limits_the_search() -> None:
    styles = {"3.first.weight": "column", "3.second.weight": "row"}
    made = planned("grouped", (8, 4), 2, plan=styles)
    cut = {w.name for w in made.weights if w.dim is not None and len(w.shape) > 1}
    assert cut == {f"layers.{i}.3.{n}.weight" for i in range(2) for n in ("first", "second")}


def test_a_declared_plan_that_is_wrong_is_refused() -> None:
    with pytest.raises(ShardingError, match="the declared plan makes layers.0.1"):
        planned("grouped", (8, 4), 2, plan={"1.d.weight": "column", "1.a.weight": "row"})


class Unguessable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, a: Tensor, b: dict[str, Tensor]) -> Tensor:
        return self.linear(a + b["offset"])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h if h.sum() > 0 else -h)


ERRORS = {
    "inputs that cannot be guessed": (lambda: plan(Unguessable(), 2, cache=False), "pass example_inputs"),
    "no rank": (lambda: plan(build("grouped")[0], 0, cache=False), "over 0 ranks"),
    "too many ranks": (
        lambda: plan(
            nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8)),
            4,
            example_inputs=(torch.ones(2, 8),),
            cache=False,
        ),
        "use 3 ranks or fewer",
    ),
    "an unknown style": (
        lambda: plan(build("grouped")[0], 2, plan={"head.weight": "diagonal"}, cache=False),
        "'diagonal'",
    ),
    "a name of nothing": (
        lambda: plan(build("grouped")[0], 2, plan={"tail.weight": "row"}, cache=False),
        "'tail.weight'",
    ),
    "no declared plan": (
        lambda: plan(build("grouped")[0], 2, plan="declared", cache=False),
        "declares no plan",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_sentence(name: str) -> None:
    call, words = ERRORS[name]
    with pytest.raises(ShardingError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_control_flow_by_data_that_is_cut_keeps_that_whole() -> None:
    made = plan(Branching(), 2, example_inputs=(torch.ones(2, 8),), cache=False)
    assert made["first.weight"].style in ("replicate", "column")
    assert (
        "depends on" in explain(made, "first.weight")
        or made.gathers
        or "no rule" in explain(made, "first.weight")
    )
