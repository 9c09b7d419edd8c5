"""What a safetensors checkpoint holds: its header and its index of shards. No torch.

A file is an 8-byte little-endian length, a JSON header of that length (per tensor: dtype, shape and a
half-open byte range of the data), and the data. Everything the header claims is checked against the
size of the file before anything is allocated, so that a truncated download or an invented length is one
sentence. Source: https://github.com/huggingface/safetensors (format).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_file import parse_json_object, read_json_object

HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsEntry:
    """One tensor: the file it lies in, the format's dtype name ("BF16", ...), its shape, its bytes and where
    in the file they begin."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def read_safetensors_header(path: Path) -> dict[str, SafetensorsEntry]:
    """All tensors of one file. Raises CheckpointError where the file is truncated or its header wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: it has {size} bytes and claims a header of "
                    f"{length} (limit {HEADER_LIMIT_BYTES}); fetch it again"
                )
            header = parse_json_object(file.read(length), f"the header of {path}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    header.pop("__metadata__", None)
    return {name: _entry(path, name, claim, 8 + length, size) for name, claim in header.items()}


def _entry(path: Path, name: str, claim: Any, data_start: int, size: int) -> SafetensorsEntry:
    data_bytes = size - data_start
    try:
        dtype, shape, (start, stop) = claim["dtype"], tuple(claim["shape"]), claim["data_offsets"]
        plain = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
        consistent = plain and stop - start == math.prod(shape) * _ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        consistent = False
    if not consistent:
        raise CheckpointError(
            f"{path}: the header's entry for {name!r} is not consistent; fetch the file again"
        )
    if stop > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {stop} of the data, of which there are "
            f"{data_bytes}; fetch it again"
        )
    return SafetensorsEntry(path, dtype, shape, stop - start, data_start + start)


def read_safetensors_headers(path: Path) -> dict[str, SafetensorsEntry]:
    """All tensors of a checkpoint: one file, a sharded index (*.index.json), or a folder with either.

    Raises CheckpointError where there is none, a shard is missing or truncated, or a tensor is not where
    the index says.
    """
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(".json"):
        return _sharded(path)
    return read_safetensors_header(path)


def _in_folder(folder: Path) -> Path:
    for name in (INDEX_NAME, SINGLE_NAME):
        if (folder / name).is_file():
            return folder / name
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return loose[0]
    if loose:
        raise CheckpointError(
            f"{folder} has {len(loose)} safetensors files and no {INDEX_NAME} that says which tensor lies "
            f"where; fetch the index too, or give one file"
        )
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    hint = f" ({pickled[0].name} is a pickle, which is not read; convert it)" if pickled else ""
    raise CheckpointError(f"{folder} has no {SINGLE_NAME}, {INDEX_NAME} or other *.safetensors{hint}")


def _sharded(index_path: Path) -> dict[str, SafetensorsEntry]:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map of tensor names to file names; fetch it again")
    entries: dict[str, SafetensorsEntry] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index_path} names the shard {file_name!r}, which is not a plain file name"
            )
        if not (index_path.parent / file_name).is_file():
            raise CheckpointError(f"{index_path.parent} lacks the shard {file_name}; fetch it")
        entries.update(read_safetensors_header(index_path.parent / file_name))
    astray = [
        n for n, file_name in weight_map.items() if n not in entries or entries[n].path.name != file_name
    ]
    if astray:
        raise CheckpointError(
            f"{index_path}: tensor {astray[0]!r} is not in {weight_map[astray[0]]}; fetch both again"
        )
    return entries
