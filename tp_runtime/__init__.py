"""Tensor-parallel runtime for large language models in PyTorch.

Public names load on first use: importing this package costs milliseconds and no torch, because
threads and memory must be placed before torch loads.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoint.fill import load
    from .checkpoint.quantize_model import quantize
    from .config import SamplingParams
    from .engine.llm import LLM
    from .errors import TPError
    from .mesh import init_mesh
    from .sharding.shard import explain, plan, shard, unshard

_WHERE = {
    "LLM": ".engine.llm",
    "SamplingParams": ".config",
    "TPError": ".errors",
    "explain": ".sharding.shard",
    "init_mesh": ".mesh",
    "load": ".checkpoint.fill",
    "plan": ".sharding.shard",
    "quantize": ".checkpoint.quantize_model",
    "shard": ".sharding.shard",
    "unshard": ".sharding.shard",
}

__all__ = [
    "LLM",
    "SamplingParams",
    "TPError",
    "__version__",
    "explain",
    "init_mesh",
    "load",
    "plan",
    "quantize",
    "shard",
    "unshard",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
