"""What a GGUF file holds: metadata and tensor table, by a walk that believes nothing. No torch.

Every count and length is checked against the bytes that are left in the file before anything is read or
allocated for it: 2**60 tensors or a string of 2**62 bytes are refused in microseconds. Long arrays (the
vocabulary, its merges) are walked over and kept only where asked for.

The reader of the `gguf` package makes several arrays a string and trusts the counts: for a vocabulary of
49k tokens it takes seconds and some 150 MB a rank. So it is the reference that tests compare with, and the
package's `quants` module does the dequantising.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4  # GGML's
_SMALL_ARRAY = 1024


@dataclass(frozen=True)
class BlockType:
    """One storage type of GGML: values a block, bytes a block."""

    name: str
    block_size: int
    block_bytes: int


BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}


@dataclass(frozen=True)
class GGUFEntry:
    """One tensor: shape in PyTorch's order (GGUF writes it reversed), type, byte offset in the file."""

    shape: tuple[int, ...]
    type: BlockType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class LongArray:
    """An array of the metadata that was walked over: only its length is kept."""

    length: int


@dataclass(frozen=True)
class GGUFHeader:
    """metadata: key to int, float, bool, str, list (short arrays) or LongArray. tensors: by GGUF's names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFEntry]


def is_gguf(path: Path) -> bool:
    """True for a file that is called, or begins, as GGUF files do."""
    if path.suffix == ".gguf":
        return True
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:  # a folder, or a file that whoever opens it next will complain about
        return False


def read_gguf_header(path: Path, *, keep_arrays: bool = False) -> GGUFHeader:
    """The header of a GGUF file of version 2 or 3, little-endian.

    keep_arrays: keep long arrays (the vocabulary) too, as lists, instead of a LongArray.
    Raises CheckpointError where the file cannot be read, is truncated, claims what it cannot hold, or has
    a tensor of a type outside BLOCK_TYPES.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; give a GGUF file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(path, data, keep_arrays).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no usable GGUF file ({error}); fetch it again") from None


class _Walk:
    """A cursor over the header; every step checks that the file is long enough."""

    def __init__(self, path: Path, data: mmap.mmap, keep_arrays: bool) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0
        self.keep_arrays = keep_arrays

    def header(self) -> GGUFHeader:
        self._magic()
        num_tensors = self._count("tensors", self._scalar("<Q"), least_bytes=24, at=self.at + 8)
        num_keys = self._count("metadata keys", self._scalar("<Q"), least_bytes=13)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise CheckpointError(f"{self.path}: metadata key {key!r} comes twice")
            metadata[key] = self._value(self._scalar("<I"))
        claims = [self._tensor_claim() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment={alignment!r} is no power of two up to 2**20"
            )
        data_start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFEntry] = {}
        for name, shape, kind, offset in claims:
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor {name!r} comes twice")
            tensors[name] = self._entry(name, shape, kind, data_start + offset)
        return GGUFHeader(self.path, metadata, tensors)

    def _magic(self) -> None:
        magic, version = self._take(4), self._scalar("<I")
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {magic!r}, not with b'GGUF'")
        if version not in (2, 3):
            kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise CheckpointError(f"{self.path} is {kind}; little-endian GGUF of version 2 or 3 is read")

    def _need(self, num_bytes: int) -> None:
        if num_bytes > self.size - self.at:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: {num_bytes} bytes are announced at byte "
                f"{self.at} of a file of {self.size}; fetch it again"
            )

    def _take(self, num_bytes: int) -> bytes:
        self._need(num_bytes)
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _count(self, what: str, count: int, *, least_bytes: int, at: int | None = None) -> int:
        left = self.size - (self.at if at is None else at)
        if count * least_bytes > left:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: {count} {what} are announced and "
                f"{max(left, 0)} bytes are left of the file; fetch it again"
            )
        return count

    def _string(self) -> str:
        return str(self._take(self._scalar("<Q")), "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return str(self._take(self._scalar("<Q")), "utf-8", "replace")
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: metadata of the unknown kind {kind} at byte {self.at}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any] | LongArray:
        kind, length = self._scalar("<I"), self._scalar("<Q")
        if kind != _STRING and kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: an array of kind {kind} at byte {self.at}; no model needs one"
            )
        item_bytes = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
        self._count("array items", length, least_bytes=item_bytes)
        keep = self.keep_arrays or length <= _SMALL_ARRAY
        if kind == _STRING:
            strings = self._strings(length, keep)
            return strings if keep else LongArray(length)
        start, self.at = self.at, self.at + length * item_bytes
        if not keep:
            return LongArray(length)
        return list(struct.unpack_from(f"<{length}{_SCALARS[kind][1]}", self.data, start))

    def _strings(self, count: int, keep: bool) -> list[str]:
        unpack, data, found = struct.Struct("<Q").unpack_from, self.data, []
        for _ in range(count):
            self._need(8)
            (length,) = unpack(data, self.at)
            self.at += 8
            self._need(length)
            if keep:
                found.append(str(data[self.at : self.at + length], "utf-8"))
            self.at += length
        return found

    def _tensor_claim(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._string(), self._scalar("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has {num_dims} dimensions; 1 to {_MAX_DIMS} are possible"
            )
        dims = struct.unpack(f"<{num_dims}Q", self._take(8 * num_dims))
        return name, tuple(reversed(dims)), self._scalar("<I"), self._scalar("<Q")

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFEntry:
        found = BLOCK_TYPES.get(kind)
        if found is None:
            known = ", ".join(t.name for t in BLOCK_TYPES.values())
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is stored as GGML type {kind}; supported are {known}; "
                f"use a file quantised as one of them"
            )
        if shape[-1] % found.block_size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has rows of {shape[-1]} values, no multiple of {found.name}'s "
                f"block of {found.block_size}"
            )
        nbytes = math.prod(shape) // found.block_size * found.block_bytes
        if offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name!r} of shape {list(shape)} ends at byte "
                f"{offset + nbytes} of a file of {self.size}; fetch it again"
            )
        return GGUFEntry(shape, found, offset, nbytes)
