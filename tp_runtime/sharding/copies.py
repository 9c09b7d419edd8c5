"""Which part of a family to copy to every rank that needs it, so that the rest falls into more units."""

from __future__ import annotations

import numpy as np

from .families import Graph, components
from .trace.grids import unique_pairs


def cheapest_part(
    graph: Graph, apart: np.ndarray, nodes: np.ndarray, pairs: np.ndarray, units: int
) -> dict[int, np.ndarray] | None:
    """Ids, by source, of the cheapest class of components that several others are joined to, and whose
    removal leaves more than `units` components; None where there is none.
    """
    own = apart[nodes]
    members = np.unique(own)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = unique_pairs(both[:, 0], both[:, 1])[0]
    degree = {int(c): 0 for c in members}
    for component in both[:, 0].tolist():
        if component in degree:
            degree[component] += 1
    places = graph.source_places(graph.nodes[nodes])
    cost, kinds = _costs(graph, nodes, own, places)
    classes: dict[tuple[object, ...], list[int]] = {}
    for component in members.tolist():
        if degree[component] >= 2 and kinds[component]:
            classes.setdefault((kinds[component], degree[component], round(cost[component])), []).append(
                component
            )
    ranked = sorted(classes.values(), key=lambda members: sum(cost[c] for c in members))

    def left_without(chosen: list[list[int]]) -> int:
        left = members[~np.isin(members, [c for group in chosen for c in group])]
        inside = np.searchsorted(left, pairs[np.isin(pairs[:, 0], left) & np.isin(pairs[:, 1], left)])
        return len(np.unique(components(len(left), inside[:, 0], inside[:, 1])))

    chosen: list[list[int]] = []
    for group in ranked:
        chosen.append(group)
        if left_without(chosen) > units:
            break
    else:
        return None
    for group in chosen[:-1]:
        if left_without([g for g in chosen if g is not group]) > units:
            chosen = [g for g in chosen if g is not group]
    mask = np.isin(own, [c for group in chosen for c in group])
    ids = graph.nodes[nodes[mask]]
    return {int(p): ids[places[mask] == p] for p in np.unique(places[mask])}


def _costs(
    graph: Graph, nodes: np.ndarray, own: np.ndarray, places: np.ndarray
) -> tuple[dict[int, float], dict[int, tuple[str, ...]]]:
    """For each component: weight elements it stands for, and the matrices it is part of."""
    cost: dict[int, float] = {}
    kinds: dict[int, set[str]] = {}
    for place in np.unique(places):
        source = graph.labels.sources[place]
        mine = own[places == place]
        each = source.numel / max(len(mine), 1)
        matrix = source.kind == "weight" and len(source.shape) > 1
        for component in mine.tolist():
            cost[component] = cost.get(component, 0.0) + each
            kinds.setdefault(component, set())
            if matrix:
                kinds[component].add(source.name)
    return cost, {c: tuple(sorted(k)) for c, k in kinds.items()}
