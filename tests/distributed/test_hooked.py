"""Hooks of a user's own see what they see on one device, and what they change is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tp_testing.ranks import run_ranks

from tp_runtime import log
from tp_runtime.mesh import init_mesh
from tp_runtime.sharding.shard import shard

TOLERANCE = 2e-5  # of the largest value: sums over ranks in fp32 of a few dozen values
WIDTH, HEADS = 48, 6


class Block(nn.Module):
    """Attention with one projection for q, k and v, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.heads = HEADS
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def shift_a_head(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    x = args[0].clone()
    x[..., : WIDTH // HEADS] += 0.5
    return (x,)


def without_keys(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    out = out.clone()
    out[..., WIDTH + 8 : WIDTH + 16] = 0
    return out


def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def hooked(what: str, seen: list[Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval()
    inner: Any = model[1]
    if what == "input of the output projection":
        inner.out.register_forward_pre_hook(shift_a_head)
    elif what == "fused projection":
        inner.qkv.register_forward_hook(without_keys)
    elif what == "a sum":
        inner.down.register_forward_hook(doubled)
    elif what == "with keywords":
        inner.up.register_forward_hook(lambda m, args, kwargs, out: seen.append(out), with_kwargs=True)
    else:
        inner.register_forward_hook(lambda m, args, out: seen.append(out))
    return model


# What is seen, and whether something would have been cut there.
PLACES = {
    "input of the output projection": True,
    "fused projection": True,
    "a sum": True,  # a hook sees the input, too
    "with keywords": True,
    "a block": False,
}


def body(what: str) -> tuple[float, list[float], bool, float]:
    said: list[str] = []
    logger = log.get_logger()
    logger.warning = lambda text, *args: said.append(text % args)  # type: ignore[method-assign]
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    whole_seen: list[Tensor] = []
    seen: list[Tensor] = []
    model = hooked(what, seen)
    with torch.no_grad():
        wanted = hooked(what, whole_seen)(x)
        shard(model, init_mesh(), example_inputs=x[:2], cache=False)
        assert not seen, "hooks belong to the user's own calls"
        got = model(x)
    held = sum(p.numel() for p in model.parameters())
    total = sum(p.numel() for p in copy.deepcopy(hooked(what, [])).parameters())
    errors = [float((a - b).abs().max()) for a, b in zip(whole_seen, seen, strict=True)]
    return float((got - wanted).abs().max() / wanted.abs().max()), errors, bool(said), held / total


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("what", PLACES)
def test_hooks_see_and_change_whole_values(what: str, world: int) -> None:
    said = []
    for error, errors, warned, share in run_ranks(world, body, what):
        assert error < TOLERANCE and max(errors, default=0.0) < TOLERANCE
        assert share < 1 / world + 0.1
        said.append(warned)
    assert said[0] == PLACES[what], "rank 0 plans, and says where a hook costs something"
