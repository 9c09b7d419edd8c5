"""A sharding plan: for each weight, which part of which dimension each rank holds. Pure data, no torch.

Styles: "column" (output rows cut; no collective), "row" (input columns cut; the outputs are partial
sums, one all-reduce), "vocab" (embedding or head rows cut), "replicate" (whole on every rank).
A rank's part is a tuple of half-open ranges of the cut dimension, joined in that order (fused weights
such as q|k|v need several; a range that two ranks hold is a copy).

Decoding one token reads every weight of a rank once and passes every collective once, so a plan's two
figures of merit are the bytes of its fullest rank and the values its collectives carry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod

from ..layout import WeightFormat, WeightLayout

Ranges = tuple[tuple[int, int], ...]
# The format of the weight called so; None: plain floating point.
FormatOf = Callable[[str], WeightFormat | None]


def extent(ranges: Ranges) -> int:
    """Number of elements the ranges cover together."""
    return sum(stop - start for start, stop in ranges)


def plain(name: str) -> None:
    """The FormatOf of a model that is not quantised."""


@dataclass(frozen=True)
class Collective:
    """What one token passes through: "all_reduce" or "all_gather", and the values of its result."""

    kind: str
    values: int


@dataclass(frozen=True)
class WeightPlan:
    """How one parameter divides.

    name: parameter name in the model. shape: of the whole. style: see the module. dim: the cut
    dimension (None for "replicate"). parts: per rank, its ranges of that dimension. unit: what may not
    be cut ("kv group", "neuron", "token"; "" for replicated). reason: why it is replicated.
    collectives: what follows the layer, where it is not what the style implies (see `traffic`).
    """

    name: str
    shape: tuple[int, ...]
    style: str
    dim: int | None = None
    parts: tuple[Ranges, ...] = ()
    unit: str = ""
    reason: str = ""
    collectives: tuple[Collective, ...] | None = None

    def part(self, rank: int) -> Ranges | None:
        """This rank's ranges of `dim`; None where it holds the whole."""
        return None if self.dim is None else self.parts[rank]

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of this rank's part."""
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.dim] = extent(self.parts[rank])
        return tuple(shape)

    @property
    def traffic(self) -> tuple[Collective, ...]:
        """The collectives of one token: those given, else an all-reduce of the dimension that is not cut
        after a row-parallel weight and after a vocabulary-parallel embedding."""
        if self.collectives is not None:
            return self.collectives
        if self.style in ("row", "vocab") and self.dim is not None and len(self.shape) == 2:
            return (Collective("all_reduce", self.shape[1 - self.dim]),)
        return ()

    def layouts(self, rank: int, format: WeightFormat | None = None) -> tuple[WeightLayout, ...]:
        """One WeightLayout for each of this rank's ranges of a two-dimensional weight."""
        assert len(self.shape) == 2, f"{self.name} of shape {self.shape} has no rows and columns"
        whole = ((0, self.shape[0]), (0, self.shape[1]))
        if self.dim is None:
            return (WeightLayout(self.shape, *whole, format),)
        return tuple(
            WeightLayout(self.shape, *((cut, whole[1]) if self.dim == 0 else (whole[0], cut)), format)
            for cut in self.parts[rank]
        )

    def weight_bytes(self, rank: int, dtype_bytes: int, format: WeightFormat | None = None) -> int:
        """Bytes of this rank's part; a format applies to two-dimensional weights only."""
        if len(self.shape) != 2:
            return prod(self.local_shape(rank)) * dtype_bytes
        return sum(layout.weight_bytes(dtype_bytes) for layout in self.layouts(rank, format))

    def whole_bytes(self, dtype_bytes: int, format: WeightFormat | None = None) -> int:
        """Bytes of the whole weight."""
        if len(self.shape) != 2:
            return prod(self.shape) * dtype_bytes
        return WeightLayout.whole(self.shape, format).weight_bytes(dtype_bytes)


@dataclass(frozen=True)
class PlanTotals:
    """Sums over one plan.

    rank_bytes: weight bytes of each rank. whole_bytes: of the model on one device. sharded_share: the
    part of the model's values that is cut. collectives: (kind, how many a token, values of all their
    results together). traffic_bytes: those values in the activations' dtype.
    """

    rank_bytes: tuple[int, ...]
    whole_bytes: int
    sharded_share: float
    collectives: tuple[tuple[str, int, int], ...]
    traffic_bytes: int

    @property
    def fullest_over_mean(self) -> float:
        """Bytes of the fullest rank over the mean of all ranks: what imbalance costs in time."""
        return max(self.rank_bytes) * len(self.rank_bytes) / max(sum(self.rank_bytes), 1)

    @property
    def fullest_share(self) -> float:
        """Bytes of the fullest rank over those of the whole model; 1 / world_size is ideal."""
        return max(self.rank_bytes) / max(self.whole_bytes, 1)


@dataclass(frozen=True)
class Plan:
    """The plans of all parameters of one model over `world_size` ranks, in the model's order."""

    world_size: int
    weights: tuple[WeightPlan, ...]

    def __getitem__(self, name: str) -> WeightPlan:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, WeightPlan]:
        return {weight.name: weight for weight in self.weights}

    def totals(self, *, dtype_bytes: int = 2, format_of: FormatOf = plain) -> PlanTotals:
        """Sums, with dtype_bytes a plain weight value and an activation value."""
        values = sum(prod(weight.shape) for weight in self.weights)
        cut = sum(prod(weight.shape) for weight in self.weights if weight.dim is not None)
        passed: dict[str, list[int]] = {}
        if self.world_size > 1:
            for collective in (c for weight in self.weights for c in weight.traffic):
                passed.setdefault(collective.kind, []).append(collective.values)
        return PlanTotals(
            rank_bytes=tuple(
                sum(w.weight_bytes(rank, dtype_bytes, format_of(w.name)) for w in self.weights)
                for rank in range(self.world_size)
            ),
            whole_bytes=sum(w.whole_bytes(dtype_bytes, format_of(w.name)) for w in self.weights),
            sharded_share=cut / max(values, 1),
            collectives=tuple((kind, len(sizes), sum(sizes)) for kind, sizes in passed.items()),
            traffic_bytes=dtype_bytes * sum(sum(sizes) for sizes in passed.values()),
        )

    def to_text(self, *, dtype_bytes: int = 2, format_of: FormatOf = plain) -> str:
        """The plan as a table: a line a weight, layers that divide alike in one block, then the totals."""
        rows: list[tuple[str, ...]] = [_TITLES]
        block = ""
        for title, name, weight in _collapsed(self.weights):
            if title and title != block:
                rows.append((title, *("" for _ in _TITLES[1:])))
            block = title
            cells = _cells(weight, self.world_size, dtype_bytes, format_of(weight.name))
            rows.append(("  " + name if title else name, *cells))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(
            [*lines, "", *_totals_lines(self.totals(dtype_bytes=dtype_bytes, format_of=format_of))]
        )

    def to_json(self) -> str:
        """The plan as one JSON document: world_size, and a list of the weights' fields."""
        return json.dumps(asdict(self))


_TITLES = ("weight", "style", "unit", "whole", "part", "bytes a rank", "collectives a token")


def _cells(
    weight: WeightPlan, world_size: int, dtype_bytes: int, format: WeightFormat | None
) -> tuple[str, ...]:
    """A weight's row under the titles after the first."""
    ranks = range(world_size)
    shapes = zip(*(weight.local_shape(rank) for rank in ranks), strict=True)
    sizes = (format_bytes(weight.weight_bytes(rank, dtype_bytes, format)) for rank in ranks)
    traffic = weight.traffic if world_size > 1 else ()
    return (
        weight.style,
        weight.unit or weight.reason,
        " x ".join(map(str, weight.shape)),
        " x ".join(map(_merged, shapes)),
        _merged(sizes),
        ", ".join(f"{c.kind} {c.values}" for c in traffic),
    )


def format_bytes(count: int) -> str:
    """A byte count for people: 1536 -> "1.5 KiB"."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:.1f} {' KMGT'[power]}iB"


def _merged(values: Iterable[object]) -> str:
    """One value where all ranks have it, else all of them: "6|3"; of many ranks the runs: "2 (x3)|1"."""
    runs: list[tuple[str, int]] = []
    for text in map(str, values):
        if runs and runs[-1][0] == text:
            runs[-1] = text, runs[-1][1] + 1
        else:
            runs.append((text, 1))
    if len(runs) == 1:
        return runs[0][0]
    return "|".join(text if count == 1 else f"{text} (x{count})" for text, count in runs)


def _collapsed(weights: tuple[WeightPlan, ...]) -> list[tuple[str, str, WeightPlan]]:
    """(title of the block or "", name in it, a weight that stands for all of the block's layers).

    A layer is the run of weights whose names begin with the same "prefix.index."; layers that follow
    one another and divide alike make one block.
    """
    layers: list[tuple[str, int | None, list[tuple[str, WeightPlan]]]] = []
    for weight in weights:
        prefix, index, rest = _split_name(weight.name)
        if not layers or layers[-1][:2] != (prefix, index):
            layers.append((prefix, index, []))
        layers[-1][2].append((rest, weight))
    blocks: list[tuple[str, int | None, int, list[tuple[str, WeightPlan]]]] = []
    for prefix, index, members in layers:
        if blocks and index is not None and blocks[-1][0] == prefix and _alike(blocks[-1][3], members):
            blocks[-1] = (prefix, blocks[-1][1], index, blocks[-1][3])
        else:
            blocks.append((prefix, index, index or 0, members))
    found = []
    for prefix, first, last, members in blocks:
        title = ""
        if first is not None:
            alone = first == last
            title = f"{prefix}.{first}" if alone else f"{prefix}.{first}-{last} (each of {last - first + 1})"
        found += [(title, rest, weight) for rest, weight in members]
    return found


def _split_name(name: str) -> tuple[str, int | None, str]:
    """ "model.layers.3.mlp.up_proj.weight" -> ("model.layers", 3, "mlp.up_proj.weight")."""
    words = name.split(".")
    for place, word in enumerate(words[:-1]):
        if word.isdecimal() and place > 0:
            return ".".join(words[:place]), int(word), ".".join(words[place + 1 :])
    return "", None, name


def _alike(one: list[tuple[str, WeightPlan]], other: list[tuple[str, WeightPlan]]) -> bool:
    def signature(members: list[tuple[str, WeightPlan]]) -> list[tuple[object, ...]]:
        return [(rest, w.shape, w.style, w.dim, w.parts, w.unit, w.traffic) for rest, w in members]

    return signature(one) == signature(other)


def _totals_lines(totals: PlanTotals) -> list[str]:
    ranks = len(totals.rank_bytes)
    lines = [
        f"ranks               {ranks}",
        f"weights cut         {totals.sharded_share:.1%} of all values",
        f"bytes a rank        {_merged(map(format_bytes, totals.rank_bytes))} "
        f"of {format_bytes(totals.whole_bytes)} (fullest {totals.fullest_share:.1%} of the model, "
        f"{totals.fullest_over_mean - 1:.1%} above the mean)",
    ]
    passed = ", ".join(f"{count} {kind} ({values} values)" for kind, count, values in totals.collectives)
    return [
        *lines,
        f"traffic a token     {passed or 'none'}: {format_bytes(totals.traffic_bytes)} of results",
    ]
