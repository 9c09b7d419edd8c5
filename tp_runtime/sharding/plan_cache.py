"""Plans on disk, by what they depend on: a model's structure, its code, the world size and our own code.

A plan holds names and numbers, never weights, so that it serves every checkpoint of one structure. A file
that cannot be read or written is no error: the plan is then found again.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import env
from .._version import __version__
from .describe import Describer, UnknownSettings, sources
from .shardplan import ShardPlan, plan_from_json, plan_to_json
from .surrogate import has_hooks, settings, tensor_kind


def structure_key(model: nn.Module, *more: Any) -> str:
    """A hash of classes, attributes with all they hold, shapes, what is tied or shared, which modules have
    hooks, the sources of the code and versions; and of `more`. Empty where a model cannot be described.
    """
    digest = hashlib.sha256()
    describer = Describer()
    first: dict[int, str] = {}  # place of each module and tensor
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            digest.update(f"{path} {first.setdefault(id(module), path)} {has_hooks(module)}".encode())
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    place = first.setdefault(id(tensor), f"{path}.{name}")
                    digest.update(f"{name} {place} {tensor_kind(tensor)}".encode())
            digest.update(describer.describe(type(module)).encode())
            digest.update(describer.describe(settings(module)).encode())
            describer.python_modules.update(base.__module__ for base in type(module).__mro__)
        for value in more:
            digest.update(describer.describe(_shapes(value)).encode())
    except UnknownSettings:
        return ""
    files, versions = sources(describer.python_modules)
    for file in sorted([*files, *map(str, Path(__file__).parent.rglob("*.py"))]):
        with suppress(OSError):
            digest.update(Path(file).read_bytes())
    digest.update(f"{__version__} {torch.__version__} {sys.version} {sorted(versions)}".encode())
    return digest.hexdigest()


def _shapes(value: Any) -> Any:
    """An example with shapes and types in place of its tensors: all of one form have one plan."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: _shapes(item) for key, item in value.items()}
    return [_shapes(item) for item in value] if isinstance(value, (list, tuple)) else value


def _file(key: str) -> Path | None:
    folder = env.get_path("TP_CACHE_DIR")
    return None if folder is None else folder / "plans" / f"{key}.json"


def read_plan(key: str) -> ShardPlan | None:
    """The plan kept under this key."""
    file = _file(key)
    if file is None:
        return None
    try:
        return plan_from_json(file.read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_plan(key: str, plan: ShardPlan) -> None:
    """Keep a plan."""
    file = _file(key)
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{id(plan)}.tmp")
        fresh.write_text(plan_to_json(plan))
        fresh.replace(file)
