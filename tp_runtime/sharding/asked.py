"""Calls of a sharded model that ask for results which its plan's example did not ask for.

`output_attentions=True` and the like bring results that no trace has seen; each rank's may be its own part.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..log import once

_PREFIXES = ("output_", "return_")
_ELSE = {"return_dict"}  # another container of the same results


def watch_requests(model: nn.Module, example_inputs: Any) -> RemovableHandle:
    """Warn, once, of what calls ask for beyond the example: arguments called output_ or return_ something, or
    settings of the model's configuration, that are True.
    """
    settings = [name for name in getattr(getattr(model, "config", None), "__dict__", {}) if _asks(name)]
    kwargs = example_inputs if isinstance(example_inputs, dict) else {}
    args = example_inputs if isinstance(example_inputs, (tuple, list)) else ()
    known = _requests(model, settings, tuple(args), kwargs)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        new = _requests(model, settings, args, kwargs) - known
        if new:
            names = " and ".join(sorted(new))
            once(
                f"{type(model).__name__} is asked for {names}, and its plan's example was not: what that "
                "brings may be this rank's part; pass shard example_inputs that ask for it"
            )

    return model.register_forward_pre_hook(before, with_kwargs=True)


def _asks(name: str) -> bool:
    name = name.lstrip("_")
    return name.startswith(_PREFIXES) and name not in _ELSE


def _requests(
    model: nn.Module, settings: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[str]:
    found = {name for name, value in kwargs.items() if value is True and _asks(name)}
    found |= {name.lstrip("_") for name in settings if getattr(model.config, name, None) is True}
    if any(value is True for value in args):
        with suppress(TypeError):  # arguments that forward does not take: it says so itself
            bound = inspect.signature(model.forward).bind_partial(*args).arguments
            found |= {name for name, value in bound.items() if value is True and _asks(name)}
    return found
