"""Random weights of any shape: the same values at every world size, each rank making only its slice.

Every tensor has a table of normal numbers seeded by its name; row n of the tensor is the window of the
table that starts at (n * an odd constant) mod 2^p, so that rows differ and any slice is a few copies of
contiguous memory: gigabytes a second where drawing the numbers anew would take most of the load time.
Tables are made on the CPU, in bf16, so values depend neither on the device nor on the dtype asked for.

Scale: linears have a standard deviation of 1/sqrt(K), which keeps activations near unit size and gives
logits with a spread of about 1; norms lie around 1, biases around 0. Meant for benchmarks and tests: rows
that share stretches of a table have none of a trained weight's structure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..sharding.plan import Ranges, extent
from .base import Checkpoint, ranges_of
from .inventory import TensorInfo

_STEP = 0x9E3779B1  # odd, near 2^32 / golden ratio: n -> n * _STEP mod 2^p visits every start once
_TABLE_LIMIT = 1 << 20


class RandomCheckpoint(Checkpoint):
    """A made-up checkpoint.

    shapes: every tensor's name and shape (one or two dimensions). seed: another one, other values.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> None:
        self.source = f"random weights (seed {seed})"
        self._shapes = dict(shapes)
        self._seed = seed
        self._table: tuple[str, Tensor] | None = None  # of the tensor read last, which comes in pieces
        self._device_table: tuple[str, Tensor] | None = None

    def names(self) -> Sequence[str]:
        return tuple(self._shapes)

    def info(self, name: str) -> TensorInfo:
        shape = self._shapes[name]
        return TensorInfo(shape, "BF16", 2 * math.prod(shape))

    def read(
        self,
        name: str,
        rows: Ranges | None = None,
        cols: Ranges | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        shape = self._shapes[name]
        table = self._table_of(name)
        rows = ranges_of(shape[0], rows)
        if len(shape) == 1:
            return torch.cat([table[start:stop] for start, stop in rows]).to(device=device, dtype=dtype)
        cols = ranges_of(shape[1], cols)
        num_starts = len(table) - shape[1]
        if torch.device(device).type == "cuda":
            return self._windows_on_gpu(rows, cols, num_starts, dtype, device)
        row_numbers = np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in rows])
        starts = (row_numbers * _STEP) % num_starts
        bits = table.view(torch.int16).numpy()
        out = np.empty((len(starts), extent(cols)), dtype=np.int16)
        at = 0
        for first, last in cols:
            if last > first:
                windows = np.lib.stride_tricks.sliding_window_view(bits, last - first)
                out[:, at : at + last - first] = windows[starts + first]
            at += last - first
        return torch.from_numpy(out).view(torch.bfloat16).to(device=device, dtype=dtype)

    def _windows_on_gpu(
        self, rows: Ranges, cols: Ranges, num_starts: int, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """The same values, gathered by the GPU: the table crosses the bus once a tensor."""
        assert self._table is not None, "the table was made by the caller"
        if self._device_table is None or self._device_table[0] != self._table[0]:
            self._device_table = (self._table[0], self._table[1].to(device))
        table = self._device_table[1]
        row_N = torch.cat([torch.arange(start, stop, device=device) for start, stop in rows])
        start_N = (row_N * _STEP) % num_starts
        column_K = torch.cat([torch.arange(start, stop, device=device) for start, stop in cols])
        return table[start_N.unsqueeze(1) + column_K].to(dtype)

    def _table_of(self, name: str) -> Tensor:
        if self._table is None or self._table[0] != name:
            self._table = (name, _make_table(name, self._shapes[name], self._seed))
        return self._table[1]


def _make_table(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """bf16: a vector itself, or for a matrix [N, K] a power of two >= N of window starts, and K more."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    if len(shape) == 1:
        noise = 0.02 * torch.randn(shape, generator=generator)
        return (noise if name.endswith(".bias") else 1 + noise).bfloat16()
    assert len(shape) == 2, f"{name} has shape {shape}; one or two dimensions can be made up"
    num_starts = 1 << max(shape[0] - 1, min(math.prod(shape), _TABLE_LIMIT) - 1, 1).bit_length()
    values = torch.randn(num_starts + shape[1], generator=generator)
    return (values / math.sqrt(shape[1])).bfloat16()
