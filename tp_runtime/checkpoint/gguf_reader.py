"""Slices of a GGUF file: the covering storage blocks by pread, as floats or as the stored values.

Nothing is mapped, so no page of the file counts as this process's memory. A slice that cuts a block reads
the whole block. Q8_0, Q4_0 and Q4_1 hold exactly what int8-g32, int4-g32 and int4-g32 with offsets hold,
in another order of bytes, and pass without a detour through floats; the `gguf` package dequantises the
other types and is the reference for these three.

Legend: N rows, B storage blocks of a row, Y bytes of a block.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.reference import unpack_nibbles
from ..layout import WeightFormat, WeightLayout, weight_format
from ..quant.reference import dequantize
from ..quant.tensor import QuantizedTensor, pack_nibbles
from ..sharding.plan import Ranges, extent
from .base import Checkpoint, ranges_of
from .gguf_file import GGUFTensor, gguf_tensors
from .gguf_header import read_gguf_header
from .inventory import TensorInfo

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_FORMATS = {
    "Q8_0": weight_format("int8-g32"),
    "Q4_0": weight_format("int4-g32"),
    "Q4_1": weight_format("int4-g32", asymmetric=True),
}
PIECE_VALUES = 1 << 20  # dequantised at a time


class GGUFCheckpoint(Checkpoint):
    """The tensors of one GGUF file under Hugging Face's names and in Hugging Face's row order."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the file is truncated, absurd, or of another architecture."""
        self.source = str(path)
        self._path = path
        self._tensors = gguf_tensors(read_gguf_header(path))

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        entry = self._tensors[name].entry
        return TensorInfo(entry.shape, entry.type.name, entry.nbytes)

    def read(
        self,
        name: str,
        rows: Ranges | None = None,
        cols: Ranges | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        tensor = self._tensors[name]
        shape = tensor.entry.shape
        if len(shape) == 1:
            assert cols is None, f"{name} has one dimension, and columns were asked for"
            return self._read_vector(tensor, ranges_of(shape[0], rows)).to(device=device, dtype=dtype)
        if len(shape) != 2:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} has shape {list(shape)}; one or two dimensions are read"
            )
        rows, cols = ranges_of(shape[0], rows), ranges_of(shape[1], cols)
        out = torch.empty((extent(rows), extent(cols)), dtype=dtype, device=device)
        step = max(1, PIECE_VALUES // max(shape[1], 1))
        at = 0
        for start, stop in rows:
            for row in range(start, stop, step):
                piece = min(step, stop - row)
                self._read_piece(tensor, (row, row + piece), cols, out[at : at + piece])
                at += piece
        return out

    def _read_vector(self, tensor: GGUFTensor, ranges: Ranges) -> Tensor:
        """A bias or norm: it is small, so all of it is read, put in the model's order and cut."""
        (length,), kind = tensor.entry.shape, tensor.entry.type
        raw = np.empty((1, length // kind.block_size, kind.block_bytes), dtype=np.uint8)
        with open(self._path, "rb", buffering=0) as file:
            self._fill(file.fileno(), raw.reshape(-1), tensor.entry.offset)
        values = _floats(raw, kind.name)[0]
        if tensor.reordered_heads:
            values = values[torch.from_numpy(file_rows(np.arange(length), length // tensor.reordered_heads))]
        return torch.cat([values[start:stop] for start, stop in ranges])

    def _read_piece(self, tensor: GGUFTensor, rows: tuple[int, int], cols: Ranges, out: Tensor) -> None:
        at = 0
        for first, last in cols:
            if last > first:
                raw_NBY, block0 = self._blocks(tensor, rows, (first, last))
                values = _floats(raw_NBY, tensor.entry.type.name)
                start = first - block0 * tensor.entry.type.block_size
                out[:, at : at + last - first].copy_(values[:, start : start + last - first])
            at += last - first

    def block_format(self, name: str) -> WeightFormat | None:
        return _BLOCK_FORMATS.get(self._tensors[name].entry.type.name)

    def read_blocks(self, name: str, rows: Ranges, layout: WeightLayout) -> QuantizedTensor:
        tensor = self._tensors[name]
        out = QuantizedTensor.empty(layout)
        at = 0
        for start, stop in rows:
            raw_NBY, _ = self._blocks(tensor, (start, stop), layout.cols)
            part = WeightLayout(
                (stop - start, layout.shape[1]), (0, stop - start), layout.cols, layout.format
            )
            out.put_rows(at, blocks_to_quantized(raw_NBY, tensor.entry.type.name, part))
            at += stop - start
        return out

    def _blocks(
        self, tensor: GGUFTensor, rows: tuple[int, int], cols: tuple[int, int]
    ) -> tuple[np.ndarray, int]:
        """(uint8 [N, B, Y]: the blocks of the model's `rows` that cover `cols`, the first one's number)."""
        size = tensor.entry.type.block_size
        block0, block1 = cols[0] // size, -(-cols[1] // size)
        if not tensor.reordered_heads:
            return self._pread(tensor, rows, (block0, block1)), block0
        source = file_rows(np.arange(*rows), tensor.entry.shape[0] // tensor.reordered_heads)
        first, last = (int(source.min()), int(source.max()) + 1) if len(source) else (0, 0)
        return self._pread(tensor, (first, last), (block0, block1))[source - first], block0

    def _pread(self, tensor: GGUFTensor, rows: tuple[int, int], blocks: tuple[int, int]) -> np.ndarray:
        kind, num_rows, width = tensor.entry.type, rows[1] - rows[0], blocks[1] - blocks[0]
        row_bytes = tensor.entry.shape[-1] // kind.block_size * kind.block_bytes
        raw = np.empty((num_rows, width * kind.block_bytes), dtype=np.uint8)
        start = tensor.entry.offset + rows[0] * row_bytes + blocks[0] * kind.block_bytes
        with open(self._path, "rb", buffering=0) as file:
            if raw.shape[1] == row_bytes:
                self._fill(file.fileno(), raw.reshape(-1), start)
            else:
                for row in range(num_rows):
                    self._fill(file.fileno(), raw[row], start + row * row_bytes)
        return raw.reshape(num_rows, width, kind.block_bytes)

    def _fill(self, descriptor: int, buffer: np.ndarray, offset: int) -> None:
        left = buffer.data
        while len(left):
            count = os.preadv(descriptor, [left], offset)
            if count == 0:
                raise CheckpointError(
                    f"{self._path} ended at byte {offset} while it was read; fetch it again"
                )
            left, offset = left[count:], offset + count


def file_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where the converter put the model's `rows` of a reordered q or k (see gguf_file)."""
    head, inside = np.divmod(rows, head_dim)
    half, pair = np.divmod(inside, head_dim // 2)
    return head * head_dim + 2 * pair + half


def _floats(raw_NBY: np.ndarray, type_name: str) -> Tensor:
    """The values of whole blocks, [N, B * block size]: in the stored dtype of a plain type, else fp32."""
    n, num_blocks = raw_NBY.shape[:2]
    if type_name in _PLAIN:
        return torch.from_numpy(raw_NBY.reshape(n, -1)).view(_PLAIN[type_name])
    form = _BLOCK_FORMATS.get(type_name)
    if form is not None:
        layout = WeightLayout.whole((n, num_blocks * 32), form)
        return dequantize(blocks_to_quantized(raw_NBY, type_name, layout))
    flat = gguf.quants.dequantize(raw_NBY.reshape(n, -1), gguf.GGMLQuantizationType[type_name])
    return torch.from_numpy(flat)


def blocks_to_quantized(raw_NBY: np.ndarray, type_name: str, layout: WeightLayout) -> QuantizedTensor:
    """Q8_0, Q4_0 or Q4_1 blocks as the canonical form of `layout`, whose columns they cover, bit for bit.

    GGML stores fp16 scale[, fp16 minimum], then values. 8 bits: in order. 4 bits: byte j of a block holds
    value j in its low nibble and value j + 16 in its high one, where the canonical form pairs 2j, 2j + 1.
    """
    raw = torch.from_numpy(raw_NBY)
    n, num_blocks = raw.shape[:2]
    k, head = layout.local_shape[1], layout.head
    scale = raw[..., :2].contiguous().view(torch.float16).view(n, num_blocks)
    if type_name == "Q8_0":
        q = raw[..., 2:].reshape(n, num_blocks * 32).view(torch.int8)
        return QuantizedTensor(layout, q[:, head : head + k].contiguous(), scale)
    offset = (
        raw[..., 2:4].contiguous().view(torch.float16).view(n, num_blocks) if type_name == "Q4_1" else None
    )
    stored = raw[..., -16:]
    even, odd = stored[..., 0::2], stored[..., 1::2]
    paired = torch.cat(((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)), dim=-1).view(
        n, num_blocks * 16
    )
    if head or k != num_blocks * 32:
        paired = pack_nibbles(unpack_nibbles(paired, num_blocks * 32)[:, head : head + k])
    return QuantizedTensor(layout, paired, scale, offset)
