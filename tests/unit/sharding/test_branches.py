"""Forward passes that decide by values, and modules that run in several places: what `plan` says of them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tp_runtime import log
from tp_runtime.sharding.shard import plan
from tp_runtime.sharding.shardplan import plan_from_json, plan_to_json


class Decides(nn.Module):
    """A pair whose forward looks at its input's values, at its own, at a buffer's, or not."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.by = by
        self.register_buffer("flag", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(x))
        seen = {
            "input": x.sum,
            "activation": y.sum,
            "buffer": lambda: self.flag,
            "number": x[0, 0].item,
            "nothing": lambda: None,
        }[self.by]()
        if seen is not None and seen > 1e9:
            y = y.flip(-1)
        return self.down(y)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log.get_logger(), "propagate", True)
    return caplog


@pytest.mark.parametrize("by", ["input", "activation", "number"])
def test_a_branch_on_values_is_named_in_one_sentence(by: str, heard: pytest.LogCaptureFixture) -> None:
    found = plan(Decides(by), 2, example_inputs=torch.randn(3, 16), cache=False)
    (line,) = found.branches
    assert line.startswith("test_branches.py:")
    (sentence,) = warnings_of(heard)
    assert sentence == (
        f"Decides decides by values at {line}; its plan holds for the side that the example took: pass "
        "example_inputs that take yours"
    )
    assert f"decided by values   {line}" in str(found)
    assert plan_from_json(plan_to_json(found)) == found
    pair = {w.name: w.style for w in found.weights}
    # What a branch reads must be whole, so that all ranks take the same side.
    assert (pair["up.weight"], pair["down.weight"]) != ("column", "row") if by == "activation" else True


@pytest.mark.parametrize("by", ["buffer", "nothing"])
def test_what_no_input_decides_is_no_branch(by: str, heard: pytest.LogCaptureFixture) -> None:
    found = plan(Decides(by), 2, example_inputs=torch.randn(3, 16), cache=False)
    assert found.branches == () and warnings_of(heard) == []


class Shared(nn.Module):
    """One pair of linears that runs twice, and again under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.again = self.up

    def forward(self, x: Tensor) -> Tensor:
        for up in (self.up, self.up, self.again):
            x = x + self.down(torch.relu(up(x)))
        return x


def test_a_module_shared_between_places_divides_once() -> None:
    """No error: what is true of it in every place is one consistent cut, and the proof runs all of them."""
    found: Any = plan(Shared(), 2, example_inputs=torch.randn(3, 16), cache=False)
    styles = {w.name: w.style for w in found.weights}
    assert styles["up.weight"] == "column" and styles["down.weight"] == "row"


class Torn(nn.Module):
    """One square linear that is first and second of a pair: no cut suits both places."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(torch.relu(self.both(x)))


def test_a_module_whose_places_want_different_cuts_is_right_all_the_same() -> None:
    found = plan(Torn(), 2, example_inputs=torch.randn(3, 16), cache=False)
    (weight,) = (w for w in found.weights if w.name == "both.weight")
    assert weight.style in ("column", "replicate") and (weight.dim is not None or weight.reason)
    print(found.explain("both.weight"))
