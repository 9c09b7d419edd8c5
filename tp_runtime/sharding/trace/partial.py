"""Partial sums: what a row-parallel product leaves on each rank, and where it must be summed over ranks.

A partial sum may pass any linear operation. It is summed where a module returns it: the first module that
does so, as a hook can act there and nowhere inside a forward pass. Where two partial sums are added before
either meets something that is whole, one collective serves both (shared and routed experts of one block);
so a module's return is only noted, and summing is demanded by the first operation that is not linear.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .sources import StorageSet

Point = tuple[str, str]  # module, place in its result ("" or "0", "hidden_states", ...)


@dataclass(eq=False)
class Partial:
    """A partial sum: a product of the weight elements `ids`, or the sum of `terms`; exits: where it was
    returned.
    """

    ids: np.ndarray
    module: str
    terms: tuple[Partial, ...] = ()
    exits: list[Point] = field(default_factory=list)
    biases: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (exits so far, ids)
    batched: bool = False  # of several products at once
    needed_by: str = ""
    needed_in: str = ""
    needed_inside: bool = False  # needed before any module returned it

    def leaves(self) -> list[Partial]:
        """The products this is made of."""
        return [leaf for term in self.terms for leaf in term.leaves()] if self.terms else [self]


class Partials:
    """The partial sums of one trace, by storage."""

    def __init__(self) -> None:
        self.by_storage: dict[
            int, tuple[Partial, object]
        ] = {}  # and the storage, so that its key is not reused
        self.zeros = StorageSet()
        self.demanded: dict[int, Partial] = {}
        self.calls: list[tuple[Point, Partial | None]] = []
        self.created: list[Partial] = []

    def get(self, tensor: Tensor) -> Partial | None:
        """The partial sum this tensor is (a part of)."""
        found = self.by_storage.get(int(tensor.untyped_storage()._cdata))
        return None if found is None else found[0]

    def mark(self, tensor: Tensor, partial: Partial) -> None:
        """This tensor is (in part) a partial sum."""
        storage = tensor.untyped_storage()
        self.by_storage[int(storage._cdata)] = (partial, storage)

    def create(self, tensor: Tensor, ids: np.ndarray, module: str, batched: bool = False) -> None:
        """A row-parallel product."""
        partial = Partial(ids, module, batched=batched)
        self.created.append(partial)
        self.mark(tensor, partial)

    def join(self, terms: list[Partial]) -> Partial:
        """The sum of partial sums."""
        distinct = list(dict.fromkeys(terms))
        if len(distinct) == 1:
            return distinct[0]
        return Partial(np.zeros(0, np.int64), "", tuple(distinct))

    def demand(self, partial: Partial, op: str, module: str) -> None:
        """An operation in a module needs this summed."""
        partial.needed_by = partial.needed_by or op
        partial.needed_in = partial.needed_in or module
        partial.needed_inside |= not partial.exits
        self.demanded[id(partial)] = partial

    def returned(self, module: str, place: str, tensor: Tensor) -> None:
        """A module returns this tensor."""
        partial = self.get(tensor)
        if partial is not None:
            partial.exits.append((module, place))
        self.calls.append(((module, place), partial))

    def resolve(self) -> tuple[set[Point], dict[int, np.ndarray], list[Partial]]:
        """(where to sum, biases by id of their partial sum, partial sums that cannot be summed anywhere)."""
        split: set[int] = set()
        failed: dict[int, Partial] = {}
        while True:
            chosen: dict[int, Partial] = {}
            for partial in self.demanded.values():
                self._choose(partial, split, chosen, failed)
            conflict = self._conflict(chosen)
            if conflict is None:
                break
            if conflict.terms and id(conflict) not in split:
                split.add(id(conflict))
            else:
                failed.update({id(leaf): leaf for leaf in conflict.leaves()})
                break
        points = {partial.exits[0] for partial in chosen.values()}
        for point, returned in self.calls:
            if point in points and (returned is None or not self._summed_at(returned, point, chosen)):
                for other in chosen.values():
                    if other.exits[0] == point:
                        failed.update({id(leaf): leaf for leaf in other.leaves()})
        biases = {}
        for partial in chosen.values():
            found = self._biases(partial)
            if found:
                biases[id(partial)] = np.concatenate(found)
        return points, biases, list(failed.values())

    def _choose(
        self, partial: Partial, split: set[int], chosen: dict[int, Partial], failed: dict[int, Partial]
    ) -> None:
        if partial.exits and not partial.needed_inside and id(partial) not in split:
            chosen[id(partial)] = partial
        elif partial.terms:
            for term in partial.terms:
                self._choose(term, split, chosen, failed)
        else:
            failed[id(partial)] = partial

    def _conflict(self, chosen: dict[int, Partial]) -> Partial | None:
        """A sum that would be summed over ranks a second time, because a term of it is on its own."""

        def below(partial: Partial) -> list[Partial]:
            return [p for term in partial.terms for p in (term, *below(term))]

        for partial in chosen.values():
            if any(id(term) in chosen for term in below(partial)):
                return partial
        counts = Counter(id(leaf) for partial in chosen.values() for leaf in partial.leaves())
        for partial in chosen.values():
            if partial.terms and any(counts[id(leaf)] > 1 for leaf in partial.leaves()):
                return partial
        return None

    @staticmethod
    def _summed_at(partial: Partial, point: Point, chosen: dict[int, Partial]) -> bool:
        return id(partial) in chosen and partial.exits[0] == point

    def _biases(self, partial: Partial) -> list[np.ndarray]:
        """Biases added before the sum over ranks."""
        found = [ids for exits, ids in partial.biases if exits == 0]
        for term in partial.terms:
            found += [ids for _, ids in term.biases]
            found += self._biases(term) if term.terms else []
        return found
