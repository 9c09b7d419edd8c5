"""Models that keep keys and values in buffers of their own, written at given positions: heads divide, caches too.

fp32; ranks differ from the whole model only in the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from tp_testing.ranks import run_ranks

from tp_runtime.mesh import init_mesh
from tp_runtime.sharding.apply import applied
from tp_runtime.sharding.shard import shard, unshard

TOLERANCE = 2e-5  # of the largest value: sums over ranks in fp32 of a few dozen values
WIDTH, HEADS, KV_HEADS, HEAD_DIM, ROWS, ROOM = 48, 8, 4, 6, 3, 32


def put_at(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache[: len(new), :, at] = new
    return cache[: len(new)]


def copy_index(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache[: len(new)].index_copy_(2, at, new)
    return cache[: len(new)]


def copy_slice(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    first = int(at[0])
    cache[: len(new), :, first : first + new.shape[2]] = new
    return cache[: len(new)]


def row_by_row(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    for row, of_row in enumerate(new):
        for place, position in enumerate(at.tolist()):
            cache[row, :, position] = of_row[:, place]
    return cache[: len(new)]


WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "index_put": put_at,
    "index_copy": copy_index,
    "a slice": copy_slice,
    "row by row": row_by_row,
}


class Attention(nn.Module):
    def __init__(self, write: str) -> None:
        super().__init__()
        self.write, self.heads, self.kv_heads = write, HEADS, KV_HEADS
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        shape = (ROWS, KV_HEADS, ROOM, HEAD_DIM)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        sizes = [n * HEAD_DIM for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (
            part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in self.qkv(x).split(sizes, -1)
        )
        if self.write == "a new buffer":
            self.keys = torch.index_copy(self.keys, 2, at, _over_rows(k))
            self.values = torch.index_copy(self.values, 2, at, _over_rows(v))
            keys, values = self.keys[: len(x)], self.values[: len(x)]
        else:
            keys, values = WRITES[self.write](self.keys, at, k), WRITES[self.write](self.values, at, v)
        keys, values = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (keys, values))
        seen = torch.arange(ROOM) <= at[:, None]
        mixed = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        return x + self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _over_rows(new: Tensor) -> Tensor:
    """All rows that a cache has room for."""
    return torch.cat([new, new.new_zeros(ROWS - len(new), *new.shape[1:])])


class Decoder(nn.Module):
    def __init__(self, write: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(write) for _ in range(2))
        self.head = nn.Linear(WIDTH, 40, bias=False)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, at)
        return self.head(x)  # type: ignore[no-any-return]


def calls(model: nn.Module, rows: int) -> list[Tensor]:
    """A prompt, and tokens one by one."""
    generator = torch.Generator().manual_seed(rows)
    found, first = [], 0
    for length in (9, 1, 1, 2):
        x = torch.randn(rows, length, WIDTH, generator=generator)
        found.append(model(x, torch.arange(first, first + length)))
        first += length
    return found


def body(write: str) -> tuple[float, float, bool]:
    torch.manual_seed(0)
    model = Decoder(write).eval()
    torch.manual_seed(0)
    whole = Decoder(write).eval()
    example = (torch.randn(2, 4, WIDTH), torch.arange(4))
    shard(model, init_mesh(), example_inputs=example, cache=False)
    state = applied(model)
    assert state is not None
    rank = state.comm.rank
    held = [w.local_shape(rank)[1] for w in state.plan.weights if w.name.endswith(("keys", "values"))]
    assert len(set(held)) == 1
    worst = 0.0
    with torch.no_grad():
        for rows in (2, 1, 3):
            for got, wanted in zip(calls(model, rows), calls(whole, rows), strict=True):
                worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    share = sum(p.numel() for p in model.layers.parameters()) / sum(
        p.numel() for p in whole.layers.parameters()
    )
    unshard(model)
    caches = zip(model.buffers(), whole.buffers(), strict=True)
    return worst, max(held[0] / KV_HEADS, share), all(torch.allclose(a, b, atol=1e-5) for a, b in caches)


class Overlapping(nn.Module):
    """A buffer that is a view of another, or has one element at several places; both are read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.register_buffer("rows", torch.zeros(2, 96))
        first = {
            "a view": self.rows[0],
            "all rows": self.rows.view(-1),
            "expanded": torch.zeros(96).expand(2, 96),
        }
        self.register_buffer("first", first[kind])

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        mean = hidden.flatten(0, -2).mean(0)
        if self.kind == "expanded":
            self.first[0] += mean
            hidden = hidden - self.first[1]
        else:
            self.first[:96].copy_(mean)
            hidden = hidden - self.rows[0]
        return x + self.down(hidden)  # type: ignore[no-any-return]


def overlapping_body(kind: str) -> float:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Overlapping(kind).eval()

    model, whole = build(), build()
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    worst = 0.0
    with torch.no_grad():
        shard(model, init_mesh(), example_inputs=x[:2], cache=False)
        for _ in range(2):
            got, wanted = model(x), whole(x)
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    return worst


@pytest.mark.parametrize("kind", ["a view", "all rows", "expanded"])
def test_buffers_that_share_memory_stay_whole(kind: str) -> None:
    assert max(run_ranks(2, overlapping_body, kind)) < TOLERANCE


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("write", [*WRITES, "a new buffer"])
def test_heads_and_caches_divide(write: str, world: int) -> None:
    most = -(-KV_HEADS // world) / KV_HEADS
    for worst, share, restored in run_ranks(world, body, write):
        assert worst < TOLERANCE
        assert share <= most
        assert restored, "unshard gathers what was written"
