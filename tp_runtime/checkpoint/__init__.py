"""Weights on disk, or made up: read lazily, by slices, each rank only its own.

safetensors_header.py, gguf_header.py, gguf_file.py, inventory.py: what a file holds, checked, without torch.
base.py: the interface of a checkpoint. safetensors_reader.py, gguf_reader.py, random_weights.py: the
three kinds. load.py: every rank's share of a model, quantised as it is read. Importing this package
loads no torch; the names below do so on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Checkpoint
    from .inventory import TensorInfo, check_tensors, stored_tensors
    from .load import WeightRequest, load_weights
    from .opening import open_checkpoint
    from .random_weights import RandomCheckpoint

_HOMES = {
    "Checkpoint": ".base",
    "RandomCheckpoint": ".random_weights",
    "TensorInfo": ".inventory",
    "WeightRequest": ".load",
    "check_tensors": ".inventory",
    "load_weights": ".load",
    "open_checkpoint": ".opening",
    "stored_tensors": ".inventory",
}

__all__ = [
    "Checkpoint",
    "RandomCheckpoint",
    "TensorInfo",
    "WeightRequest",
    "check_tensors",
    "load_weights",
    "open_checkpoint",
    "stored_tensors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
