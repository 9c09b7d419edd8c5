"""Plans on disk, by what they depend on: a model's structure, its code, the world size and our own code.

A plan holds names and numbers, never weights, so that it serves every checkpoint of one structure. A file
that cannot be read or written is no error: the plan is then found again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import env
from .._version import __version__
from .shardplan import ShardPlan, plan_from_json, plan_to_json


def structure_key(model: nn.Module, *more: Any) -> str:
    """A hash of classes, attributes, shapes, what is tied or shared, configurations with what they keep to
    themselves (which attention, which experts), the classes' source files and versions; and of `more`.
    """
    digest = hashlib.sha256()
    files: set[str] = set()
    first: dict[int, str] = {}  # place of each module, tensor and configuration
    for path, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{path} {first.setdefault(id(module), path)} {type(module).__qualname__}".encode())
        digest.update(_settings(module).encode())
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                place = first.setdefault(id(tensor), f"{path}.{name}")
                digest.update(f"{name} {place} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for name, value in vars(module).items():
            if hasattr(value, "to_dict") and id(value) not in first:
                first[id(value)] = f"{path}>{name}"
                digest.update(f"{name} {_configuration(value)}".encode())
        for base in type(module).__mro__:
            file = getattr(sys.modules.get(base.__module__), "__file__", None)
            if file:
                files.add(file)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        digest.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for file in sorted([*files, *map(str, Path(__file__).parent.rglob("*.py"))]):
        with suppress(OSError):
            digest.update(Path(file).read_bytes())
    digest.update(f"{__version__} {torch.__version__} {sys.version}".encode())
    for value in more:
        digest.update(_describe(value).encode())
    return digest.hexdigest()


def _settings(holder: Any) -> str:
    """The plain attributes of an object."""
    plain = {k: v for k, v in vars(holder).items() if isinstance(v, (bool, int, float, str, tuple, list))}
    return str(sorted(map(str, plain.items())))


def _configuration(config: Any) -> str:
    """A configuration's attributes, private ones too, and those of the configurations in it."""
    inner = {k: _configuration(v) for k, v in vars(config).items() if hasattr(v, "to_dict")}
    return f"{_settings(config)} {sorted(inner.items())}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, dict):
        return str({key: _describe(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return str([_describe(item) for item in value])
    return repr(value)


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
