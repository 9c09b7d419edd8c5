"""Slices of safetensors files, read through the safetensors library.

The library maps a file, and the pages it touches count as this process's memory until the mapping goes;
so a read opens the file, copies a bounded piece and lets go, again and again. Headers are checked when
the checkpoint is opened, so that a truncated file is refused by name and not by a bus error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..sharding.plan import Ranges, extent
from .base import Checkpoint, ranges_of
from .inventory import TensorInfo
from .safetensors_header import SafetensorsEntry, read_safetensors_headers

FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
MAPPED_BYTES = 64 << 20  # of one file at a time


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file, or the shards of an index, or a folder with either."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the files are missing, truncated or not consistent."""
        self.source = str(path)
        self._entries = read_safetensors_headers(path)

    def names(self) -> Sequence[str]:
        return tuple(self._entries)

    def info(self, name: str) -> TensorInfo:
        entry = self._entries[name]
        return TensorInfo(entry.shape, entry.dtype, entry.nbytes)

    def read(
        self,
        name: str,
        rows: Ranges | None = None,
        cols: Ranges | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        entry = self._entries[name]
        if entry.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {name!r} is stored as {entry.dtype}; "
                f"{', '.join(sorted(FLOAT_TYPES))} are read"
            )
        rows = ranges_of(entry.shape[0] if entry.shape else 1, rows)
        if len(entry.shape) < 2:
            assert cols is None, f"{name} has one dimension, and columns were asked for"
            shape: tuple[int, ...] = (extent(rows),) if entry.shape else ()
        else:
            cols = ranges_of(entry.shape[1], cols)
            shape = (extent(rows), extent(cols), *entry.shape[2:])
        out = torch.empty(shape, dtype=dtype, device=device)
        at = 0
        for start, stop in _pieces(rows, entry):
            _copy_piece(entry, name, start, stop, cols, out[at : at + stop - start] if entry.shape else out)
            at += stop - start
        return out


def _pieces(rows: Ranges, entry: SafetensorsEntry) -> Iterator[tuple[int, int]]:
    """`rows` in pieces that map at most MAPPED_BYTES (and at least one row)."""
    row_bytes = entry.nbytes // max(entry.shape[0] if entry.shape else 1, 1)
    step = max(1, MAPPED_BYTES // max(row_bytes, 1))
    for start, stop in rows:
        for at in range(start, stop, step):
            yield at, min(at + step, stop)


def _copy_piece(
    entry: SafetensorsEntry, name: str, start: int, stop: int, cols: Ranges | None, out: Tensor
) -> None:
    try:
        with safe_open(entry.path, framework="pt") as file:
            if not entry.shape:
                out.copy_(file.get_tensor(name))
                return
            part = file.get_slice(name)
            if cols is None:
                out.copy_(part[start:stop])
                return
            at = 0
            for first, last in cols:
                if last > first:
                    out[:, at : at + last - first].copy_(part[start:stop, first:last])
                at += last - first
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{entry.path}: tensor {name!r} cannot be read ({error}); fetch the file again"
        ) from None
