"""What labels come from: tensors whose elements have ids, views of them, and storages as such."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from .grids import SHARED

DENSE_LIMIT = 1 << 22  # elements of a parameter whose labels may be written out one by one
BUFFER_LIMIT = 1 << 24  # elements of a buffer that may be written into
NORMAL, REPLICATED, COPIED = 0, 1, 2  # what was decided for an index of a source


class TooLargeError(Exception):
    """Labels of a very large parameter would have to be written out; it stays whole instead."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.name)
        self.source = source


@dataclass
class Source:
    """Something whose elements can be cut: a parameter, a module's argument or result, a new tensor.

    base: id of its first element. kind: "weight" or "buffer" (of the model), "argument", "result" (of a
    module), "new". tied: dims along which all elements go together. decided: (dim, array of NORMAL,
    REPLICATED, COPIED).
    """

    name: str
    shape: tuple[int, ...]
    base: int
    kind: str
    tied: set[int] = field(default_factory=set)
    decided: tuple[int, np.ndarray] | None = None

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        return tuple(prod(self.shape[d + 1 :]) for d in range(len(self.shape)))

    def index(self, ids: np.ndarray, dim: int) -> np.ndarray:
        """The index along `dim` of each id."""
        return (ids - self.base) // self.strides[dim] % self.shape[dim]

    def canonical(self, ids: np.ndarray) -> np.ndarray:
        """Each id's representative under the tied dims."""
        for dim in self.tied:
            ids = ids - self.index(ids, dim) * self.strides[dim]
        return ids

    def apply_decisions(self, labels: Tensor) -> Tensor:
        """Positive ids of this source, with replicated ones set to 0 and copied ones marked SHARED."""
        if self.decided is None or labels.numel() == 0:
            return labels
        dim, marks = self.decided
        mark = torch.from_numpy(marks)[(labels - self.base) // self.strides[dim] % self.shape[dim]]
        return torch.where(mark == REPLICATED, 0, torch.where(mark == COPIED, labels | SHARED, labels))


@dataclass
class WeightView:
    """A parameter's view as a grid of ids, by strides; or, where several parameters were joined, written out.

    dense: positive ids (0 where whole), or None.
    """

    source: Source | None
    sizes: tuple[int, ...]
    strides: tuple[int, ...] = ()
    offset: int = 0
    dense: Tensor | None = None

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def narrow(self, dim: int, start: int, length: int) -> WeightView:
        """The view's indices [start, start + length) of dim."""
        if self.dense is not None:
            part = self.dense.narrow(dim, start, length)
            return WeightView(None, tuple(part.shape), dense=part)
        dim %= len(self.sizes)
        sizes = (*self.sizes[:dim], length, *self.sizes[dim + 1 :])
        return WeightView(self.source, sizes, self.strides, self.offset + start * self.strides[dim])

    def source_dim(self, dim: int) -> int | None:
        """The source's dim that this dim of the view is, all of it; None where it is none."""
        if self.source is None:
            return None
        dims = list(zip(self.source.strides, self.source.shape, strict=True))
        wanted = (self.strides[dim], self.sizes[dim])
        return dims.index(wanted) if wanted in dims else None

    def squeeze(self, dim: int) -> WeightView:
        """Without a dimension of size 1."""
        if self.dense is not None:
            part = self.dense.squeeze(dim)
            return WeightView(None, tuple(part.shape), dense=part)
        return WeightView(
            self.source,
            self.sizes[:dim] + self.sizes[dim + 1 :],
            self.strides[:dim] + self.strides[dim + 1 :],
            self.offset,
        )

    def unsqueeze(self) -> WeightView:
        """With a leading dimension of size 1."""
        if self.dense is not None:
            return WeightView(None, (1, *self.sizes), dense=self.dense.unsqueeze(0))
        return WeightView(self.source, (1, *self.sizes), (0, *self.strides), self.offset)

    def transpose(self) -> WeightView:
        """With the last two dimensions exchanged."""
        if self.dense is not None:
            part = self.dense.transpose(-1, -2)
            return WeightView(None, tuple(part.shape), dense=part)
        *sizes, m, n = self.sizes
        *strides, a, b = self.strides
        return WeightView(self.source, (*sizes, n, m), (*strides, b, a), self.offset)

    def ids(self) -> Tensor:
        """The positive labels of all elements (decisions applied). Raises TooLargeError."""
        if self.dense is not None:
            return self.dense
        assert self.source is not None, "a view without a source is dense"
        if self.numel > (BUFFER_LIMIT if self.source.kind == "buffer" else DENSE_LIMIT):
            raise TooLargeError(self.source)
        grid = torch.full([1] * len(self.sizes), self.offset + self.source.base, dtype=torch.int64)
        for dim, (size, stride) in enumerate(zip(self.sizes, self.strides, strict=True)):
            shape = [size if d == dim else 1 for d in range(len(self.sizes))]
            grid = grid + torch.arange(size).view(shape) * stride
        return self.source.apply_decisions(grid.expand(self.sizes))

    @property
    def shared_dims(self) -> tuple[int, ...]:
        """Dims along which the same elements repeat (an expanded weight)."""
        if self.dense is not None:
            return ()
        return tuple(
            d for d, (n, s) in enumerate(zip(self.sizes, self.strides, strict=True)) if s == 0 and n > 1
        )


def storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class StorageSet:
    """Storages with a property. Members are kept alive, so that no later tensor is taken for one of them."""

    def __init__(self) -> None:
        self._kept: dict[int, object] = {}

    def add(self, tensor: Tensor) -> None:
        """Add a tensor's storage."""
        self._kept[storage_key(tensor)] = tensor.untyped_storage()

    def discard(self, tensor: Tensor) -> None:
        """Remove a tensor's storage, if it is there."""
        self._kept.pop(storage_key(tensor), None)

    def __contains__(self, tensor: Tensor) -> bool:
        return storage_key(tensor) in self._kept
