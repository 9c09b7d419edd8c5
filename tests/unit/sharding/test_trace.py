"""Labels through single operations, partial sums and integers, each on a module of a few lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tp_runtime.sharding.families import Graph, find_families
from tp_runtime.sharding.trace.integers import Attribute, TracedInt, evaluate
from tp_runtime.sharding.trace.mode import Decisions, Trace


class Pair(nn.Module):
    """first -> a function -> second."""

    def __init__(self, between: object, outer: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(outer, inner)
        self.second = nn.Linear(inner, outer)
        self.between = between
        self.width = inner // 3

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))  # type: ignore[operator]


def trace(model: nn.Module, *args: Tensor) -> Trace:
    made = Trace(model, Decisions())
    made.run([("", args, {})])
    return made


def units(made: Trace) -> list[int]:
    """Sizes (in units) of the families that divide."""
    families = find_families(Graph(made.labels), made.order)
    return sorted(len(f.units) for f in families if not f.failed)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))

BETWEEN = {
    "element-wise": (lambda m, h: torch.nn.functional.gelu(h) * 2, [12]),
    "a view and back": (
        lambda m, h: h.view(2, 5, 3, 4).transpose(1, 2).transpose(1, 2).reshape(2, 5, 12),
        [12],
    ),
    "softmax of groups": (lambda m, h: h.view(2, 5, 3, 4).softmax(-1).flatten(2), [3]),
    "softmax of strided groups": (lambda m, h: h.view(2, 5, 4, 3).softmax(-2).flatten(2), [3]),
    "halves joined": (lambda m, h: torch.cat([h[..., :6] * h[..., 6:], h[..., 6:]], -1), [6]),
    "a gated linear unit": (lambda m, h: torch.nn.functional.glu(h).repeat(1, 1, 2), [6]),
    "every second joined": (lambda m, h: torch.cat([h[..., ::2] + h[..., 1::2]] * 2, -1), [6]),
    "a cumulative sum over positions": (lambda m, h: h.cumsum(1), [12]),
    "written through a view": (lambda m, h: _doubled(h), [12]),
    "a norm over all": (lambda m, h: torch.nn.functional.layer_norm(h, (12,)), []),
    "a product of two": (
        lambda m, h: (
            (h.view(2, 5, 3, 4) @ h.view(2, 5, 3, 4).mT).flatten(2)[..., :9].repeat(1, 1, 2)[..., :12]
        ),
        [1],
    ),
}


def _doubled(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :2] = h[:, :2] * 2
    out[:, 2:] += h[:, 2:]
    return out


@pytest.mark.parametrize("name", BETWEEN)
def test_units_are_what_operations_leave_independent(name: str) -> None:
    between, expected = BETWEEN[name]
    assert units(trace(Pair(between), X)) == expected


def test_a_product_by_rows_is_summed_where_the_module_returns_it() -> None:
    made = trace(Pair(lambda m, h: h), X)
    points, biases, stuck = made.partials.resolve()
    assert points == {("second", "")}
    assert [made.source_name(int(i)) for ids in biases.values() for i in ids] == ["second.bias"]
    assert stuck == []


def test_a_sum_needed_inside_a_function_is_reported() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.tanh(x @ self.first) @ self.second)

    _, _, stuck = trace(Inside(), X).partials.resolve()
    assert [partial.needed_by for partial in stuck] == ["tanh"]


def test_two_partial_sums_that_are_added_are_summed_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Pair(lambda m, h: h), Pair(lambda m, h: h)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = Both()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.both(x))

    assert trace(Model(), X).partials.resolve()[0] == {("both", "")}


def test_an_operation_without_a_rule_leaves_its_operands_whole() -> None:
    made = trace(Pair(lambda m, h: torch.fft.fft(h).real), X)
    families = find_families(Graph(made.labels), made.order)
    assert any("no rule" in f.failed for f in families)


def test_integers_remember_where_they_come_from() -> None:
    heads = TracedInt(6, Attribute("attention", "heads"))
    size = 48 // heads * (heads + 0) - 1
    assert size == 47
    wanted = {Attribute("attention", "heads"): 6}
    local = evaluate(size.expression, {Attribute("attention", "heads"): 3}, wanted, lambda labels, dim: 0)
    assert local == 48 // 3 * 3 - 1


def test_integers_that_set_dimensions_give_equations() -> None:
    made = trace(Pair(lambda m, h: h.view(2, 5, 3, m.width).flatten(2)), X)
    named = [e for e in made.equations if isinstance(e.value, TracedInt)]
    assert {e.value.expression for e in named} >= {Attribute("", "width")}
