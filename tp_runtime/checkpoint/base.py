"""The interface of a checkpoint: what tensors there are, and any rows and columns of one of them.

Names and shapes are those of Hugging Face's checkpoints, whatever the file calls them. A read touches the
bytes of the asked-for slices (and of the storage blocks they cut) and keeps no page of the file mapped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import WeightFormat, WeightLayout
from ..quant.tensor import QuantizedTensor
from ..sharding.plan import Ranges
from .inventory import TensorInfo


class Checkpoint(ABC):
    """Tensors by name, read by slices. `source` says in errors where they come from."""

    source: str

    @abstractmethod
    def names(self) -> Sequence[str]:
        """The names of all tensors, in the file's order."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """What is stored under `name`. Raises KeyError where nothing is."""

    @abstractmethod
    def read(
        self,
        name: str,
        rows: Ranges | None = None,
        cols: Ranges | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The tensor's `rows` (dim 0) and `cols` (dim 1), joined in the order given; None: all of them.

        Returns a new contiguous tensor of `dtype` (a floating one) on `device`. Raises CheckpointError
        where the storage type cannot be read or the file has shrunk since it was opened.
        """

    def block_format(self, name: str) -> WeightFormat | None:
        """The format whose values the stored blocks already are (`read_blocks`), or None."""
        return None

    def read_blocks(self, name: str, rows: Ranges, layout: WeightLayout) -> QuantizedTensor:
        """The stored values, bit for bit, of `rows` and layout.cols.

        layout: what is returned, with format = block_format(name); its rows are `rows`, joined.
        """
        raise NotImplementedError(f"{self.source} stores {name} in no blocks")


def ranges_of(extent: int, ranges: Ranges | None) -> Ranges:
    """`ranges`, or the whole dimension of `extent` where they are None."""
    return ((0, extent),) if ranges is None else ranges
