"""open_checkpoint: whatever lies at a path, behind the one interface."""

from __future__ import annotations

from pathlib import Path

from .base import Checkpoint
from .gguf_header import is_gguf
from .gguf_reader import GGUFCheckpoint
from .inventory import require_exists
from .safetensors_reader import SafetensorsCheckpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a GGUF file, a safetensors file, an index, or a folder with safetensors.

    Raises CheckpointError where there is nothing, or nothing that can be read; headers are checked here.
    """
    path = Path(path)
    require_exists(path)
    return GGUFCheckpoint(path) if is_gguf(path) else SafetensorsCheckpoint(path)
