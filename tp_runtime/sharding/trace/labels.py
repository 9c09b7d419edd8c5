"""Labels: where each element of each tensor of a traced forward pass would live.

Every element of every parameter has an id (its source's base plus its offset). A label is a 64-bit
integer per tensor element:

    0    whole on every rank
    -i   is element i of a parameter, or could be cut where element i is cut (soft)
    +i   is computed only where element i lives (hard): a column of a weight whose input is whole
    +(i | SHARED)   as +i, but element i is copied to every rank that needs it (a KV head with many queries)

Labels belong to storages, not to tensors: a view has the labels of what it views, and a write through a view
is seen by its base, with no rule for either. Parameters need no label storage at all: the id of an element
follows from the strides of the view, so that a matrix of a 70B model costs nothing until some of its elements
are named (`sources.py`). Where an operation ties all elements along a dimension of a parameter, one
representative (index 0) stands for them (`Source.tied`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from .grids import SHARED, pair_up, preferred, restore, squeeze_constant, squeeze_each, unique_pairs
from .sources import BUFFER_LIMIT, DENSE_LIMIT, Source, TooLargeError, WeightView, storage_key


@dataclass
class Tie:
    """Pairs of ids that must live together, and where the operation was that said so.

    kind: "weight" (a column or row of a weight), "along" (one operand, along a dim), "join" (two operands:
    pairs[:, 0] from the first, pairs[:, 1] from the second).
    """

    kind: str
    pairs: np.ndarray
    module: str
    op: str


@dataclass
class Meet:
    """A hard label and a soft one in one operation: the soft element lives where the hard one does."""

    pairs: np.ndarray  # [n, 2]: hard id, soft id


@dataclass
class Misfit:
    """A labelled result and an operand that is not hard: where the result is cut along a dim that the operand
    spans, the operand must be cut alike. operand: its soft or SHARED labels, or None. terms: where it is a
    partial sum, ids of the weights it is made of."""

    labels: Tensor
    operand: Tensor | None
    shape: tuple[int, ...]
    module: str
    op: str
    terms: np.ndarray | None = None


class Labels:
    """The labels of one trace: sources, label storages, and what operations said about ids."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.by_storage: dict[int, Source] = {}
        self.storages: dict[int, tuple[Tensor, int]] = {}
        self.keep: list[object] = []
        self.next_id = 1
        self.ties: list[Tie] = []
        self.meets: list[Meet] = []
        self.soft_ties: list[np.ndarray] = []
        self.soft_meets: list[np.ndarray] = []  # [n, 2]: the second follows the first
        self.copies: list[np.ndarray] = []  # [n, 2]: soft id of one copy, id of the copied part
        self.misfits: list[Misfit] = []
        self.columns: list[np.ndarray] = []  # ids that one operation made hard together
        self.failures: list[tuple[np.ndarray, str, str]] = []  # ids, reason, module
        self.pins: list[np.ndarray] = []  # soft ids that were needed whole
        self.too_large: set[str] = set()
        self.whole: dict[int, str] = {}  # buffers, by storage, that were decided to stay so

    # sources and storages

    def add_source(self, name: str, tensor: Tensor, kind: str) -> Source:
        """Give ids to the elements of a contiguous tensor that owns its storage."""
        source = Source(name, tuple(tensor.shape), self.next_id, kind)
        self.next_id += max(source.numel, 1)
        self.sources.append(source)
        self.by_storage[storage_key(tensor)] = source
        self.keep.append(tensor.untyped_storage())
        return source

    def weight_view(self, tensor: Tensor) -> WeightView | None:
        """The view of a source that this tensor is; None where it is none."""
        source = self.by_storage.get(storage_key(tensor))
        if source is None:
            return None
        return WeightView(source, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def get(self, tensor: Tensor) -> Tensor | None:
        """The labels of a tensor; None where all are 0. Aliases the label storage where that is possible."""
        view = self.weight_view(tensor)
        if view is not None:
            return -view.ids()
        found = self.storages.get(storage_key(tensor))
        if found is None:
            return None
        flat, unit = found
        if tensor.numel() == 0:
            return torch.zeros(tensor.shape, dtype=torch.int64)
        size, stride, offset = tensor.shape, tensor.stride(), int(tensor.storage_offset())
        if tensor.itemsize == unit:
            return flat.as_strided(size, stride, offset)
        if tensor.itemsize > unit:  # complex over real: the real part's label
            ratio = tensor.itemsize // unit
            return flat.as_strided(size, [s * ratio for s in stride], offset * ratio)
        ratio = unit // tensor.itemsize
        where = torch.arange(flat.numel()).repeat_interleave(ratio).as_strided(size, stride, offset)
        return flat[where]

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """Set the labels of a tensor (of its part of the storage)."""
        if tensor.numel() == 0:
            return
        key = storage_key(tensor)
        if key in self.whole:
            self.fail(labels, f"{self.whole[key]}, into which it is written, stays whole", "")
            return
        if key in self.by_storage:
            whole = self.overwrite(tensor, labels)
            if whole is not None:  # from now on it has labels as an activation has
                self.storages[key] = (whole.reshape(-1), tensor.itemsize)
                del self.by_storage[key]
            return
        if key not in self.storages:
            if not bool(labels.any()):
                return
            storage = tensor.untyped_storage()
            self.storages[key] = (
                torch.zeros(storage.nbytes() // tensor.itemsize, dtype=torch.int64),
                tensor.itemsize,
            )
            self.keep.append(storage)
        flat, unit = self.storages[key]
        assert unit == tensor.itemsize, "labels are written in the unit they were created in"
        flat.as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset())).copy_(labels)

    # what operations say

    def overwrite(self, tensor: Tensor, labels: Tensor) -> Tensor | None:
        """What is written into a view of a buffer (a cache of keys) says where the buffer's elements live:
        with what is written there, and along dims where that is all the same, together. The labels that the
        whole buffer then has, in its own shape; None where nothing hard is written.
        """
        view, hard = self.weight_view(tensor), labels.clamp_min(0)
        source = None if view is None else view.source
        if view is None or source is None or source.kind != "buffer" or not bool(hard.any()):
            return None
        if source.numel > BUFFER_LIMIT:
            raise TooLargeError(source)
        own = -source.apply_decisions(torch.arange(source.numel) + source.base).view(source.shape)
        place = {stride: dim for dim, stride in enumerate(view.strides) if view.sizes[dim] > 1}
        dims = [place.get(s) if n > 1 else None for s, n in zip(source.strides, source.shape, strict=True)]
        if len(place) == sum(dim is not None for dim in dims):  # the buffer's own dims, or some of them
            for own_dim, dim in enumerate(dims):
                if dim is None or not _varies(hard, dim):
                    source.tied.add(own_dim)
                    if dim is not None:
                        hard, view = hard.amax(dim, keepdim=True), view.narrow(dim, 0, 1)
            self.meet(hard, -view.ids())
            there = [dim for dim in dims if dim is not None]
            rest = [dim for dim in range(hard.dim()) if dim not in there]
            hard = hard.permute(*there, *rest).reshape([1 if d is None else hard.shape[d] for d in dims])
            if all(n in (1, m) for n, m in zip(hard.shape, source.shape, strict=True)):
                return torch.where(hard > 0, hard, own)
        else:
            self.meet(hard, -view.ids())
        own.view(-1).as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset())).copy_(labels)
        return own

    def tie_along(self, labels: Tensor, dims: list[int], module: str, op: str) -> Tensor:
        """Tie all labels along dims, and return one of them for each of the rest (dims kept, size 1)."""
        shape = list(labels.shape)
        for dim in dims:
            shape[dim] = 1
        return self._tied(squeeze_constant([labels])[0], dims, module, op).expand(shape)

    def _tied(self, labels: Tensor, dims: list[int], module: str, op: str) -> Tensor:
        hard = labels > 0
        if bool(hard.any()):
            out = restore(preferred(labels.clamp_min(0)).amax(dims, keepdim=True))
            self._tie_pairs("along", torch.where(hard, labels, 0), out, module, op)
            soft = (labels < 0) & (out > 0)
            if bool(soft.any()):
                self.meet(out, torch.where(soft, labels, 0))
            return out
        magnitude = labels.abs()
        out = magnitude.amax(dims, keepdim=True)
        pairs = pair_up(magnitude, out)
        if len(pairs):
            self.soft_ties.append(pairs)
        return -out

    def _tie_pairs(self, kind: str, a: Tensor, b: Tensor, module: str, op: str) -> None:
        """Ties of two label grids; a SHARED label only meets one that is not."""
        pairs = pair_up(a, b)
        if not len(pairs):
            return
        shared = pairs >= SHARED
        plain = ~(shared[:, 0] ^ shared[:, 1])
        if plain.any():
            self.ties.append(Tie(kind, pairs[plain] & ~SHARED, module, op))
        mixed = pairs[~plain]
        if len(mixed):
            first = np.where(mixed[:, 0] >= SHARED, mixed[:, 1], mixed[:, 0])
            second = np.where(mixed[:, 0] >= SHARED, mixed[:, 0], mixed[:, 1])
            self.meets.append(Meet(np.stack([first, second & ~SHARED], 1)))

    def meet(self, hard: Tensor, soft: Tensor) -> None:
        """Soft labels (negative) in one operation with hard ones."""
        pairs = pair_up(hard, -soft, same=True)
        if len(pairs):
            self.meets.append(Meet(pairs & ~SHARED))

    def combine(
        self,
        operands: list[Tensor | None],
        shapes: list[tuple[int, ...]],
        shape: tuple[int, ...],
        module: str,
        op: str,
        terms: list[np.ndarray | None] | None = None,
    ) -> Tensor | None:
        """The labels of an element-wise result. operands: labels or None; shapes: the operands' own; terms:
        ids of the weights of those that are partial sums.
        """
        known = [labels for labels in operands if labels is not None]
        present = squeeze_each(known, len(shape))
        if not present:
            return None
        is_hard = {id(a): bool((b > 0).any()) for a, b in zip(known, present, strict=True)}
        small = tuple(max(sizes) for sizes in zip(*(labels.shape for labels in present), strict=True))
        hard = [b.clamp_min(0) for a, b in zip(known, present, strict=True) if is_hard[id(a)]]
        if hard:
            out = hard[0].expand(small)
            for grid in hard[1:]:
                out = self._join(out, grid.expand(small), module, op)
            for grid in present:
                if bool((grid < 0).any()):
                    self.meet(out, grid.clamp_max(0))
        else:
            out = self._combine_soft(present, small)
        out = out.expand(shape)
        for labels, own, ids in zip(operands, shapes, terms or [None] * len(shapes), strict=True):
            if prod(own) > 1 and (labels is None or not is_hard[id(labels)]):
                self.misfits.append(Misfit(out, labels, own, module, op, ids))
        return out

    def _join(self, a: Tensor, b: Tensor, module: str, op: str) -> Tensor:
        """Hard labels of a result of two operands. Where both have one, the finer; where each label of one
        side is met by several of the other, new ids, so that it stays known which elements came from which
        pair.
        """
        out = torch.where(a > 0, a, b)
        both = (a > 0) & (b > 0) & (a != b)
        if not bool(both.any()):
            return out
        self._tie_pairs("join", a, b, module, op)
        mixed = both & ((a >= SHARED) ^ (b >= SHARED))
        out = torch.where(mixed, torch.minimum(a, b), out)
        if bool(mixed.any()):
            for side in (a, b):
                if bool((side >= SHARED).any()):
                    self.misfits.append(Misfit(out, side, tuple(side.shape), module, op))
        plain = both & ~mixed
        if not bool(plain.any()):
            return out
        flag = int(a[plain][0]) & SHARED
        pairs, inverse = unique_pairs(a[plain].numpy() & ~SHARED, b[plain].numpy() & ~SHARED)
        if len(pairs) == len(np.unique(pairs[:, 0])):
            return out
        if len(pairs) == len(np.unique(pairs[:, 1])):
            return torch.where(plain, b, out)
        source = self.add_virtual(f"{op}@{module}", len(pairs))
        new = np.arange(len(pairs)) + source.base
        for column in (0, 1):
            self.ties.append(Tie("join", np.stack([new, pairs[:, column]], 1), module, op))
        out = out.clone()
        out[plain] = torch.from_numpy((new | flag)[inverse])
        return out

    def put_copies(self, out: Tensor, labels: Tensor, name: str) -> None:
        """Labels of an expanded tensor of which parts are copied to several ranks: every copy of a part may
        live elsewhere, with the query head that reads it. labels: expanded to out's shape; out owns its
        storage.
        """
        steps = torch.zeros(out.shape, dtype=torch.int64)
        for dim, stride in enumerate(labels.stride()):
            if stride == 0 and out.shape[dim] > 1:
                index = torch.arange(out.shape[dim]).view([-1 if d == dim else 1 for d in range(out.dim())])
                steps = steps * out.shape[dim] + index
        shared = labels >= SHARED
        pairs, inverse = unique_pairs(labels[shared].numpy() & ~SHARED, steps[shared].numpy())
        source = self.add_virtual(name, len(pairs))
        source.kind = "new"
        new = np.arange(len(pairs)) + source.base
        self.copies.append(np.stack([new, pairs[:, 0]], 1))
        made = torch.where(shared, 0, labels)
        made[shared] = torch.from_numpy(-new[inverse])
        self.put(out, made)

    def add_virtual(self, name: str, count: int) -> Source:
        """Ids for results that belong to no tensor of the model."""
        source = Source(name, (count,), self.next_id, "virtual")
        self.next_id += count
        self.sources.append(source)
        return source

    def _combine_soft(self, present: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Soft labels of an element-wise result: operands of its full extent go together; a broadcast one (a
        norm's weight shared by heads) only follows them."""
        extent = prod(shape)
        full = [-labels for labels in present if labels.numel() == extent]
        leading = full or [-labels for labels in present]
        out = torch.zeros(shape, dtype=torch.int64)
        for labels in leading:
            out = torch.maximum(out, labels.expand(shape))
        for labels in leading:
            pairs = pair_up(labels, out)
            if len(pairs):
                self.soft_ties.append(pairs)
        for labels in present if full else []:
            if labels.numel() != extent:
                pairs = pair_up(out, -labels)
                if len(pairs):
                    self.soft_meets.append(pairs)
        return -out

    def tie_weight(self, view: WeightView, dim: int, module: str, op: str) -> WeightView:
        """Tie a weight's elements along dim; the view at index 0 of it (size 1)."""
        dim %= len(view.sizes)
        first = view.narrow(dim, 0, 1)
        if view.sizes[dim] == 1:
            return first
        if view.dense is not None:
            pairs = pair_up(
                view.dense, first.dense.expand(view.sizes) if first.dense is not None else view.dense
            )
            if len(pairs):
                self.ties.append(Tie("weight", pairs & ~SHARED, module, op))
            return first
        source = view.source
        assert source is not None, "a view without a source is dense"
        whole = view.source_dim(dim)
        if whole is not None:
            source.tied.add(whole)
        elif view.numel <= DENSE_LIMIT:
            pairs = pair_up(view.ids(), first.ids())
            if len(pairs):
                self.ties.append(Tie("weight", pairs & ~SHARED, module, op))
        else:
            source.tied.update(range(len(source.shape)))
        return first

    def fail(self, labels: Tensor | None, reason: str, module: str) -> None:
        """The hard labels here cannot be followed: what they stand for stays whole."""
        if labels is None:
            return
        labels = squeeze_constant([labels])[0]
        hard = labels[labels > 0]
        if hard.numel():
            self.failures.append((torch.unique(hard).numpy() & ~SHARED, reason, module))

    def pin(self, labels: Tensor | None) -> None:
        """The soft labels here are needed whole."""
        if labels is None:
            return
        labels = squeeze_constant([labels])[0]
        soft = labels[labels < 0]
        if soft.numel():
            self.pins.append(torch.unique(-soft).numpy())


def _varies(hard: Tensor, dim: int) -> bool:
    """Whether positive labels differ along dim; zeros do not count."""
    largest, smallest = hard.amax(dim), torch.where(hard > 0, hard, SHARED << 1).amin(dim)
    return bool(((largest > 0) & (largest != smallest)).any())
