"""Settings that are no numbers: what tells two models, or two layers of one, apart."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tp_runtime.errors import ShardingError
from tp_runtime.sharding.apply import apply_plan
from tp_runtime.sharding.describe import LIMIT, same
from tp_runtime.sharding.norms import recognise
from tp_runtime.sharding.plan_cache import structure_key
from tp_runtime.sharding.shard import plan
from tp_runtime.sharding.surrogate import alike
from tp_runtime.sharding.verify import ThreadCommunicator, _Meeting


@dataclass
class Config:
    heads: int


def scaled(x: Tensor, by: float) -> Tensor:
    return x * by


def closing_over(heads: int) -> Callable[[], int]:
    return lambda: heads


class Slotted:
    __slots__ = ("heads",)

    def __init__(self, heads: int) -> None:
        self.heads = heads


def compiled(heads: int) -> Any:
    """A class of no file, as a notebook's."""
    scope: dict[str, Any] = {"__name__": "notebook"}
    exec(f"class Heads:\n    def count(self): return {heads}\n", scope)
    return scope["Heads"]()


class Listed(list[int]):
    pass


def more(heads: int) -> Listed:
    found = Listed([1])
    found.heads = heads  # type: ignore[attr-defined]
    return found


def class_of(heads: int) -> Any:
    class Heads:
        def count(self) -> int:
            return heads

    return Heads()


class Awkward:
    """Everything that may be asked of it raises."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)

    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__

    @property
    def __class__(self) -> type:
        return dict


def complains(x: Tensor) -> Tensor:
    raise ValueError("nothing at 0x12")


NOTHING: dict[str, Callable[[], Any]] = {
    "a logger": lambda: logging.getLogger(str(id(object()))),
    "a lock": threading.Lock,
    "a weak reference": lambda: weakref.ref(Listed()),
    "what raises": Awkward,
    "a key that raises": lambda: {Awkward(): 1},
    "text like an address": lambda: complains,
}


@pytest.mark.parametrize("kind", NOTHING)
def test_what_is_no_setting_does_not_count(kind: str) -> None:
    one, other = holder(NOTHING[kind]()), holder(NOTHING[kind]())
    assert structure_key(one) and structure_key(one) == structure_key(other)
    assert alike(one, 0, other, 1)


def test_what_cannot_be_told_is_not_kept() -> None:
    assert structure_key(holder(iter([1]))) == ""
    assert not alike(holder(iter([1])), 0, holder(iter([1])), 1)


SETTINGS: dict[str, Callable[[int], Any]] = {
    "a number": lambda heads: heads,
    "a dataclass": Config,
    "a dict": lambda heads: {"attention": [{"heads": heads}]},
    "a partial function": lambda heads: partial(scaled, by=1 / heads),
    "a closure": closing_over,
    "a method": lambda heads: Config(heads).__eq__,
    "slots": Slotted,
    "a type": lambda heads: (torch.float32, torch.bfloat16)[heads % 2],
    "one of two functions": lambda heads: (torch.sin, torch.cos, scaled, closing_over)[heads % 4],
    "a set": lambda heads: {heads, 100},
    "an array": lambda heads: torch.full((3,), heads).numpy(),
    "code of no file": compiled,
    "a number of numpy": np.float32,
    "a number of Decimal": Decimal,
    "a small tensor": lambda heads: torch.tensor(1 / heads),
    "a number of C": ctypes.c_int,
    "a queue": lambda heads: deque([heads]),
    "a list with more": lambda heads: more(heads),
    "a key of another type": lambda heads: {heads if heads == 4 else str(4): 1},
    "a class that closes over it": lambda heads: class_of(heads),
    "a class attribute": lambda heads: type("Heads", (Config,), {"more": heads})(1),
    "a buffer": lambda heads: nn.BatchNorm1d(2) if heads == 4 else nn.BatchNorm1d(2).half(),
}


def holder(setting: Any) -> nn.Module:
    module = nn.Linear(4, 4)
    module.setting = setting
    return module


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_setting_tells_models_and_layers_apart(kind: str) -> None:
    one, equal, other = (holder(SETTINGS[kind](heads)) for heads in (4, 4, 7))
    assert structure_key(one) and structure_key(one) == structure_key(equal) != structure_key(other)
    assert alike(one, 0, equal, 1) and not alike(one, 0, other, 1)


def test_layers_may_hold_their_own_places_anywhere() -> None:
    assert same({"at": [3, Config(3)]}, {"at": [5, Config(5)]}, 3, 5)
    assert same(["layer 3"], ["layer 5"], 3, 5) and not same(["layer 3"], ["layer 4"], 3, 5)
    assert not same({"at": [3, Config(3)]}, {"at": [5, Config(4)]}, 3, 5)


def test_examples_count_by_their_form() -> None:
    keys = [
        structure_key(nn.Linear(4, 4), 2, {"x": [torch.randn(2, rows), flag]})
        for rows, flag in ((4, True), (4, True), (5, True), (4, False))
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_objects_that_hold_each_other_end() -> None:
    one, other = holder(Config(1)), holder(Config(1))
    for module in (one, other):
        module.setting.owner = [module]  # type: ignore[union-attr]
    assert structure_key(one) == structure_key(other) and same(vars(one), vars(other))


def test_what_is_too_much_is_not_kept() -> None:
    assert structure_key(holder([[i] for i in range(LIMIT + 1)])) == ""


def test_a_key_is_the_same_in_every_process() -> None:
    code = (
        "import torch; from torch import nn; from functools import partial\n"
        "from tp_runtime.sharding.plan_cache import structure_key\n"
        "m = nn.Linear(2, 2); m.act = partial(torch.add, alpha=2); m.names = {'a', 'b', 'c'}\n"
        "m.f = lambda x: x in {'aa', 'bb', 'cc'}; m.g = {torch.add: {torch.mul, torch.sin}}\n"
        "print(structure_key(m))"
    )
    keys = {
        subprocess.check_output(
            [sys.executable, "-c", code], text=True, timeout=120, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in "12"
    }
    assert len(keys) == 1 and keys != {"\n"}


class Attention(nn.Module):
    """nanoGPT's form: sizes come from an object that is no module."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.config.heads
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_a_plan_of_other_heads_is_refused() -> None:
    made = plan(nn.Sequential(Attention(Config(4))), 2, example_inputs=torch.randn(2, 3, 32), cache=False)
    assert [integer.whole for integer in made.integers] == [4]
    with pytest.raises(ShardingError, match="heads of 0>config is 8 and the plan is for 4"):
        apply_plan(nn.Sequential(Attention(Config(8))), made, ThreadCommunicator(_Meeting(2), 0))


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 1e-6, 1e-8])
def test_a_norm_is_known_with_its_own_epsilon(epsilon: float) -> None:
    for norm in (nn.LayerNorm(48, eps=epsilon), nn.RMSNorm(48, eps=epsilon)):
        found = recognise(norm, "norm", 48)
        assert found is not None and found.epsilon == epsilon
