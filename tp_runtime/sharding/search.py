"""Deciding, from one trace after another, what of a model divides.

Each trace either leaves all families divided, or it names families that cannot be. Of such a family, in this
order: norms that tie it sum over ranks; parts that several units read are copied (a KV head of many query
heads); parts that fail alone stay whole (rows of a fused weight); the first weight in the flow of data stays
whole. What does not fit an activation that is whole is cut where a module gives or takes it. Every step adds
to `Decisions`, so the search ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .build import Analysis
from .copies import cheapest_part
from .families import (
    Family,
    Graph,
    Owners,
    cut_of,
    find_families,
    ranks_of_groups,
)
from .inputs import Example
from .norms import recognise
from .shares import assign
from .surrogate import Surrogate, make_surrogate
from .trace.grids import SHARED, unique_pairs
from .trace.labels import Misfit
from .trace.mode import Decisions, Trace
from .trace.partial import Partial
from .trace.sources import BUFFER_LIMIT, COPIED, NORMAL, REPLICATED, Source

MAX_TRACES = 60
FEW = 4  # times as many weights decide where a few others beside them are cut


@dataclass
class Search:
    """One search. tried_copies: families (by their first source) for which copying parts did not help.
    norms: whether the module at a path was recognised as one. settled: whether the last analysis left nothing
    to decide. too_few: units of families (by their first source) that have several, but fewer than ranks.
    whole_before: weights that the last trace took as whole. branches: where the code decided by values.
    shown: modules whose hooks would have seen something cut.
    """

    surrogate: Surrogate
    example: Example
    world: int
    verify: bool = True
    decisions: Decisions = field(default_factory=Decisions)
    tried_copies: set[str] = field(default_factory=set)
    copied_for: dict[str, set[str]] = field(default_factory=dict)
    norms: dict[str, bool] = field(default_factory=dict)
    traces: int = 0
    settled: bool = True
    too_few: dict[str, int] = field(default_factory=dict)
    whole_before: set[str] = field(default_factory=set)
    branches: set[str] = field(default_factory=set)
    shown: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in self.surrogate.overlapping:
            self.decisions.whole.setdefault(name, "it shares memory with another tensor of the model")

    def trace(self) -> Trace:
        """A trace of the examples under the present decisions."""
        self.traces += 1
        model = make_surrogate(self.surrogate.model, shorten=False).model
        trace = Trace(model, self.decisions, self.surrogate.hooked)
        trace.run(self.example.calls[self.example.proved_only :])
        self.branches |= trace.branches
        self.shown |= trace.shown
        return trace

    def settle(self) -> Analysis:
        """Trace until nothing needs to be decided."""
        while True:
            before = self.decisions.state()
            analysis = self.judge(self.trace())
            self.settled = self.decisions.state() == before
            if self.settled or self.traces >= MAX_TRACES:
                return analysis

    def judge(self, trace: Trace) -> Analysis:
        """Decide about every family that cannot be divided; the analysis holds if there is none."""
        self.whole_before = set(self.decisions.whole)
        buffers = dict(self.surrogate.model.named_buffers())
        for name in trace.labels.too_large:
            why = f"a buffer beyond {BUFFER_LIMIT} values" if name in buffers else "it is very large"
            self.decisions.whole.setdefault(name, f"{why}, with an operation on it other than a product")
        graph = Graph(trace.labels)
        families = find_families(graph, trace.order)
        stuck = trace.partials.resolve()[2]
        if self._set_apart(trace, stuck) or self._drop_failed_copies(graph):
            return Analysis(trace, graph, [], Owners(graph, {}, self.world), self.world)
        if not any(f.failed or len(f.units) < self.world for f in families):
            self._note_stuck(graph, families, stuck)
        counts: dict[int, list[int]] = {}
        good: list[Family] = []
        poisoned = any(f.failed for f in families)
        for family in families:
            if poisoned and not family.failed:
                continue
            if self._divides(graph, family, trace):
                good.append(family)
        shares = assign(good, self.world)
        rank_of: dict[int, int] = {}
        for family, share in zip(good, shares, strict=True):
            ranks = np.repeat(np.arange(self.world), share)
            rank_of.update(zip(family.units.tolist(), ranks.tolist(), strict=True))
            counts[id(family)] = share
        owners = Owners(graph, rank_of, self.world)
        analysis = Analysis(trace, graph, good, owners, self.world)
        if len(good) == len(families):
            before = self.decisions.state()
            for check in (self._check_cuts, self._check_misfits, self._check_pins):
                check(analysis)
                if self.decisions.state() != before:
                    break
        return analysis

    # families

    def _set_apart(self, trace: Trace, stuck: list[Partial]) -> bool:
        """Where several products at once (one a head) give sums that are needed at once, each of the matrices
        goes with its head instead.
        """
        found = {trace.source_name(int(sum_.ids[0])) for sum_ in stuck if sum_.batched and len(sum_.ids)}
        new = found - self.decisions.apart
        self.decisions.apart |= new
        return bool(new)

    def _drop_failed_copies(self, graph: Graph) -> bool:
        """Weights of which copied parts cannot be followed are whole instead; of several, where some are much
        smaller (a low-rank pair), those first, and the others as if nothing had been copied.
        """
        failed: dict[str, str] = {}
        reasons = graph.failure_reasons
        for component in graph.copied & reasons.keys():
            ids = graph.nodes[graph.component == component]
            for place in np.unique(graph.source_places(ids)):
                name = graph.labels.sources[place].name
                if name in self.decisions.marks:
                    failed[name] = reasons[component]
        largest = max((self._sizes.get(name, 0) for name in failed), default=0)
        few = {name for name in failed if self._sizes.get(name, 0) * FEW <= largest}
        for name, reason in failed.items():
            del self.decisions.marks[name]
            if not few or name in few:
                self.decisions.whole[name] = reason
        return bool(failed)

    def _note_stuck(self, graph: Graph, families: list[Family], stuck: list[Partial]) -> None:
        for partial in stuck:
            units = set(np.unique(graph.component[graph.places(partial.ids)]).tolist())
            for family in families:
                if units & set(family.units.tolist()):
                    family.failed = (
                        family.failed
                        or f"a sum over ranks would be needed inside {partial.module} ({partial.needed_by})"
                    )
                    family.failed_units |= set(family.units.tolist())

    def _divides(self, graph: Graph, family: Family, trace: Trace) -> bool:
        key = family.sources[0]
        groups = len(np.unique(family.group))
        healthy = len(family.units) - len(family.failed_units & set(family.units.tolist()))
        if not family.failed and len(family.units) >= self.world:
            copied = groups < len(family.units) or any(
                name in self.decisions.marks and (self.decisions.marks[name][1] == COPIED).any()
                for name in family.sources
            )
            if not copied or groups >= self.world or ranks_of_groups(family, self.world) is not None:
                return True
            family.failed = f"{groups} groups of units cannot be spread over {self.world} ranks"
        elif not family.failed:
            if self._share_norm(graph, family):
                return False
            if key not in self.tried_copies and self._copy_parts(graph, family):
                return False
            family.failed = f"{len(family.units)} independent unit(s) for {self.world} ranks"
            if len(family.units) > 1:
                self.too_few[key] = max(self.too_few.get(key, 0), len(family.units))
            if key in self.copied_for:
                self._undo_copies(key)
                return False
        if family.failed_units and healthy >= self.world and self._replicate_rows(graph, family, trace):
            return False
        self._first_whole(family, trace, family.failed, graph)
        return False

    def _first_whole(self, family: Family, trace: Trace, reason: str, graph: Graph | None = None) -> None:
        """The first weight in the flow of data stays whole; rather one that has too few units on its own. Of
        a family that failed (graph), it may be so since the trace: it has the role of another family's.
        """
        known = self.decisions.whole if graph is None else self.whole_before
        weights = [n for n in family.sources if n in trace.order and n not in known]
        self._direct: set[str] = set()
        if graph is not None:
            alone = self._suspects(graph, family, set(weights))
            weights = [n for n in weights if n in alone] or weights
        chosen = min(weights, key=lambda n: trace.order[n], default=None)
        if chosen is None:
            chosen = next((n for n in family.sources if n not in known), None)
        if chosen is not None:
            for name in self.surrogate.same_role(chosen) if chosen in self._direct else [chosen]:
                self.decisions.whole.setdefault(name, reason)

    def _suspects(self, graph: Graph, family: Family, names: set[str]) -> set[str]:
        """Of the weights in `names`, those that fail even where nothing joins them to other operands: they go
        into what failed, or fall into fewer parts than there are ranks within the family.
        """
        apart = graph.apart
        failed: set[int] = set()
        direct: set[str] = set()
        for (ids, _, _), nodes in zip(graph.labels.failures, graph.failure_nodes, strict=True):
            direct.update(graph.labels.sources[p].name for p in np.unique(graph.source_places(ids)))
            failed.update(apart[nodes].tolist())
        if family.failed_units and direct & names:
            self._direct = direct & names
            return direct & names
        found = set()
        for source in graph.labels.sources:
            if source.name in names:
                low, high = np.searchsorted(graph.nodes, [source.base, source.base + source.numel])
                inside = np.isin(graph.component[low:high], family.units)
                own = set(np.unique(apart[low:high][inside]).tolist())
                if own & failed if family.failed_units else len(own) < self.world:
                    found.add(source.name)
        return found

    def _mark(self, source: Source, dim: int, index: np.ndarray, mark: int) -> bool:
        known = self.decisions.marks.get(source.name)
        if known is not None and known[0] != dim:
            return False
        marks = np.full(source.shape[dim], NORMAL, dtype=np.int8) if known is None else known[1].copy()
        changed = marks[index] != mark
        marks[index] = mark
        self.decisions.marks[source.name] = (dim, marks)
        return bool(changed.any())

    def _replicate_rows(self, graph: Graph, family: Family, trace: Trace) -> bool:
        """The rows that fail alone stay whole; the first weight of them only."""
        nodes = np.flatnonzero(np.isin(graph.component, list(family.failed_units)))
        places = graph.source_places(graph.nodes[nodes])
        sources = {int(p): graph.labels.sources[p] for p in np.unique(places)}
        ordered = sorted(
            (trace.order.get(s.name, 1 << 30), p) for p, s in sources.items() if s.kind == "weight"
        )
        if not ordered:
            return False
        place = ordered[0][1]
        source = sources[place]
        dim = _free_dim(source)
        if dim is None:
            return False
        index = np.unique(source.index(graph.nodes[nodes[places == place]], dim))
        return len(index) < source.shape[dim] and self._mark(source, dim, index, REPLICATED)

    def _copy_parts(self, graph: Graph, family: Family) -> bool:
        """Mark, as copied to all ranks that need it, the cheapest part whose removal leaves more units."""
        apart = graph.apart
        nodes = np.flatnonzero(np.isin(graph.component, family.units))
        edges = [p for p, t in zip(graph.tie_nodes, graph.labels.ties, strict=True) if t.kind == "join"]
        if not edges or not len(nodes):
            return False
        pairs = apart[np.concatenate(edges)]
        pairs = unique_pairs(pairs[:, 0], pairs[:, 1])[0]
        pairs = pairs[np.isin(pairs[:, 0], apart[nodes]) & (pairs[:, 0] != pairs[:, 1])]
        if not len(pairs):
            return False
        best = cheapest_part(graph, apart, nodes, pairs, len(family.units))
        if best is None:
            return False
        changed = False
        for place, ids in best.items():
            source = graph.labels.sources[place]
            dim = _free_dim(source)
            if source.kind == "weight" and dim is not None:
                changed |= self._mark(source, dim, np.unique(source.index(ids, dim)), COPIED)
                self.copied_for.setdefault(family.sources[0], set()).add(source.name)
        return changed

    def _share_norm(self, graph: Graph, family: Family) -> bool:
        """Let norms over what several operands divide, and their like in other layers, sum over ranks.

        Those are the norms without whose ties a weight of the family falls into more parts. Where nothing is
        joined, a norm stands between two weights, and the first of them is better whole (a latent space).
        """
        members = np.flatnonzero(np.isin(graph.component, family.units))
        found = [tie for tie in graph.ties_of(members) if tie.kind != "weight"]
        norms = [
            path
            for path in sorted({tie.module for tie in found if tie.kind == "along"} - self.decisions.norms)
            if path and self._is_norm(path)
        ]
        if not any(tie.kind == "join" and tie.module not in norms for tie in found):
            return False
        parts = len(np.unique(graph.apart[members]))
        changed = False
        for path in norms:
            apart = graph.without({"along"}, {path}, always={"join"})
            if len(np.unique(apart[members])) > parts:
                parameter = next(iter(dict(self.surrogate.model.get_submodule(path).named_parameters())))
                names = self.surrogate.same_role(f"{path}.{parameter}")
                self.decisions.norms.update(name.rpartition(".")[0] for name in names)
                changed = True
        return changed

    def _is_norm(self, path: str) -> bool:
        if path not in self.norms:
            module = self.surrogate.model.get_submodule(path)
            sizes = {p.shape[0] for p in module.parameters() if p.dim() == 1}
            self.norms[path] = len(sizes) == 1 and recognise(module, path, sizes.pop()) is not None
        return self.norms[path]

    def _undo_copies(self, key: str) -> None:
        for name in self.copied_for.pop(key):
            dim, marks = self.decisions.marks.pop(name, (0, np.zeros(0)))  # gone with decisions taken back
            if (marks == REPLICATED).any():
                self.decisions.marks[name] = (dim, np.where(marks == COPIED, NORMAL, marks))
        self.tried_copies.add(key)

    def _undo_copies_of(self, analysis: Analysis, misfit: Misfit) -> None:
        """Weights whose copied parts do not fit what they meet are whole instead."""
        assert misfit.operand is not None, "a copied operand has labels"
        ids = np.unique((misfit.operand[misfit.operand > 0]).numpy()) & ~SHARED
        for place in np.unique(analysis.graph.source_places(ids)):
            name = analysis.trace.labels.sources[place].name
            if self.decisions.marks.pop(name, None) is not None:
                self.decisions.whole[name] = f"{misfit.op} in {misfit.module} needs all of it"

    # what families imply

    def _families_of(self, analysis: Analysis, ids: np.ndarray) -> list[Family]:
        graph = analysis.graph
        flat = graph.canonical(np.abs(ids[ids != 0]))
        place = np.minimum(np.searchsorted(graph.nodes, flat), len(graph.nodes) - 1)
        units = set(np.unique(graph.component[place[graph.nodes[place] == flat]]).tolist())
        return [f for f in analysis.families if units & set(f.units.tolist())]

    def _check_cuts(self, analysis: Analysis) -> None:
        for source in analysis.trace.labels.sources:
            cut = cut_of(source, analysis.owners)
            if not isinstance(cut, str):
                continue
            if source.kind in ("weight", "buffer"):
                self.decisions.whole[source.name] = cut
            else:
                meets = [m.pairs for m in analysis.trace.labels.meets]
                pairs = np.concatenate(meets)
                own = (pairs[:, 1] >= source.base) & (pairs[:, 1] < source.base + source.numel)
                for family in self._families_of(analysis, pairs[own, 0]):
                    self._first_whole(family, analysis.trace, cut)

    def _check_misfits(self, analysis: Analysis) -> None:
        known = frozenset(self.decisions.births)
        for misfit in analysis.trace.labels.misfits:
            if _fits(misfit, analysis.owners):
                continue
            if misfit.operand is not None and bool((misfit.operand > 0).any()):
                self._undo_copies_of(analysis, misfit)
                continue
            reason = f"{misfit.op} in {misfit.module or 'the model'} needs an operand that is whole"
            if misfit.terms is not None and self._low_rank_whole(analysis, misfit, reason):
                continue
            if misfit.module not in known and misfit.module:
                self.decisions.births.add(misfit.module)
                continue
            cut = self._families_of(analysis, misfit.labels.numpy().reshape(-1))
            for family in self._low_rank_inside(analysis, misfit.module, cut) or cut:
                self._first_whole(family, analysis.trace, reason)

    def _low_rank_inside(self, analysis: Analysis, module: str, cut: list[Family]) -> list[Family]:
        """Families of few weights whose sums over ranks something in this module needs (the decay of a linear
        attention): where these are whole, what they give can be cut with what it meets.
        """
        demanded = analysis.trace.partials.demanded.values()
        ids = [leaf.ids for partial in demanded if partial.needed_in == module for leaf in partial.leaves()]
        summed = self._families_of(analysis, np.concatenate(ids)) if ids else []
        others = [family for family in summed if all(family is not known for known in cut)]
        return [family for family in others if self._values([family]) * FEW <= self._values(cut)]

    def _low_rank_whole(self, analysis: Analysis, misfit: Misfit, reason: str) -> bool:
        """Where a cut operand meets a sum over ranks and one of the two is of few weights (a low-rank pair
        beside a projection), the first of these stays whole, so that the other is cut as without them.
        """
        assert misfit.terms is not None, "the operand is a partial sum"
        summed = self._families_of(analysis, misfit.terms)
        cut = self._families_of(analysis, misfit.labels.numpy().reshape(-1))
        few, many = sorted((summed, cut), key=self._values)
        if {id(f) for f in summed} & {id(f) for f in cut} or self._values(few) * FEW > self._values(many):
            return False
        for family in few:
            self._first_whole(family, analysis.trace, reason)
        return bool(few)

    def _values(self, families: list[Family]) -> int:
        """Of the weights of families."""
        return sum(self._sizes.get(name, 0) for name in {n for f in families for n in f.sources})

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: p.numel() for name, p in self.surrogate.model.named_parameters()}

    def _check_pins(self, analysis: Analysis) -> None:
        pins = analysis.trace.labels.pins
        if not pins or not len(analysis.owners.soft):
            return
        pinned = np.unique(np.concatenate(pins))
        activation = pinned[pinned >= analysis.trace.first_activation_id]
        cut = activation[np.isin(activation, analysis.owners.soft)]
        if not len(cut):
            return
        pairs = np.concatenate([m.pairs for m in analysis.trace.labels.meets])
        for family in self._families_of(analysis, pairs[np.isin(pairs[:, 1], cut), 0]):
            self._first_whole(family, analysis.trace, "an activation it would cut is also needed whole")


def _fits(misfit: Misfit, owners: Owners) -> bool:
    """Whether an operand is cut as the result is, along the dims it spans."""
    masks = owners.of_labels(misfit.labels)
    if not (masks >= 0).any():
        return True
    lead = masks.ndim - len(misfit.shape)
    if not any(size > 1 and _cut_along(masks, lead + place) for place, size in enumerate(misfit.shape)):
        return True
    if misfit.operand is None:
        return False
    own = owners.of_labels(misfit.operand)
    if not bool((misfit.operand > 0).any()):
        return bool(((np.broadcast_to(own, masks.shape) == masks) | (masks < 0)).all())
    labels = np.broadcast_to(misfit.operand.numpy(), masks.shape)
    own = np.broadcast_to(own, masks.shape)
    for rank in range(owners.world):
        held = (own >= 0) & ((own >> rank) & 1 == 1)
        used = (masks >= 0) & ((masks >> rank) & 1 == 1)
        if set(np.unique(labels[held])) != set(np.unique(labels[used])):
            return False
    return True


def _cut_along(masks: np.ndarray, dim: int) -> bool:
    """Whether ranks hold different indices of a dim; what is whole (padding) lies on all of them."""
    low = np.where(masks < 0, np.iinfo(np.int64).max, masks).min(axis=dim)
    high = masks.max(axis=dim)
    return bool(((low != high) & (high >= 0)).any())


def _free_dim(source: Source) -> int | None:
    """The only dim along which a source may be cut."""
    free = [d for d in range(len(source.shape)) if d not in source.tied and source.shape[d] > 1]
    return free[0] if len(free) == 1 else None
