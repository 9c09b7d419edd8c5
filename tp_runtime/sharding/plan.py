"""A sharding plan: for each weight, which part of which dimension each rank holds. Pure data, no torch.

Styles: "column" (output rows cut; no collective), "row" (input columns cut; the outputs are partial
sums, one all-reduce), "vocab" (embedding or head rows cut), "replicate" (whole on every rank).
A rank's part is a tuple of half-open ranges of the cut dimension, joined in that order (fused weights
such as q|k|v need several; a range that two ranks hold is a copy).
"""

from __future__ import annotations

from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]


def extent(ranges: Ranges) -> int:
    """Number of elements the ranges cover together."""
    return sum(stop - start for start, stop in ranges)


@dataclass(frozen=True)
class WeightPlan:
    """How one parameter divides.

    name: parameter name in the model. shape: of the whole. style: see the module. dim: the cut
    dimension (None for "replicate"). parts: per rank, its ranges of that dimension. unit: what may not
    be cut ("kv group", "neuron", "token"; "" for replicated). reason: why it is replicated.
    """

    name: str
    shape: tuple[int, ...]
    style: str
    dim: int | None = None
    parts: tuple[Ranges, ...] = ()
    unit: str = ""
    reason: str = ""

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


@dataclass(frozen=True)
class Plan:
    """The plans of all parameters of one model over `world_size` ranks, in the model's order."""

    world_size: int
    weights: tuple[WeightPlan, ...]

    def __getitem__(self, name: str) -> WeightPlan:
        return self._by_name[name]

    @property
    def _by_name(self) -> dict[str, WeightPlan]:
        return {weight.name: weight for weight in self.weights}
