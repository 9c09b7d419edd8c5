"""How many units each rank gets, so that all ranks hold about the same number of weight elements."""

from __future__ import annotations

import numpy as np

from .families import Family, ranks_of_groups
from .rules import VOCAB_UNITS, split_range

# Boundaries between many small units (neurons) lie at multiples of the first of these whose fullest rank
# stays within the given factor of the mean: kernels want rows of 16 bytes, 4-bit formats groups of 32.
MULTIPLES = ((32, 1.03), (16, 1.03), (8, 1.03), (8, 1.15), (4, 1.15), (1, float("inf")))


def assign(families: list[Family], world: int) -> list[list[int]]:
    """Units of each family for each rank, in the families' order.

    Families with few units come first; those with many (neurons of an MLP) even out what they leave. Families
    of the same structure are divided alike, because ranks may keep one integer for all of them.
    """
    classes: dict[tuple[object, ...], list[int]] = {}
    for place, family in enumerate(families):
        classes.setdefault((len(family.units), tuple(family.group.tolist()), family.elements), []).append(
            place
        )
    ordered = sorted(classes.values(), key=lambda places: len(families[places[0]].units))
    loads = np.zeros(world)
    found: list[list[int]] = [[] for _ in families]
    for places in ordered:
        family = families[places[0]]
        weight = family.elements * len(places) / max(len(family.units), 1)
        counts = _counts(family, world, loads, weight)
        loads += np.array(counts) * weight
        for place in places:
            found[place] = counts
    return found


def _counts(family: Family, world: int, loads: np.ndarray, weight: float) -> list[int]:
    """Units of one family a rank. loads: elements that ranks hold already; weight: elements of a unit."""
    units = len(family.units)
    if len(family.sources) == 1:  # a head whose result is gathered
        ranges = split_range(units, [0] * world, 1, VOCAB_UNITS)
        return [stop - start for ((start, stop),) in ranges]
    groups = np.unique(family.group, return_counts=True)[1]
    if len(groups) < units and len(groups) < world:
        spread = ranks_of_groups(family, world)
        assert spread is not None, "such families were judged before"
        return spread
    if len(groups) < units and (groups == groups[0]).all():
        return _fill(units, int(groups[0]), loads, weight)
    mean = (loads.sum() + weight * units) / world
    for multiple, factor in MULTIPLES:
        if units < multiple * world:
            continue
        counts = _fill(units, multiple, loads, weight)
        if (loads + np.array(counts) * weight).max() <= factor * mean or multiple == 1:
            return counts
    raise AssertionError(f"{units} units do not reach {world} ranks")


def _fill(units: int, size: int, loads: np.ndarray, weight: float) -> list[int]:
    """Pieces of `size` units: one a rank, then each to the least loaded; the last may be short."""
    pieces = -(-units // size)
    counts = np.ones(len(loads), dtype=np.int64)
    loaded = loads + weight * size
    for _ in range(pieces - len(loads)):
        rank = int(np.argmin(loaded))
        counts[rank] += 1
        loaded[rank] += weight * size
    counts *= size
    counts[-1] -= pieces * size - units
    return [int(c) for c in counts]
