"""From labels to cuts: units that may not be divided, families of units, and which rank holds which.

Units are the connected components of the tied ids. Units whose labels one product made together (the columns
of one weight) form a family: all of it is divided, or none. A unit with copied parts (a KV head that many
query heads read) falls into smaller units that all need the part.

Owners are bit masks of ranks: one bit for a unit, several for a copied part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from .trace.grids import SHARED, unique_pairs
from .trace.labels import Labels, Meet, Tie
from .trace.sources import COPIED, Source


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
        self._tied = np.array([bool(s.tied) for s in labels.sources], dtype=bool)
        labels.meets += _meets_of_copies(labels)
        said = [t.pairs.reshape(-1) for t in labels.ties] + labels.columns
        said += [m.pairs[:, 0] for m in labels.meets] + [f[0] for f in labels.failures]
        ids = np.concatenate(said) if said else np.zeros(0, np.int64)
        self.nodes, where = np.unique(self.canonical(ids), return_inverse=True)
        parts = np.split(where.reshape(-1), np.cumsum([len(part) for part in said])[:-1]) if said else []
        ends = np.cumsum([len(labels.ties), len(labels.columns), len(labels.meets)]).tolist()
        self.tie_nodes = [part.reshape(-1, 2) for part in parts[: ends[0]]]
        self.column_nodes = parts[ends[0] : ends[1]]
        self.meet_nodes = parts[ends[1] : ends[2]]
        self.failure_nodes = parts[ends[2] :]
        self.component = self._join([True] * len(labels.ties))

    def canonical(self, ids: np.ndarray) -> np.ndarray:
        """Ids with the representatives of their tied dims."""
        ids = ids & ~SHARED
        if not len(ids) or not self._tied.any():
            return ids
        which = self.source_places(ids)
        tied = np.flatnonzero(self._tied[which])
        if not len(tied):
            return ids
        out = ids.copy()
        tied = tied[np.argsort(which[tied], kind="stable")]
        starts = np.flatnonzero(np.diff(which[tied])) + 1
        for same in np.split(tied, starts):
            out[same] = self.labels.sources[which[same[0]]].canonical(ids[same])
        return out

    @cached_property
    def apart(self) -> np.ndarray:
        """Components of what no operation on two operands joined."""
        return self.without({"join"})

    @cached_property
    def met_components(self) -> np.ndarray:
        """[n, 2]: the components of what is hard and of the soft part that it meets, each pair once."""
        if not self.labels.meets:
            return np.zeros((0, 2), np.int64)
        soft = _soft_places(self, np.concatenate([m.pairs[:, 1] for m in self.labels.meets]))
        hard = np.concatenate(self.meet_nodes)
        return unique_pairs(self.component[hard], self.component[soft])[0]

    @cached_property
    def copied(self) -> set[int]:
        """Components that were decided to be copied to the ranks that need them."""
        found: set[int] = set()
        for source in self.labels.sources:
            if source.decided is None or not (source.decided[1] == COPIED).any():
                continue
            low, high = np.searchsorted(self.nodes, [source.base, source.base + source.numel])
            dim, marks = source.decided
            marked = marks[source.index(self.nodes[low:high], dim)] == COPIED
            found.update(np.unique(self.component[low:high][marked]).tolist())
        return found

    @cached_property
    def failure_reasons(self) -> dict[int, str]:
        """Components that cannot be followed, and why."""
        found: dict[int, str] = {}
        for (_, reason, module), nodes in zip(self.labels.failures, self.failure_nodes, strict=True):
            for component in np.unique(self.component[nodes]).tolist():
                found.setdefault(component, f"{reason} ({module or 'the model'})")
        return found

    def ties_of(self, nodes: np.ndarray) -> list[Tie]:
        """The ties whose first elements are among some nodes."""
        inside = np.zeros(len(self.nodes), dtype=bool)
        inside[nodes] = True
        first, place = self._first_nodes
        return [self.labels.ties[p] for p in np.unique(place[inside[first]]).tolist()]

    @cached_property
    def _first_nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """(the first node of each tied pair, the place of its tie)."""
        if not self.tie_nodes:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        counts = [len(pairs) for pairs in self.tie_nodes]
        return np.concatenate([p[:, 0] for p in self.tie_nodes]), np.repeat(np.arange(len(counts)), counts)

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
    parts = unique_pairs(of_copy, copies[:, 1])[0]
    partners = unique_pairs(of_met, met[:, 0])[0]  # sorted by component
    first = np.searchsorted(partners[:, 0], parts[:, 0], side="left")
    count = np.searchsorted(partners[:, 0], parts[:, 0], side="right") - first
    place = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
    labels.copies = []
    if not len(place):
        return []
    return [Meet(unique_pairs(partners[place, 1], np.repeat(parts[:, 1], count))[0])]


def find_families(graph: Graph, order: dict[str, int]) -> list[Family]:
    """All families, in the order of the flow of data. Failures of the trace are noted, nothing is judged."""
    if not len(graph.nodes):
        return []
    component = graph.component
    columns = [component[c] for c in graph.column_nodes]
    edges = [np.stack([c[:-1], c[1:]], 1) for c in columns if len(c) > 1]
    both = np.concatenate(edges) if edges else np.zeros((0, 2), np.int64)
    pairs = unique_pairs(both[:, 0], both[:, 1])[0]
    family = components(len(graph.nodes), pairs[:, 0], pairs[:, 1])[component]
    needs = _needs(graph)
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
            if unit not in graph.copied:
                kinds.setdefault(tuple(parts.get(unit, ())), []).append(unit)
        for kind, same in kinds.items():
            found.append(_family(graph, np.array(same), kind, order, needs))
    return sorted(found, key=lambda f: f.order)


def _family(
    graph: Graph,
    units: np.ndarray,
    kind: tuple[int, ...],
    order: dict[str, int],
    needs: dict[int, frozenset[int]],
) -> Family:
    """The family of units that are parts of the same weights (`kind`). needs: as of `_needs`."""
    sources = [graph.labels.sources[s] for s in kind]
    names = [s.name for s in sources]
    place = min((order[n] for n in names if n in order), default=len(order))
    elements = sum(s.numel for s in sources if s.kind == "weight" and len(s.shape) > 1)
    made = Family(units, np.arange(len(units)), names, place, elements)
    if needs:
        made.group = _groups(units, needs)
    reasons = graph.failure_reasons
    bad = {int(u): reasons[int(u)] for u in units if int(u) in reasons}
    if bad:
        made.failed, made.failed_units = next(iter(bad.values())), set(bad)
    return made


def _needs(graph: Graph) -> dict[int, frozenset[int]]:
    """The copied components that a component meets."""
    found: dict[int, set[int]] = {}
    for unit, part in graph.met_components.tolist() if graph.copied else []:
        if part in graph.copied:
            found.setdefault(unit, set()).add(part)
    return {unit: frozenset(parts) for unit, parts in found.items()}


def _groups(units: np.ndarray, needs: dict[int, frozenset[int]]) -> np.ndarray:
    """For each unit a number that is equal for units which need the same copied components."""
    number: dict[frozenset[int], int] = {}
    keys = [needs.get(u, frozenset([-1 - u])) for u in units.tolist()]
    return np.array([number.setdefault(key, len(number)) for key in keys])


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
            self._of_component = table
        self.soft = self._soft_values = np.zeros(0, np.int64)
        self._copied_masks()
        self._soft_masks()

    def _copied_masks(self) -> None:
        """Copied parts lie on the ranks of all that meet them."""
        if not self.graph.copied:
            return
        hard, soft = self.graph.met_components.T
        owners = self._of_component[hard]
        wanted = np.isin(soft, list(self.graph.copied)) & (owners >= 0)
        need = np.zeros(len(self.graph.nodes), dtype=np.int64)
        np.bitwise_or.at(need, soft[wanted], owners[wanted])
        found = need[self.graph.component]
        self.mask[:-1] = np.where(found > 0, found, self.mask[:-1])

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
        follow = component[np.searchsorted(nodes, follow)]
        follow = unique_pairs(follow[:, 0], follow[:, 1])[0]
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
        self.soft, self._soft_values = nodes[found >= 0], found[found >= 0]

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The masks of ids (any shape); -1 for what is whole."""
        flat = self.graph.canonical(np.abs(ids).reshape(-1))
        out = np.full(len(flat), -1, dtype=np.int64)
        if len(self.graph.nodes):
            place = np.minimum(np.searchsorted(self.graph.nodes, flat), len(self.graph.nodes) - 1)
            hit = self.graph.nodes[place] == flat
            out[hit] = self.mask[place[hit]]
        if len(self.soft):
            rest = out < 0
            raw = np.abs(ids).reshape(-1)[rest] & ~SHARED
            place = np.minimum(np.searchsorted(self.soft, raw), len(self.soft) - 1)
            hit = self.soft[place] == raw
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

    def local_sizes(self, labels: Tensor, dim: int) -> list[int]:
        """Indices of a dim that each rank holds: those with an element of its own, or with nobody's."""
        if labels.numel() == 0:
            return [int(labels.shape[dim])] * self.world
        masks = np.moveaxis(self.of_labels(labels), dim, 0).reshape(labels.shape[dim], -1)
        decided = masks >= 0
        nobodys = int((~decided.any(1)).sum())
        owners = np.bitwise_or.reduce(np.where(decided, masks, 0), axis=1)
        return [int(((owners >> rank) & 1).sum()) + nobodys for rank in range(self.world)]


def cut_of(source: Source, owners: Owners) -> tuple[int, np.ndarray] | str | None:
    """(dim, mask of ranks per index) of a source's cut; None where it is whole; else why it cannot be cut."""
    graph = owners.graph
    low, high = np.searchsorted(graph.nodes, [source.base, source.base + source.numel])
    hard = graph.nodes[low:high]
    ids = hard[owners.mask[low:high] >= 0]
    undecided = len(ids) < len(hard)
    if len(owners.soft):
        first, last = np.searchsorted(owners.soft, [source.base, source.base + source.numel])
        ids = np.union1d(ids, owners.soft[first:last])
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
