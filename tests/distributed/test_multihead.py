"""torch's own attention: computed by the size of a head, and divided, with the results of its own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tp_testing.ranks import run_ranks

from tp_runtime.checkpoint.quantize_model import quantize
from tp_runtime.mesh import init_mesh
from tp_runtime.sharding.multihead import replace_forward, replaceable, restore_forward
from tp_runtime.sharding.shard import shard, unshard

TOLERANCE = 2e-5  # of the largest value: sums in another order, fp32, of a few dozen values
WIDTH, HEADS, BATCH, TOKENS, KEYS = 48, 6, 3, 7, 9

MODULES: dict[str, dict[str, Any]] = {
    "plain": {"batch_first": True},
    "batch second": {},
    "no bias": {"batch_first": True, "bias": False},
    "other widths": {"batch_first": True, "kdim": 20, "vdim": 28},
}
BAN = torch.full((TOKENS, KEYS), float("-inf")).triu(4)
CALLS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "a mask of floats": {"attn_mask": BAN},
    "a mask of bools": {"attn_mask": BAN < 0, "need_weights": False},
    "padding": {"key_padding_mask": torch.arange(KEYS)[None] >= torch.tensor([[9], [5], [2]])},
    "both": {
        "attn_mask": BAN, "need_weights": False,
        "key_padding_mask": torch.zeros(BATCH, KEYS).masked_fill(torch.arange(KEYS) > 6, float("-inf")),
    },
    "a mask of each head": {"attn_mask": torch.randn(BATCH * HEADS, TOKENS, KEYS)},
}  # fmt: skip


def inputs(module: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    shapes = ((BATCH, TOKENS, WIDTH), (BATCH, KEYS, module.kdim), (BATCH, KEYS, module.vdim))
    made = (torch.randn(shape) for shape in shapes)
    return tuple(each if module.batch_first else each.transpose(0, 1) for each in made)


def gap(found: Any, wanted: Any) -> float:
    """The largest difference of two answers, over the largest value."""
    if wanted is None or found is None:
        assert found is None and wanted is None
        return 0.0
    if isinstance(wanted, tuple):
        return max(gap(a, b) for a, b in zip(found, wanted, strict=True))
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", MODULES)
def test_as_its_own_forward(kind: str, call: str) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **MODULES[kind]).eval()
    given, asked = inputs(module), CALLS[call]
    with torch.no_grad():
        wanted = module(*given, **asked)
        replace_forward(module)
        assert gap(module(*given, **asked), wanted) < TOLERANCE
        restore_forward(module)
        assert gap(module(*given, **asked), wanted) == 0


def test_without_a_batch_and_of_itself() -> None:
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(WIDTH, HEADS).eval(), torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        wanted = module(x, x, x), module(x, x, x, average_attn_weights=False)
        replace_forward(module)
        assert gap((module(x, x, x), module(x, x, x, average_attn_weights=False)), wanted) < TOLERANCE
    with pytest.raises(RuntimeError, match="is_causal"):
        module(x, x, x, is_causal=True)


def test_what_is_left_to_its_own_forward() -> None:
    class Other(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    left = [Other(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)]
    left.append(nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True))
    assert not list(replaceable(nn.ModuleList(left)))


class Cross(nn.Module):
    """One attention that is called as `call` says, and whose weights are part of the answer."""

    def __init__(self, kind: str, call: str) -> None:
        super().__init__()
        self.call, self.attention = call, nn.MultiheadAttention(WIDTH, HEADS, **MODULES[kind])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.attention(query, key, value, **CALLS[self.call])


class Encoder(nn.Module):
    """Layers as torch has them, with padding, which it may turn into nested tensors; means over all tokens."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True, norm_first=norm_first)
        norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(norm.bias)
        self.layers = nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=not norm_first)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y: Tensor = self.layers(x, src_key_padding_mask=padding)
        return torch.cat([y, y.mean(dim=1, keepdim=True)], dim=1)


class Shared(nn.Module):
    """Two attentions of one projection, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))
        self.b.in_proj_weight = self.a.in_proj_weight
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x, x, x, need_weights=False)[0]
        y, weights = self.b(x, x, x)
        x = weights @ (x + y)
        return x + self.down(torch.relu(self.up(x)))


class Counting(nn.Module):
    """Heads of its own beside an attention, by the attention's integers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.v, self.o, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, asked: bool = False) -> Any:
        y, weights = self.attention(x, x, x, need_weights=asked)
        v = self.v(x).view(*x.shape[:2], self.attention.num_heads, -1)
        y = self.norm(y + self.o(torch.tanh(v / v.norm(dim=-1, keepdim=True)).flatten(2)))
        return (y, weights) if asked else y


def _sharded(model: nn.Module, given: tuple[Tensor, ...], weight: str) -> tuple[float, float, int]:
    """(gap sharded, gap made whole again, rows of a weight here)."""
    with torch.no_grad():
        wanted = model.eval()(*given)
        shard(model, init_mesh(), example_inputs=given, cache=False)
        rows = int(model.get_parameter(weight).shape[0])
        found = gap(model(*given), wanted)
        return found, gap(unshard(model)(*given), wanted), rows


def _cross(kind: str, call: str) -> tuple[float, float, int]:
    torch.manual_seed(0)
    model = Cross(kind, call)
    name = "q_proj_weight" if kind == "other widths" else "in_proj_weight"
    return _sharded(model, inputs(model.attention), f"attention.{name}")


def _encoder(norm_first: bool) -> tuple[float, float, int]:
    torch.manual_seed(0)
    padding = torch.arange(TOKENS)[None] >= torch.tensor([[7], [5], [3]])
    given = (torch.randn(BATCH, TOKENS, WIDTH), padding)
    return _sharded(Encoder(norm_first), given, "layers.layers.1.self_attn.in_proj_weight")


def _translator(_: bool) -> tuple[float, float, int]:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 96, batch_first=True)
    given = (torch.randn(BATCH, KEYS, WIDTH), torch.randn(BATCH, TOKENS, WIDTH))
    return _sharded(model, given, "decoder.layers.1.multihead_attn.in_proj_weight")


def _shared(_: bool) -> tuple[float, float, int]:
    torch.manual_seed(0)
    return _sharded(Shared(), (torch.randn(BATCH, TOKENS, WIDTH),), "a.in_proj_weight")


def _counting() -> tuple[float, int]:
    torch.manual_seed(0)
    model, x = Counting().eval(), torch.randn(BATCH, TOKENS, WIDTH)
    with torch.no_grad():
        wanted = model(x, True)
        shard(model, init_mesh(), example_inputs=(x,), cache=False)
        return gap(model(x, True), wanted), int(model.attention.in_proj_weight.shape[0])


def _unaligned() -> float:
    """The padding on the left, which torch does not turn into nested tensors."""
    torch.manual_seed(0)
    model, x = Encoder(False).eval(), torch.randn(2, TOKENS, WIDTH)
    right = torch.arange(TOKENS)[None] >= torch.tensor([[7], [4]])
    with torch.no_grad():
        wanted = model(x, right.flip(1))
        shard(model, init_mesh(), example_inputs=(x, right), cache=False)
        return gap(model(x, right.flip(1)), wanted)


def heads_of(world: int) -> list[int]:
    return [HEADS // world + (rank < HEADS % world) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "call", ["nothing", "no weights", "weights of each head", "both", "a mask of each head"]
)
@pytest.mark.parametrize("kind", ["plain", "other widths"])
def test_divided_by_heads(kind: str, call: str, world: int) -> None:
    found = run_ranks(world, _cross, kind, call)
    assert all(sharded < TOLERANCE and again < TOLERANCE for sharded, again, _ in found)
    each = 3 if kind == "plain" else 1
    assert sorted(rows for *_, rows in found) == sorted(each * WIDTH // HEADS * n for n in heads_of(world))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("body", [_encoder, _translator, _shared])
@pytest.mark.parametrize("flag", [False, True])
def test_torch_layers_are_divided(body: Any, flag: bool, world: int) -> None:
    found = run_ranks(world, body, flag)
    assert all(sharded < TOLERANCE and again < TOLERANCE for sharded, again, _ in found)
    assert sorted(rows for *_, rows in found) == sorted(3 * WIDTH // HEADS * n for n in heads_of(world))


def _quantised(order: str) -> tuple[Tensor, Tensor]:
    """(the answer of a quantised encoder, that of the encoder)."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    given = (x, torch.zeros(BATCH, TOKENS, dtype=torch.bool))
    with torch.no_grad():
        model = Encoder(False).eval()
        wanted = model(*given)
        for step in order.split():
            if step == "shard":
                shard(model, init_mesh(), example_inputs=given, cache=False)
            else:
                quantize(model, "int8")
        return model(*given), wanted


@pytest.mark.parametrize("world", [1, 2, 3])
def test_torch_layers_are_quantised(world: int) -> None:
    alone = run_ranks(1, _quantised, "quantize")[0]
    for order in ("shard quantize", "quantize shard"):
        for found, wanted in run_ranks(world, _quantised, order):
            assert gap(found, alone[0]) < 1e-2, "other values than of the whole model"  # in bf16 between
            assert gap(found, wanted) < 5e-2  # eight bits a weight


def test_quantised_in_part() -> None:
    """torch's fast path reads weights of both linears; an encoder that is left alone stays as it is."""
    torch.manual_seed(0)
    model, x = Encoder(False).eval(), torch.randn(2, TOKENS, WIDTH)
    given = x, torch.arange(TOKENS)[None] >= torch.tensor([[7], [4]])
    names = [f"layers.layers.{i}.linear{j}" for i in range(3) for j in (1, 2)]
    with torch.no_grad():
        wanted = model(*given)
        assert model.layers.use_nested_tensor
        quantize(model, "int8", skip=names)
        assert model.layers.use_nested_tensor and gap(model(*given), wanted) == 0
        quantize(model, "int8", skip=names[::2])
        assert gap(model(*given), wanted) < 5e-2


def test_masks_that_torch_refuses_are_refused() -> None:
    module, x = nn.MultiheadAttention(WIDTH, HEADS).eval(), torch.randn(TOKENS, 1, WIDTH)
    replace_forward(module)
    with pytest.raises(RuntimeError, match="bool and floating"):
        module(x, x, x, attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.uint8))


@pytest.mark.parametrize("world", [2, 3])
def test_integers_and_masks_that_the_example_had_not(world: int) -> None:
    for found, rows in run_ranks(world, _counting):
        assert found < TOLERANCE and rows == 3 * WIDTH // world
    assert all(found < TOLERANCE for found in run_ranks(world, _unaligned))
