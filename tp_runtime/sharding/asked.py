"""Calls of a sharded model that ask for results which its plan's example did not ask for.

`output_attentions=True` and the like bring results that no trace has seen; each rank's may be its own part.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..log import once

_PREFIXES = ("output_", "return_")
_ELSE = {"return_dict"}  # another container of the same results


def watch_requests(model: nn.Module, example_inputs: Any) -> RemovableHandle:
    """Warn, once, of what calls ask for beyond the example, by a keyword or by the model's configuration."""
    known = _requests(model, example_inputs if isinstance(example_inputs, dict) else {})

    def before(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        new = _requests(model, kwargs) - known
        if new:
            names = " and ".join(sorted(new))
            once(
                f"{type(model).__name__} is asked for {names}, and its plan's example was not: what that "
                "brings may be this rank's part; pass shard example_inputs that ask for it"
            )

    return model.register_forward_pre_hook(before, with_kwargs=True)


def _requests(model: nn.Module, kwargs: dict[str, Any]) -> set[str]:
    settings = getattr(getattr(model, "config", None), "__dict__", {})
    named = ((name.lstrip("_"), value) for name, value in (*settings.items(), *kwargs.items()))
    return {
        name
        for name, value in named
        if name.startswith(_PREFIXES) and name not in _ELSE and not isinstance(value, Tensor) and value
    }
