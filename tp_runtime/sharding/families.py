"""From labels to cuts: units that may not be divided, families of units, and which rank holds which.

Units are the connected components of the tied ids. Units whose labels one product made together (the columns
of one weight) form a family: all of it is divided, or none. A unit with copied parts (a KV head that many
query heads read) falls into smaller units that all need the part.

Owners are bit masks of ranks: one bit for a unit, several for a copied part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .trace.labels import SHARED, Labels, Meet, Source, Tie, unique_pairs


def components(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The connected component (its smallest member) of each of 0..count-1 under edges a[i] - b[i]."""
    parent = np.arange(count)
    while len(a):
        root_a, root_b = parent[a], parent[b]
        apart = root_a != root_b
        if not apart.any():
            break
        a, b, root_a, root_b = a[apart], b[apart], root_a[apart], root_b[apart]
        np.minimum.at(parent, np.maximum(root_a, root_b), np.minimum(root_a, root_b))
        while True:
            above = parent[parent]
            if (above == parent).all():
                break
            parent = above
    return parent


@dataclass
class Family:
    """Units that are divided together.

    units: component of each unit, in order. group: for each unit, which super-unit it belongs to (units that
    need the same copied part); all different where nothing is copied. sources: names. order: place in the
    flow of data. failed: why it cannot be divided, "" where it can. failed_units: those of the units that
    cannot.
    """

    units: np.ndarray
    group: np.ndarray
    sources: list[str]
    order: int
    elements: int
    failed: str = ""
    failed_units: set[int] = field(default_factory=set)


class Graph:
    """The ids of one trace, compressed and canonical, and their components."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.bases = np.array([s.base for s in labels.sources], dtype=np.int64)
        ties = [t.pairs for t in labels.ties]
        labels.meets += _meets_of_copies(labels)
        meets = [m.pairs for m in labels.meets]
        hard = [self.canonical(p.reshape(-1)) for p in ties]
        hard += [self.canonical(c) for c in labels.columns] + [self.canonical(m[:, 0]) for m in meets]
        hard += [self.canonical(f[0]) for f in labels.failures]
        self.nodes = np.unique(np.concatenate(hard)) if hard else np.zeros(0, np.int64)
        self.tie_nodes = [self.places(p) for p in ties]
        self.component = self._join([True] * len(ties))

    def canonical(self, ids: np.ndarray) -> np.ndarray:
        """Ids with the representatives of their tied dims."""
        ids = ids & ~SHARED
        if not len(ids):
            return ids
        out = ids.copy()
        which = np.searchsorted(self.bases, ids, side="right") - 1
        for place in np.unique(which):
            source = self.labels.sources[place]
            if source.tied:
                mask = which == place
                out[mask] = source.canonical(ids[mask])
        return out

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Node numbers of ids."""
        flat = self.canonical(ids.reshape(-1))
        return np.searchsorted(self.nodes, flat).reshape(ids.shape)

    def _join(self, use: list[bool]) -> np.ndarray:
        edges = [p for p, wanted in zip(self.tie_nodes, use, strict=True) if wanted]
        if not edges:
            return np.arange(len(self.nodes))
        pairs = np.concatenate(edges)
        return components(len(self.nodes), pairs[:, 0], pairs[:, 1])

    def without(
        self,
        kinds: set[str],
        modules: set[str] | None = None,
        always: frozenset[str] | set[str] = frozenset(),
    ) -> np.ndarray:
        """Components without the ties of some kinds (in some modules; of kinds in `always`, in any)."""

        def wanted(tie: Tie) -> bool:
            inside = modules is None or tie.module in modules
            return tie.kind not in always and not (tie.kind in kinds and inside)

        return self._join([wanted(tie) for tie in self.labels.ties])

    def source_of(self, node: int) -> Source:
        """The source a node is an element of."""
        place = int(np.searchsorted(self.bases, self.nodes[node], side="right")) - 1
        return self.labels.sources[place]

    def source_places(self, ids: np.ndarray) -> np.ndarray:
        """Index of the source of each id."""
        return np.searchsorted(self.bases, ids, side="right") - 1


def _meets_of_copies(labels: Labels) -> list[Meet]:
    """What meets a copy of a part meets the part."""
    if not labels.copies or not labels.meets:
        return []
    copies = np.concatenate(labels.copies)
    met = np.concatenate([m.pairs for m in labels.meets])
    ties = np.concatenate(labels.soft_ties) if labels.soft_ties else np.zeros((0, 2), np.int64)
    nodes = np.unique(np.concatenate([copies[:, 0], met[:, 1], ties.reshape(-1)]))
    edges = np.searchsorted(nodes, ties)
    component = components(len(nodes), edges[:, 0], edges[:, 1])
    of_copy = component[np.searchsorted(nodes, copies[:, 0])]
    of_met = component[np.searchsorted(nodes, met[:, 1])]
    found = []
    for part in np.unique(copies[:, 1]):
        partners = np.unique(met[np.isin(of_met, of_copy[copies[:, 1] == part]), 0])
        if len(partners):
            found.append(Meet(np.stack([partners, np.full_like(partners, part)], 1)))
    labels.copies = []
    return found


def find_families(graph: Graph, order: dict[str, int]) -> list[Family]:
    """All families, in the order of the flow of data. Failures of the trace are noted, nothing is judged."""
    if not len(graph.nodes):
        return []
    component = graph.component
    columns = [component[graph.places(c)] for c in graph.labels.columns]
    edges = [np.stack([c[:-1], c[1:]], 1) for c in columns if len(c) > 1]
    pairs = np.unique(np.concatenate(edges), axis=0) if edges else np.zeros((0, 2), np.int64)
    family = components(len(graph.nodes), pairs[:, 0], pairs[:, 1])[component]
    copied = copied_components(graph)
    reasons = failure_reasons(graph)
    made_hard = set(np.unique(np.concatenate(columns)).tolist()) if columns else set()
    source = graph.source_places(graph.nodes)
    weights = {i for i, s in enumerate(graph.labels.sources) if s.kind in ("weight", "buffer")}
    parts: dict[int, list[int]] = {}
    for unit, place in unique_pairs(component, source)[0].tolist():
        if place in weights:
            parts.setdefault(unit, []).append(place)
    found = []
    by_family = np.argsort(family, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(family[by_family]) != 0])
    for members in np.split(by_family, starts[1:]):
        units = np.unique(component[members])
        if made_hard.isdisjoint(units.tolist()):
            continue
        kinds: dict[tuple[int, ...], list[int]] = {}
        for unit in units.tolist():
            if unit not in copied:
                kinds.setdefault(tuple(parts.get(unit, ())), []).append(unit)
        for kind, same in kinds.items():
            found.append(_family(graph, np.array(same), kind, order, copied, reasons))
    return sorted(found, key=lambda f: f.order)


def _family(
    graph: Graph,
    units: np.ndarray,
    kind: tuple[int, ...],
    order: dict[str, int],
    copied: set[int],
    reasons: dict[int, str],
) -> Family:
    """The family of units that are parts of the same weights (`kind`)."""
    sources = [graph.labels.sources[s] for s in kind]
    names = [s.name for s in sources]
    place = min((order[n] for n in names if n in order), default=len(order))
    elements = sum(s.numel for s in sources if s.kind == "weight" and len(s.shape) > 1)
    made = Family(units, np.arange(len(units)), names, place, elements)
    if copied:
        made.group = _groups(graph, units, copied)
    bad = {int(u): reasons[int(u)] for u in units if int(u) in reasons}
    if bad:
        made.failed, made.failed_units = next(iter(bad.values())), set(bad)
    return made


def failure_reasons(graph: Graph) -> dict[int, str]:
    """Components that cannot be followed, and why."""
    found: dict[int, str] = {}
    for ids, reason, module in graph.labels.failures:
        for component in np.unique(graph.component[graph.places(ids)]):
            found.setdefault(int(component), f"{reason} ({module or 'the model'})")
    return found


def copied_components(graph: Graph) -> set[int]:
    """Components that were decided to be copied to the ranks that need them."""
    found: set[int] = set()
    for source in graph.labels.sources:
        if source.decided is None or not (source.decided[1] == 2).any():
            continue
        low, high = np.searchsorted(graph.nodes, [source.base, source.base + source.numel])
        ids = graph.nodes[low:high]
        dim, marks = source.decided
        found.update(np.unique(graph.component[low:high][marks[source.index(ids, dim)] == 2]).tolist())
    return found


def _groups(graph: Graph, units: np.ndarray, copied: set[int]) -> np.ndarray:
    """For each unit a number that is equal for units which need the same copied components."""
    needs: dict[int, set[int]] = {int(u): set() for u in units}
    for meet in graph.labels.meets:
        pairs = np.unique(
            graph.component[
                np.stack([graph.places(meet.pairs[:, 0]), _soft_places(graph, meet.pairs[:, 1])], 1)
            ],
            axis=0,
        )
        for unit, part in pairs.tolist():
            if unit in needs and part in copied:
                needs[unit].add(part)
    keys = {frozenset(v) if v else frozenset([-1 - u]): None for u, v in needs.items()}
    number = {key: place for place, key in enumerate(keys)}
    return np.array(
        [number[frozenset(needs[int(u)]) if needs[int(u)] else frozenset([-1 - int(u)])] for u in units]
    )


def _soft_places(graph: Graph, ids: np.ndarray) -> np.ndarray:
    """Node numbers of ids that may not be nodes (0 then: a node that is never copied is harmless)."""
    flat = graph.canonical(ids)
    place = np.minimum(np.searchsorted(graph.nodes, flat), len(graph.nodes) - 1)
    return np.where(graph.nodes[place] == flat, place, np.searchsorted(graph.nodes, graph.nodes[0]))


def divide(family: Family, counts: list[int]) -> np.ndarray:
    """The rank of each unit: contiguous runs of the given lengths."""
    return np.repeat(np.arange(len(counts)), counts)


def ranks_of_groups(family: Family, world: int) -> list[int] | None:
    """How many units each rank holds where there are fewer groups than ranks: each rank has units of one
    group.

    None where some group has fewer units than the ranks it would be spread over.
    """
    sizes = np.unique(family.group, return_counts=True)[1]
    spread = [world // len(sizes) + (place < world % len(sizes)) for place in range(len(sizes))]
    if any(size < ranks for size, ranks in zip(sizes, spread, strict=True)):
        return None
    counts: list[int] = []
    for size, ranks in zip(sizes, spread, strict=True):
        counts += [int(size) // ranks + (r < int(size) % ranks) for r in range(ranks)]
    return counts


class Owners:
    """Which ranks hold each id: a bit mask; -1 where nothing was decided (whole)."""

    def __init__(self, graph: Graph, rank_of: dict[int, int], world: int) -> None:
        self.graph = graph
        self.world = world
        count = len(graph.nodes)
        self.mask = np.full(count + 1, -1, dtype=np.int64)
        if count:
            table = np.full(count, -1, dtype=np.int64)
            for unit, rank in rank_of.items():
                table[unit] = 1 << rank
            self.mask[:count] = table[graph.component]
        self.soft: set[int] = set()
        self._soft_ids = self._soft_values = np.zeros(0, np.int64)
        self._copied_masks()
        self._soft_masks()

    def _copied_masks(self) -> None:
        copied = copied_components(self.graph)
        if not copied:
            return
        need: dict[int, int] = {}
        for meet in self.graph.labels.meets:
            hard = self.mask[self.graph.places(meet.pairs[:, 0])]
            soft = self.graph.component[_soft_places(self.graph, meet.pairs[:, 1])]
            for part in copied:
                owners = hard[(soft == part) & (hard >= 0)]
                if len(owners):
                    need[part] = need.get(part, 0) | int(np.bitwise_or.reduce(owners))
        for part, owners in need.items():
            self.mask[:-1][self.graph.component == part] = owners

    def _soft_masks(self) -> None:
        """Soft ids live with the hard ones they meet, if those live in one place; others follow them."""
        labels = self.graph.labels
        hard = [m.pairs for m in labels.meets]
        if not hard:
            return
        joined = np.concatenate(hard)
        owners = self.of(joined[:, 0])
        follow = np.concatenate(labels.soft_meets) if labels.soft_meets else np.zeros((0, 2), np.int64)
        ties = np.concatenate(labels.soft_ties) if labels.soft_ties else np.zeros((0, 2), np.int64)
        nodes = np.unique(np.concatenate([joined[:, 1], follow.reshape(-1), ties.reshape(-1)]))
        ties = np.searchsorted(nodes, ties)
        component = components(len(nodes), ties[:, 0], ties[:, 1])
        place = component[np.searchsorted(nodes, joined[:, 1])]
        follow = np.unique(component[np.searchsorted(nodes, follow)], axis=0)
        follow = follow[follow[:, 0] != follow[:, 1]]
        none = np.iinfo(np.int64).max
        agreed = np.full(len(nodes), -1)
        for _ in range(4):
            low, high = np.full(len(nodes), none), np.full(len(nodes), -1)
            np.minimum.at(low, place, owners)
            np.maximum.at(high, place, owners)
            led = agreed[follow[:, 0]]
            np.minimum.at(low, follow[:, 1], led)
            np.maximum.at(high, follow[:, 1], led)
            now = np.where((low == high) & (high >= 0), high, -1)
            if (now == agreed).all():
                break
            agreed = now
        found = agreed[component]
        self._soft_ids, self._soft_values = nodes[found >= 0], found[found >= 0]
        self.soft = set(self._soft_ids.tolist())

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The masks of ids (any shape); -1 for what is whole."""
        flat = self.graph.canonical(np.abs(ids).reshape(-1))
        out = np.full(len(flat), -1, dtype=np.int64)
        if len(self.graph.nodes):
            place = np.minimum(np.searchsorted(self.graph.nodes, flat), len(self.graph.nodes) - 1)
            hit = self.graph.nodes[place] == flat
            out[hit] = self.mask[place[hit]]
        if self.soft:
            rest = out < 0
            raw = np.abs(ids).reshape(-1)[rest] & ~SHARED
            place = np.minimum(np.searchsorted(self._soft_ids, raw), len(self._soft_ids) - 1)
            hit = self._soft_ids[place] == raw
            out[rest] = np.where(hit, self._soft_values[place], -1)
        return out.reshape(ids.shape)

    def of_labels(self, labels: Tensor) -> np.ndarray:
        """The masks of a label grid; -1 where it is whole."""
        compact = labels
        for dim, stride in enumerate(labels.stride()):
            if stride == 0 and labels.shape[dim] > 1:
                compact = compact.narrow(dim, 0, 1)
        grid = compact.numpy()
        values, inverse = np.unique(grid, return_inverse=True)
        masks = self.of(values)
        masks[values == 0] = -1
        return np.broadcast_to(masks[inverse].reshape(grid.shape), tuple(labels.shape))

    def local(self, labels: Tensor, dim: int, rank: int) -> int:
        """Indices of a dim that a rank holds: those with an element of its own, or with nobody's."""
        if labels.numel() == 0:
            return int(labels.shape[dim])
        masks = np.moveaxis(self.of_labels(labels), dim, 0).reshape(labels.shape[dim], -1)
        mine = ((masks >> rank) & 1).astype(bool) & (masks >= 0)
        return int((mine.any(1) | ~(masks >= 0).any(1)).sum())


def cut_of(source: Source, owners: Owners) -> tuple[int, np.ndarray] | str | None:
    """(dim, mask of ranks per index) of a source's cut; None where it is whole; else why it cannot be cut."""
    graph = owners.graph
    low, high = np.searchsorted(graph.nodes, [source.base, source.base + source.numel])
    hard = graph.nodes[low:high]
    ids = hard[owners.mask[low:high] >= 0]
    undecided = len(ids) < len(hard)
    if owners.soft:
        first, last = np.searchsorted(owners._soft_ids, [source.base, source.base + source.numel])
        ids = np.union1d(ids, owners._soft_ids[first:last])
    if not len(ids):
        return None
    masks = owners.of(ids)
    everyone = (1 << owners.world) - 1
    for dim in range(len(source.shape)):
        if dim in source.tied:
            continue
        index = source.index(ids, dim)
        low_mask = np.full(source.shape[dim], np.iinfo(np.int64).max)
        high_mask = np.full(source.shape[dim], -1)
        np.minimum.at(low_mask, index, masks)
        np.maximum.at(high_mask, index, masks)
        if source.decided is not None and source.decided[0] == dim:
            whole = (source.decided[1] == 1) & (high_mask < 0)
            low_mask[whole] = high_mask[whole] = everyone
        if (high_mask >= 0).all() and (low_mask == high_mask).all():
            if np.bitwise_or.reduce(high_mask) != everyone:
                return (
                    None if not undecided and not len(hard) else f"{source.name} would lie on some ranks only"
                )
            return dim, high_mask
    return f"{source.name} would have to be cut along two dimensions" + (" or in part" if undecided else "")
