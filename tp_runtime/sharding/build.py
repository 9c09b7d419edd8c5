"""A ShardPlan from an analysed trace: cuts as ranges, sums, slices and integers by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from .apply import ranges_of
from .families import Family, Graph, Owners, cut_of
from .plan import Collective, Ranges, WeightPlan
from .shardplan import Gather, Integer, ShardPlan, Slice
from .trace.integers import Attribute, solve
from .trace.labels import Source
from .trace.mode import Decisions, Trace


@dataclass
class Analysis:
    """A trace, its graph, the families that divide, and who owns what."""

    trace: Trace
    graph: Graph
    families: list[Family]
    owners: Owners
    world: int

    @property
    def whole_results(self) -> set[str]:
        """Modules whose results are the same on all ranks."""
        sums = {module for module, _ in self.sums[0]}
        partial = {p[0] for p, s in self.trace.partials.calls if s is not None} - sums
        cut = {
            source.name.partition("@")[0]
            for source in self.trace.labels.sources
            if source.kind == "result" and cut_of(source, self.owners) is not None
        }
        return {name for name, whole in self.trace.result_whole.items() if whole} - partial - cut

    @cached_property
    def sums(self) -> tuple[set[tuple[str, str]], set[str]]:
        """(where to sum, names of the biases added before)."""
        points, biases, _ = self.trace.partials.resolve()
        names = {self.trace.source_name(int(i)) for ids in biases.values() for i in ids}
        return points, names


def build_plan(analysis: Analysis, decisions: Decisions) -> tuple[ShardPlan, list[str]]:
    """The plan, and the modules whose integers no attribute can set."""
    points, once = analysis.sums
    weights, slices = [], []
    for source in analysis.trace.labels.sources:
        cut = cut_of(source, analysis.owners)
        if isinstance(cut, str) or source.kind in ("new", "virtual"):
            continue
        if source.kind in ("argument", "result"):
            if cut is not None:
                slices.append(_slice(source, *cut, analysis.world))
        else:
            weights.append(_weight(source, cut, analysis, once))
    shapes = {n: tuple(t.shape) for n, t in _tensors(analysis.trace.model)}
    weights += [
        WeightPlan(name, shapes[name], "replicate", reason=reason) for name, reason in decisions.whole.items()
    ]
    gathers = tuple(
        Gather(module, parts_of(analysis.owners.of(ids), analysis.world))
        for module, ids in analysis.trace.gathered.items()
    )
    integers, problems = _integers(analysis)
    plan = ShardPlan(
        analysis.world,
        tuple(weights),
        sums=tuple(sorted(points)),
        gathers=gathers,
        slices=tuple(dict.fromkeys(slices)),
        integers=integers,
    )
    return plan, problems


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def parts_of(mask: np.ndarray, world: int) -> tuple[Ranges, ...]:
    """Ranges of the indices each rank holds, from a bit mask per index."""
    return tuple(ranges_of(((mask >> rank) & 1).astype(bool).tolist()) for rank in range(world))


def _weight(
    source: Source, cut: tuple[int, np.ndarray] | None, analysis: Analysis, once: set[str]
) -> WeightPlan:
    if source.name in once:
        return WeightPlan(source.name, source.shape, "once", reason="added by rank 0 alone, before the sum")
    if cut is None:
        return WeightPlan(source.name, source.shape, "replicate", reason="nothing that is cut meets it")
    dim, mask = cut
    style = "row" if _is_row(source, analysis) else "column"
    unit = f"1 of {len(np.unique(mask))}"
    return WeightPlan(
        source.name, source.shape, style, dim, parts_of(mask, analysis.world), unit, collectives=()
    )


def _is_row(source: Source, analysis: Analysis) -> bool:
    return any(
        len(p.ids) and source.base <= int(p.ids[0]) < source.base + source.numel
        for p in analysis.trace.partials.created
    )


def _slice(source: Source, dim: int, mask: np.ndarray, world: int) -> Slice:
    size = len(mask)
    period = next(p for p in range(1, size + 1) if size % p == 0 and (mask.reshape(-1, p) == mask[:p]).all())
    module, _, place = source.name.partition("@")
    return Slice(module, source.kind, place, dim - len(source.shape), period, parts_of(mask[:period], world))


def _integers(analysis: Analysis) -> tuple[tuple[Integer, ...], list[str]]:
    trace, owners = analysis.trace, analysis.owners
    per_rank: list[dict[Attribute, int]] = []
    problems: list[str] = []
    cache: dict[tuple[int, int, int], int] = {}
    for rank in range(analysis.world):

        def locate(labels: Tensor, dim: int, rank: int = rank) -> int:
            key = (id(labels), dim % max(labels.dim(), 1), rank)
            if key not in cache:
                cache[key] = owners.local(labels, key[1], rank)
            return cache[key]

        values, bad = solve(trace.equations, trace.whole_integers, locate)
        per_rank.append(values)
        problems += [e.module for e in bad]
    names = dict.fromkeys(a for values in per_rank for a in values)
    found = []
    for attribute in names:
        whole = trace.whole_integers[attribute]
        local = tuple(values.get(attribute, whole) for values in per_rank)
        found.append(Integer(attribute.owner, attribute.name, attribute.index, whole, local))
    return tuple(found), list(dict.fromkeys(problems))


__all__ = ["Analysis", "Collective", "build_plan", "parts_of"]
