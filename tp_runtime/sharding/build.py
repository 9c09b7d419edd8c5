"""A ShardPlan from an analysed trace: cuts as ranges, sums, slices and integers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
from torch import Tensor, nn

from .apply import ranges_of
from .families import Family, Graph, Owners, cut_of
from .norms import recognise
from .plan import Collective, Ranges, WeightPlan
from .rules import VOCAB_UNITS, split_range
from .shardplan import Gather, Integer, Norm, ShardPlan, Slice
from .trace.integers import Attribute, solve
from .trace.mode import Decisions, Trace
from .trace.sources import Source


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
        for name, ids in self.trace.result_soft.items():
            if any((self.owners.of(own) >= 0).any() for own in ids):
                cut.add(name)
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
            weights.append(_weight(source, cut, analysis, once, decisions.vocabularies))
    shapes = {n: tuple(t.shape) for n, t in _tensors(analysis.trace.model)}
    weights += [
        WeightPlan(name, shapes[name], "replicate", reason=reason) for name, reason in decisions.whole.items()
    ]
    gathers = tuple(
        Gather(module, parts_of(analysis.owners.of(ids), analysis.world))
        for module, ids in analysis.trace.gathered.items()
    )
    norms: list[Norm] = []
    for module, ids in analysis.trace.normed.items():
        masks = analysis.owners.of(ids)
        if (masks >= 0).any():
            norm = recognise(
                analysis.trace.model.get_submodule(module), module, len(ids), parts_of(masks, analysis.world)
            )
            assert norm is not None, f"{module} was recognised before"
            norms.append(norm)
    integers, problems = _integers(analysis)
    plan = ShardPlan(
        analysis.world,
        _with_traffic(weights, points, gathers, tuple(norms), decisions.vocabularies),
        sums=tuple(sorted(points)),
        gathers=gathers,
        slices=tuple(dict.fromkeys(slices)),
        norms=tuple(norms),
        integers=integers,
        vocabularies=tuple(sorted(decisions.vocabularies)),
    )
    return plan, problems


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def parts_of(mask: np.ndarray, world: int) -> tuple[Ranges, ...]:
    """Ranges of the indices each rank holds, from a bit mask per index."""
    return tuple(ranges_of(((mask >> rank) & 1).astype(bool).tolist()) for rank in range(world))


def _weight(
    source: Source,
    cut: tuple[int, np.ndarray] | None,
    analysis: Analysis,
    once: set[str],
    vocabularies: set[str],
) -> WeightPlan:
    name, shape = source.name, source.shape
    if name in once:
        return WeightPlan(name, shape, "once", reason="added by rank 0 alone, before the sum")
    if name.rpartition(".")[0] in vocabularies and len(shape) == 2:
        parts = split_range(shape[0], [0] * analysis.world, 1, VOCAB_UNITS)
        if cut is not None:  # tied to a head, which divides it
            parts = parts_of(cut[1], analysis.world)
        return WeightPlan(name, shape, "vocab", 0, parts, "token", collectives=())
    if cut is None:
        return WeightPlan(name, shape, "replicate", reason="nothing that is cut meets it")
    dim, mask = cut
    style = "row" if _is_row(source, analysis) else "column"
    low, high = np.searchsorted(analysis.graph.nodes, [source.base, source.base + source.numel])
    units = len(np.unique(analysis.graph.component[low:high]))
    unit = f"{shape[dim] // units} of {shape[dim]}" if 0 < units <= shape[dim] else ""
    return WeightPlan(name, shape, style, dim, parts_of(mask, analysis.world), unit, collectives=())


def _with_traffic(
    weights: list[WeightPlan],
    points: set[tuple[str, str]],
    gathers: tuple[Gather, ...],
    norms: tuple[Norm, ...],
    vocabularies: set[str],
) -> tuple[WeightPlan, ...]:
    """Each collective noted at the last weight before it, with the values of one token."""
    passed: dict[str, list[Collective]] = {}

    def note(module: str, styles: tuple[str, ...], kind: str, values: Callable[[WeightPlan], int]) -> None:
        own = [
            w
            for w in weights
            if w.style in styles and (w.name + ".").startswith(f"{module}." if module else "")
        ]
        if kind == "all_gather" and not own:  # a head that is tied to an embedding
            own = [w for w in weights if w.style == "vocab"]
        if own:
            passed.setdefault(own[-1].name, []).append(Collective(kind, values(own[-1])))

    for module, _ in sorted(points):
        note(module, ("row",), "all_reduce", lambda w: prod(w.shape[-2:]) // w.shape[w.dim or -1])
    for gather in gathers:
        note(gather.module, ("column", "vocab"), "all_gather", lambda w: w.shape[0])
    for norm in norms:
        note(norm.module, ("column",), "all_reduce", lambda w: 1)
    for module in vocabularies:
        note(module, ("vocab",), "all_reduce", lambda w: w.shape[1])
    return tuple(replace(w, collectives=tuple(passed.get(w.name, ()))) for w in weights)


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
    cache: dict[tuple[object, ...], list[int]] = {}
    for rank in range(analysis.world):

        def locate(labels: Tensor, dim: int, rank: int = rank) -> int:
            dim %= max(labels.dim(), 1)
            key = (labels.data_ptr(), tuple(labels.shape), labels.stride(), dim)
            if key not in cache:
                cache[key] = owners.local_sizes(labels, dim)
            return cache[key][rank]

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
