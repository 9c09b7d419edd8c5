"""What a checkpoint holds, and whether it is what a model needs: from headers alone, without torch.

`stored_tensors` and `check_tensors` are what a launcher asks before any rank exists; the readers and
`load_weights` build on the same two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .gguf_file import gguf_tensors
from .gguf_header import is_gguf, read_gguf_header
from .safetensors_header import SafetensorsEntry, read_safetensors_headers

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PIECE_BYTES = 4 << 20  # compared at a time


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as stored: its shape, the name of its storage type ("BF16", "Q4_1"), its bytes."""

    shape: tuple[int, ...]
    type_name: str
    nbytes: int


def require_exists(path: Path) -> None:
    """Raises CheckpointError where there is nothing at `path`."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a GGUF file, a safetensors file or a folder of them"
        )


def stored_tensors(path: Path) -> dict[str, TensorInfo]:
    """All tensors of the checkpoint at `path`, by Hugging Face's names.

    path: a GGUF file, a safetensors file, an index, or a folder with safetensors. Raises CheckpointError
    where there is none, or it is truncated or damaged.
    """
    require_exists(path)
    if is_gguf(path):
        found = gguf_tensors(read_gguf_header(path))
        return {
            name: TensorInfo(t.entry.shape, t.entry.type.name, t.entry.nbytes) for name, t in found.items()
        }
    entries = read_safetensors_headers(path)
    return {name: TensorInfo(entry.shape, entry.dtype, entry.nbytes) for name, entry in entries.items()}


def has_own_head(path: Path) -> bool:
    """Whether the checkpoint at `path` holds a head of the embedding's shape and of other values.

    A GGUF file says itself whether its head is tied.
    """
    if is_gguf(path):
        return False
    entries = read_safetensors_headers(path)
    head, table = entries.get(_HEAD), entries.get(_EMBEDDING)
    return (
        head is not None and table is not None and head.shape == table.shape and not same_values(head, table)
    )


def same_values(one: SafetensorsEntry, other: SafetensorsEntry) -> bool:
    """Whether two stored tensors have one type and the same bytes. Read up to the first difference."""
    if one.dtype != other.dtype:
        return False
    with one.path.open("rb") as here, other.path.open("rb") as there:
        here.seek(one.offset)
        there.seek(other.offset)
        sizes = (min(_PIECE_BYTES, one.nbytes - at) for at in range(0, one.nbytes, _PIECE_BYTES))
        return all(here.read(size) == there.read(size) for size in sizes)


def check_tensors(
    source: str,
    held: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[int, ...]],
    may_remain: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raise CheckpointError unless `held` is exactly what is `wanted`, by name and shape.

    source: where `held` comes from, for the message. may_remain: names that nothing asks for on purpose.
    Buffers that old checkpoints carry (rotary_emb.inv_freq) and a copy of tied embeddings (has_own_head: is
    it one?) may remain too.
    """
    _refuse(source, "lacks", [name for name in wanted if name not in held])
    tied = _HEAD not in wanted and {_HEAD, _EMBEDDING} <= set(held)
    if tied and held[_HEAD].shape == held[_EMBEDDING].shape:
        held = {name: info for name, info in held.items() if name != _HEAD}
    surplus = [name for name in held if name not in wanted and not may_remain(name)]
    surplus = [name for name in surplus if not name.endswith("rotary_emb.inv_freq")]
    _refuse(source, "has, and the model has not,", surplus)
    misshapen = [
        f"{name} ({list(held[name].shape)}, not {list(shape)})"
        for name, shape in wanted.items()
        if held[name].shape != shape
    ]
    _refuse(source, "has in another shape than the model", misshapen)


def _refuse(source: str, verb: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        tensors = "tensor" if len(names) == 1 else "tensors"
        raise CheckpointError(
            f"{source} {verb} {len(names)} {tensors}: {shown}; give the weights that belong to the model's "
            f"config"
        )
