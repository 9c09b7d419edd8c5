"""Models whose answers or modules an example shows only in part: results are the whole model's all the same.

Answers that lie deep in tuples, dataclasses or objects; experts that no example token reaches. fp32; ranks
differ from the whole model only in the order of sums.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tp_testing.ranks import run_ranks
from tp_testing.small_models import build

from tp_runtime.errors import ShardingError
from tp_runtime.mesh import init_mesh
from tp_runtime.sharding.shard import shard

TOLERANCE = 2e-5  # of the largest value: sums over ranks in fp32 of a few dozen values
WIDTH = 32


class Pair(nn.Module):
    """An MLP."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


@dataclass
class Found:
    logits: Tensor
    more: list[dict[str, Tensor]]


class Own:
    """An answer of a class of its own."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


ANSWERS: dict[str, Any] = {
    "a tuple in a tuple": (lambda x, y, z: (x, (y, (z,))), lambda out: [out[1][0], out[1][1][0]]),
    "a dataclass": (lambda x, y, z: Found(y, [{"z": z}]), lambda out: [out.logits, out.more[0]["z"]]),
    "a class of its own": (lambda x, y, z: Own(y), lambda out: [out.logits]),
    "a list in a dict": (lambda x, y, z: {"all": [y, z]}, lambda out: out["all"]),
    "maps of features": (
        lambda x, y, z: (x, [y.view(2, 2, 2, -1), z.view(2, 2, 2, -1), y]),
        lambda out: out[1],
    ),
}


class Answering(nn.Module):
    """y: a whole result, z: one that would be cut by columns, x: the input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.mlp, self.head = Pair(), nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor) -> Any:
        y = self.mlp(x)
        return ANSWERS[self.name][0](x, y, self.head(y))


class Mixture(nn.Module):
    """One expert a token, by its id; all of them only over many tokens. kind: of the container."""

    def __init__(self, kind: str, count: int = 12) -> None:
        super().__init__()
        every = [Pair(48 + 2 * i if kind == "unlike" else 48) for i in range(count)]
        named = {f"expert_{i}": each for i, each in enumerate(every)}
        self.experts = nn.ModuleDict(named) if kind == "dict" else nn.ModuleList(every)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        few = 3 if ids.numel() <= 64 else len(self.experts)  # what guessed inputs reach
        y = torch.zeros_like(x)
        every = list(self.experts.children())
        for number in range(few):
            rows = (ids % few == number).nonzero()[:, 0]
            y.index_add_(0, rows, every[number](x[rows]) * 0.5)
        return y


class Mixed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.mixture, self.norm = nn.Embedding(256, WIDTH), Mixture(kind), nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        ids = input_ids.reshape(-1)
        x = self.embed(ids)
        y: Tensor = self.norm(x + self.mixture(x, ids))
        return y.view(*input_ids.shape, -1)


class LowRank(nn.Module):
    """A linear and a low-rank pair beside it (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.first = nn.Linear(base.in_features, rank, bias=False)
        self.second = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 2.0 * self.second(self.first(x))
        return y


def _gap(got: list[Tensor], wanted: list[Tensor]) -> float:
    assert [t.shape for t in got] == [t.shape for t in wanted]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))


def _answers(name: str) -> tuple[float, int]:
    torch.manual_seed(0)
    model, x = Answering(name).eval(), torch.randn(4, WIDTH)
    read = ANSWERS[name][1]
    with torch.no_grad():
        wanted = read(model(x))
        shard(model, init_mesh(), example_inputs=(x,), cache=False)
        return _gap(read(model(x)), wanted), int(model.mlp.up.weight.shape[0])


def _experts(kind: str) -> tuple[float, list[int]]:
    torch.manual_seed(0)
    model, ids = Mixed(kind).eval(), torch.arange(96).view(1, 96)
    with torch.no_grad():
        wanted = [model(ids)]
        shard(model, init_mesh(), cache=False)
        return _gap([model(ids)], wanted), [
            int(each.up.weight.shape[0]) for each in model.mixture.experts.children()
        ]


def _attention_maps(layers: int, asked: bool) -> tuple[float, list[tuple[int, ...]], int, list[str]]:
    """(largest gap of the answers, shapes of the maps, rows of an MLP's weight, what was warned of)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tp_runtime.log import get_logger

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=96, intermediate_size=144, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=6, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids, said = torch.arange(26).view(2, 13), Said()
    get_logger().addHandler(said)
    with torch.no_grad():
        whole = model(input_ids=ids, output_attentions=True)
        example = {"input_ids": torch.arange(20).view(2, 10), "output_attentions": True}
        shard(model, init_mesh(), example_inputs=example if asked else None, cache=False)
        model(input_ids=ids)
        before = len(said.lines)
        found = [model(input_ids=ids, output_attentions=True) for _ in range(2)][1]
    get_logger().removeHandler(said)
    answers = [(each.logits, *each.attentions) if asked else (each.logits,) for each in (found, whole)]
    shapes = [tuple(each.shape) for each in found.attentions]
    return (
        _gap(*map(list, answers)),
        shapes,
        model.model.layers[0].mlp.up_proj.weight.shape[0],
        said.lines[before:],
    )


class Said(logging.Handler):
    """The lines that were logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Asked(nn.Module):
    """An MLP whose hidden values are returned on request, which are a rank's own neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = Pair(), nn.LayerNorm(WIDTH)
        self.config = {"output_attentions": True}  # of no configuration's class

    def forward(self, x: Tensor, return_hidden: bool = False, output_size: int = 0, extra: Any = None) -> Any:
        y = self.norm(x + self.mlp(x))
        return (y, torch.relu(self.mlp.up(x))) if return_hidden else y


def _requests(example: Any, call: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], int]:
    """(what was warned of, hidden values of a call that asks for them)."""
    from tp_runtime.log import get_logger

    torch.manual_seed(0)
    model, said = Asked().eval(), Said()
    get_logger().addHandler(said)
    with torch.no_grad():
        shard(model, init_mesh(), example_inputs=example, cache=False)
        found = model(*call, **kwargs)
    get_logger().removeHandler(said)
    lines = [line for line in said.lines if "is asked for" in line]
    return lines, int(found[1].shape[-1]) if isinstance(found, tuple) else 0


def _another_answer() -> str:
    """What a call says that returns a tuple, where partial sums of the tensor it returned were added."""
    model, x = Answering("a tuple in a tuple").mlp.eval(), torch.randn(4, WIDTH)
    with torch.no_grad():
        shard(model, init_mesh(), example_inputs=(x,), cache=False)
        own = model.down.forward
        model.down.forward = lambda y: (own(y),)
        with pytest.raises(ShardingError) as caught:
            model(x)
    return str(caught.value)


LINEARS = {"a": 48, "b": 24, "c": 24, "d": 48, "first": 168, "second": 84}  # size of the dim that is divided


def _low_rank(names: list[str]) -> tuple[float, dict[str, int]]:
    """(gap, that size here) of a decoder with low-rank pairs beside the linears called `names`."""
    model, ids = build("grouped", (6, 3))
    for layer in model.layers:
        for name in names:
            holder = layer[1] if len(name) == 1 else layer[3]
            setattr(holder, name, LowRank(getattr(holder, name)))
    with torch.no_grad():
        wanted = [model(ids)]
        shard(model, init_mesh(), example_inputs=(ids,), cache=False)
        gap = _gap([model(ids)], wanted)
    sizes = {}
    for name in LINEARS:
        linear = getattr(model.layers[0][1 if len(name) == 1 else 3], name)
        weight = (linear.base if isinstance(linear, LowRank) else linear).weight
        sizes[name] = int(weight.shape[1 if name in ("d", "second") else 0])
    return gap, sizes


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "names", [["a", "c"], ["a", "b", "c"], ["d"], ["second"], ["a", "b", "c", "d"], list(LINEARS)], ids=str
)
def test_low_rank_pairs_leave_all_linears_divided(names: list[str], world: int) -> None:
    outcomes = run_ranks(world, _low_rank, names)
    for gap, sizes in outcomes:
        print(f"{names}, world {world}: {gap:.1e}, {sizes}")
        assert gap <= TOLERANCE
    for name, whole in LINEARS.items():
        assert sum(sizes[name] for _, sizes in outcomes) == whole, name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_deep_answers_are_whole(world: int) -> None:
    for name in ANSWERS:
        for gap, neurons in run_ranks(world, _answers, name):
            print(f"{name}, world {world}: {gap:.1e}")
            assert gap <= TOLERANCE, name
            assert neurons == 48 // world, f"the MLP before {name} is not divided"


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["list", "dict", "unlike"])
def test_experts_that_no_example_reaches_count_once(kind: str, world: int) -> None:
    for gap, neurons in run_ranks(world, _experts, kind):
        print(f"{kind}, world {world}: {gap:.1e}, neurons {neurons}")
        assert gap <= TOLERANCE
        assert kind == "unlike" or neurons == [48 // world] * 12, "alike experts divide alike"


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("layers", [2, 3])
def test_attention_maps_that_the_example_asks_for_are_whole(layers: int, world: int) -> None:
    for gap, shapes, neurons, said in run_ranks(world, _attention_maps, layers, True):
        assert gap < TOLERANCE and shapes == [(2, 6, 13, 13)] * layers and not said
        assert neurons == 144 // world, "the MLP beside is whole"


def test_attention_maps_that_it_does_not_ask_for_are_warned_of() -> None:
    found = run_ranks(2, _attention_maps, 2, False)
    assert all(gap < TOLERANCE for gap, *_ in found)
    assert [len(said) for *_, said in found] == [1, 0], "said once, by one rank"
    assert "output_attentions" in found[0][3][0]


X = torch.ones(4, WIDTH)


@pytest.mark.parametrize(
    ("example", "call", "kwargs", "warned"),
    [
        ((X,), (X,), {"return_hidden": True}, True),
        ((X,), (X, True), {}, True),
        ((X,), (X,), {"output_size": 3, "extra": X.numpy()}, False),
        ((X, True), (X,), {"return_hidden": True}, False),
        ({"x": X, "return_hidden": True}, (X, True), {}, False),
    ],
)
def test_requests_beyond_the_example_are_warned_of(
    example: Any, call: tuple[Any, ...], kwargs: dict[str, Any], warned: bool
) -> None:
    found = run_ranks(2, _requests, example, call, kwargs)
    assert [len(lines) for lines, _ in found] == [int(warned), 0]
    if not warned:
        assert all(size in (0, 48) for _, size in found), "what the example asked for is whole"


def test_an_answer_of_another_kind_is_refused() -> None:
    assert all("returns a tuple" in text for text in run_ranks(2, _another_answer))
