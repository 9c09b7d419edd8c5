"""Every rank's share of a model, read by slices and quantised as it is read.

Each rank walks the same list in the same order, reads only its own rows and columns (and for a group or
storage block that the cut goes through, the rest of that), rounds them in pieces of some millions of
values, hands the finished weight over and forgets it. So its peak memory is its share so far, one weight,
and a fixed amount of working memory.

Quantised values are those of the whole weight at every world size. Group-wise formats see whole groups,
because the covering columns are read. Per-channel int8 needs the largest magnitude of the whole row: ranks
that hold pieces of the same rows (row-parallel weights) combine theirs, piece by piece, with an all-reduce
of max, so all ranks must walk in step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..collectives import all_reduce
from ..errors import CheckpointError, ShardingError
from ..layout import WeightFormat, WeightLayout
from ..quant.rounding import quantize, row_absmax
from ..quant.tensor import QuantizedTensor
from ..sharding.plan import Ranges, WeightPlan, extent
from .base import Checkpoint
from .inventory import check_tensors

PIECE_VALUES = 1 << 20  # values worked on at a time: 4 MB in fp32, some five such buffers while rounding
GPU_PIECE_VALUES = 1 << 25  # the same on a GPU, which needs millions of values to be busy


@dataclass(frozen=True)
class WeightRequest:
    """One parameter to load.

    name: the checkpoint's name for it. plan: what each rank holds of it. format: how to quantise it, or
    None. dtype: of a plain weight (a quantised one has its own). A checkpoint whose stored blocks have the
    bits and group size of `format` keeps their values, and with them its scheme, symmetric or not.
    """

    name: str
    plan: WeightPlan
    format: WeightFormat | None
    dtype: torch.dtype


Install = Callable[[str, Tensor | QuantizedTensor], None]


def load_weights(
    checkpoint: Checkpoint,
    requests: Sequence[WeightRequest],
    group: dist.ProcessGroup | None,
    rank: int,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
    install: Install,
    may_remain: Callable[[str], bool] = lambda name: False,
) -> None:
    """Load this rank's part of every request, in order, calling install(name, weight) for each.

    group: all ranks of the plan (None: one rank), which must pass the same requests. progress: show a
    bar in bytes on rank 0's stderr, where that is a terminal. may_remain: names of the checkpoint that
    nothing asks for on purpose (layers that were cut off, say).
    Raises CheckpointError before anything is read where tensors are missing, surplus or of another shape,
    and ShardingError for a plan that the format cannot follow.
    """
    held = {name: checkpoint.info(name) for name in checkpoint.names()}
    wanted = {request.name: request.plan.shape for request in requests}
    check_tensors(checkpoint.source, held, wanted, may_remain)
    shares = [_Share(checkpoint, request, group, rank, device) for request in requests]
    total = sum(share.stored_bytes for share in shares)
    hide = None if progress and rank == 0 else True  # None: hidden where stderr is no terminal
    with tqdm(
        total=total, desc="weights", unit="B", unit_scale=True, delay=1.0, disable=hide, leave=False
    ) as bar:
        for share in shares:
            try:
                weight = share.load()
            except CheckpointError as error:
                raise CheckpointError(
                    f"{checkpoint.source}: tensor {share.request.name!r}: {error}"
                ) from error
            install(share.request.name, weight)
            del weight
            bar.update(share.stored_bytes)


class _Share:
    """What one rank loads of one request."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        request: WeightRequest,
        group: dist.ProcessGroup | None,
        rank: int,
        device: torch.device | str,
    ) -> None:
        self.checkpoint, self.request, self.group, self.device = checkpoint, request, group, device
        self.plan = plan = request.plan
        part = plan.part(rank)
        self.rows: Ranges = part if plan.dim == 0 and part is not None else ((0, plan.shape[0]),)
        self.cols: Ranges | None = None
        if len(plan.shape) == 2:
            self.cols = part if plan.dim == 1 and part is not None else ((0, plan.shape[1]),)
        if request.format is not None and (self.cols is None or len(self.cols) != 1):
            raise ShardingError(
                f"{plan.name} of shape {list(plan.shape)} cannot be loaded as {request.format.name}: "
                f"a rank holds {len(self.cols or ())} ranges of its input columns, and a quantised weight "
                f"takes one; load it with --quant none"
            )

    @property
    def stored_bytes(self) -> int:
        """Bytes of the checkpoint that this share covers."""
        whole = max(1, self.plan.shape[0] * (self.plan.shape[1] if self.cols else 1))
        held = extent(self.rows) * (extent(self.cols) if self.cols else 1)
        return self.checkpoint.info(self.request.name).nbytes * held // whole

    def load(self) -> Tensor | QuantizedTensor:
        form = self.request.format
        if form is None:
            return self._plain()
        stored = self.checkpoint.block_format(self.request.name)
        if stored is not None and (stored.bits, stored.group_size) == (form.bits, form.group_size):
            return self._stored_blocks(stored)
        return self._rounded(form)

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """(place here, first row, last row + 1) of pieces of this share, alike on ranks that share rows."""
        plan, columns = self.plan, self.plan.shape[1] if self.cols else 1
        if plan.dim == 1:
            columns = max(extent(part) for part in plan.parts)
        on_gpu = torch.device(self.device).type == "cuda"
        step = max(1, (GPU_PIECE_VALUES if on_gpu else PIECE_VALUES) // max(columns, 1))
        at = 0
        for start, stop in self.rows:
            for row in range(start, stop, step):
                last = min(row + step, stop)
                yield at, row, last
                at += last - row

    def _plain(self) -> Tensor:
        shape = (extent(self.rows),) if self.cols is None else (extent(self.rows), extent(self.cols))
        out = torch.empty(shape, dtype=self.request.dtype, device=self.device)
        for at, start, stop in self._pieces():
            out[at : at + stop - start] = self._read((start, stop), self.cols, self.request.dtype)
        return out

    def _read(self, rows: tuple[int, int], cols: Ranges | None, dtype: torch.dtype) -> Tensor:
        return self.checkpoint.read(self.request.name, (rows,), cols, dtype, device=self.device)

    def _layout(self, form: WeightFormat) -> WeightLayout:
        """Of this rank's part; rows of several ranges are joined, and described as a weight of their own."""
        assert self.cols is not None, f"{self.plan.name} has one dimension"
        if len(self.rows) == 1:
            return WeightLayout((self.plan.shape[0], self.plan.shape[1]), self.rows[0], self.cols[0], form)
        held = extent(self.rows)
        return WeightLayout((held, self.plan.shape[1]), (0, held), self.cols[0], form)

    def _stored_blocks(self, stored: WeightFormat) -> QuantizedTensor:
        layout = self._layout(stored)
        out = QuantizedTensor.empty(layout, self.device)
        for at, start, stop in self._pieces():
            part = replace(layout, rows=(layout.rows[0] + at, layout.rows[0] + at + stop - start))
            out.put_rows(at, self.checkpoint.read_blocks(self.request.name, ((start, stop),), part))
        return out

    def _rounded(self, form: WeightFormat) -> QuantizedTensor:
        layout = self._layout(form)
        out = QuantizedTensor.empty(layout, self.device)
        cols = layout.cols if form.group_size is None else layout.covering_cols
        for at, start, stop in self._pieces():
            part = replace(layout, rows=(layout.rows[0] + at, layout.rows[0] + at + stop - start))
            values = self._read((start, stop), (cols,), torch.float32)
            absmax = self._row_absmax(values) if form.group_size is None else None
            out.put_rows(at, quantize(values, part, absmax))
        return out

    def _row_absmax(self, values: Tensor) -> Tensor:
        """The largest magnitude of each whole row, also where other ranks hold the rest of it."""
        local = row_absmax(values)
        if self.plan.dim != 1 or self.group is None:
            return local
        return all_reduce(local, self.group, "max")
