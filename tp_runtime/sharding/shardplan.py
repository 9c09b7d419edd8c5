"""What `shard` does to a model, as data: weights, sums over ranks, activations that are cut, integers.

A ShardPlan is made from a trace on one rank, sent to the others, kept in a cache, and applied by `apply`; it
holds names and numbers only. Weights are WeightPlans as in every other plan of this package, with the style
"once" for a bias that rank 0 alone adds before a sum. No torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .plan import Collective, Plan, Ranges, WeightPlan

Point = tuple[str, str]


@dataclass(frozen=True)
class Slice:
    """An activation that is whole and of which a rank needs a part.

    module: path. kind: "argument" or "result" of the module. place: position, keyword, or "" (the result
    itself). dim: counted from the end (negative). period: the part repeats after so many indices. parts: per
    rank, ranges within one period.
    """

    module: str
    kind: str
    place: str
    dim: int
    period: int
    parts: tuple[Ranges, ...]


@dataclass(frozen=True)
class Gather:
    """The result of `module` is cut along its last dim; parts: per rank, the ranges it holds."""

    module: str
    parts: tuple[Ranges, ...]


@dataclass(frozen=True)
class Norm:
    """A module that normalises over a cut last dim (of `size` elements; parts: per rank).

    centred: subtracts the mean (layer norm). shifted: multiplies by 1 + weight. weight, bias: attribute
    names, or "".
    """

    module: str
    size: int
    parts: tuple[Ranges, ...]
    centred: bool
    shifted: bool
    epsilon: float
    weight: str
    bias: str


@dataclass(frozen=True)
class Integer:
    """An integer of the model that a rank must see as its own: `name` (`index` in a list or None) of the
    module at `owner`, or of the object "path>attribute".
    """

    owner: str
    name: str
    index: int | None
    whole: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class ShardPlan(Plan):
    """A plan with all that applying it to an unedited model takes. It prints as a table.

    sums: (module, place in its result) where partial sums are added over ranks.
    vocabularies: embeddings of which a rank holds the rows of some tokens. cut_short: the search ran out of
    time, so that another one may divide more; such a plan is not kept. branches: lines ("file.py:12") where
    forward() decided by values: the plan holds for the side that the example took.
    """

    sums: tuple[Point, ...] = ()
    gathers: tuple[Gather, ...] = ()
    slices: tuple[Slice, ...] = ()
    norms: tuple[Norm, ...] = ()
    integers: tuple[Integer, ...] = ()
    vocabularies: tuple[str, ...] = ()
    origin: str = "trace"
    cut_short: bool = False
    branches: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = self.to_text()
        return text + (f"\ndecided by values   {', '.join(self.branches)}" if self.branches else "")

    def explain(self, name: str) -> str:
        """One sentence about a weight, or a line for each weight of a module. Raises KeyError for neither."""
        found = [w for w in self.weights if w.name == name or w.name.startswith(name + ".")]
        if not found:
            raise KeyError(name)
        return "\n".join(f"{w.name}: {_sentence(w)}" for w in found)


def _sentence(weight: WeightPlan) -> str:
    if weight.dim is None:
        return f"whole on every rank: {weight.reason}" if weight.reason else "whole on every rank"
    shapes = "|".join("x".join(map(str, weight.local_shape(rank))) for rank in range(len(weight.parts)))
    passed = ", ".join(f"{c.kind} of {c.values} values a token" for c in weight.traffic)
    return f"{weight.style}-parallel along dim {weight.dim} by {weight.unit} ({shapes})" + (
        f"; {passed}" if passed else ""
    )


def plan_to_json(plan: ShardPlan) -> str:
    """The plan as one JSON document, which `plan_from_json` reads back."""
    return json.dumps(asdict(plan))


def plan_from_json(text: str) -> ShardPlan:
    """The plan of such a document. Raises ValueError, KeyError or TypeError for another one."""
    data = json.loads(text)
    return ShardPlan(
        world_size=int(data["world_size"]),
        weights=tuple(_weight(w) for w in data["weights"]),
        sums=tuple((str(m), str(p)) for m, p in data["sums"]),
        gathers=tuple(Gather(g["module"], _parts(g["parts"])) for g in data["gathers"]),
        slices=tuple(Slice(**{**s, "parts": _parts(s["parts"])}) for s in data["slices"]),
        norms=tuple(Norm(**{**n, "parts": _parts(n["parts"])}) for n in data["norms"]),
        integers=tuple(Integer(**{**i, "values": tuple(i["values"])}) for i in data["integers"]),
        vocabularies=tuple(data["vocabularies"]),
        origin=data["origin"],
        cut_short=bool(data["cut_short"]),
        branches=tuple(str(line) for line in data["branches"]),
    )


def _parts(parts: Any) -> tuple[Ranges, ...]:
    return tuple(tuple((int(a), int(b)) for a, b in ranges) for ranges in parts)


def _weight(data: dict[str, Any]) -> WeightPlan:
    passed = data["collectives"]
    return WeightPlan(
        name=data["name"],
        shape=tuple(data["shape"]),
        style=data["style"],
        dim=data["dim"],
        parts=_parts(data["parts"]),
        unit=data["unit"],
        reason=data["reason"],
        collectives=None if passed is None else tuple(Collective(c["kind"], c["values"]) for c in passed),
    )
