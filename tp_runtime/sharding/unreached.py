"""Modules that an example input does not reach: called on their own, or divided like a sibling.

Text alone leaves a vision tower or cross-attention unseen. A module that was not called, in one that was, is
called with the arguments that another module of its class got, or with an image, token ids or rows, by what
its first layer takes. Children of a list or dict that are alike (experts that no token chose) divide as the
one that was reached.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import Call, Example, Sketch, images_for, tokens_for
from .shardplan import ShardPlan
from .surrogate import alike
from .trace.rules import tensors_in


class _Used(Sketch):
    """Storages that operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in(args):
            self.storages.add(int(tensor.untyped_storage()._cdata))
        return super().__torch_dispatch__(func, types, args, kwargs)


def record_calls(model: nn.Module, example: Example) -> tuple[set[str], dict[type, tuple[Any, Any]]]:
    """(paths of the modules that the example calls or whose weights it uses, the first arguments of each
    class).
    """
    called: set[str] = set()
    used = _Used()
    arguments: dict[type, tuple[Any, Any]] = {}
    hooks = []
    for path, module in model.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            called.add(path)
            if type(module) not in arguments:
                arguments[type(module)] = _detached(args), _detached(kwargs)

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad(), used:
            example.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in model.named_parameters():
        if int(parameter.untyped_storage()._cdata) in used.storages:
            parts = name.split(".")[:-1]
            called.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return called, arguments


def _detached(value: Any) -> Any:
    """Arguments without objects that a call would change (caches)."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(item) for item in value)
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value if isinstance(value, (int, float, bool, str)) else None


def siblings(model: nn.Module, called: set[str]) -> dict[str, str]:
    """Children of lists and dicts of modules that were not called -> an alike child that was."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        children = [
            (place, f"{path}.{name}" if path else name, child)
            for place, (name, child) in enumerate(module._modules.items())
            if child is not None
        ]
        reached = [each for each in children if each[1] in called]
        for place, name, child in children:
            if name not in called:
                twin = next((r for r in reached if alike(r[2], r[0], child, place)), None)
                if twin is not None:
                    found[name] = twin[1]
    return found


def summed_twice(plan: ShardPlan, alone: set[str]) -> str | None:
    """A module that sums over ranks around one that was only seen on its own (in `alone`), if there is any.

    What that one returns may be part of the sum, as of experts of which the example reached others: by itself
    it is right when it is whole or sums its own, and then it would count once for each rank.
    """
    around = {module for module, _ in plan.sums}
    for path in sorted(alone):
        parts = path.split(".")
        found = {".".join(parts[:end]) for end in range(len(parts))} & around
        if found:
            return max(found, key=len)
    return None


def extra_calls(model: nn.Module, called: set[str], arguments: dict[type, tuple[Any, Any]]) -> list[Call]:
    """Calls that reach modules with weights which the example does not reach."""
    skip = siblings(model, called)
    found: list[Call] = []
    for path, module in _outermost(model, "", called, skip):
        found += _calls(path, module, arguments)
    return found


def _outermost(
    model: nn.Module, path: str, called: set[str], skip: dict[str, str]
) -> Iterator[tuple[str, nn.Module]]:
    """Modules that were not called, in modules that were."""
    for name, child in model.named_children():
        full = f"{path}.{name}" if path else name
        if full in skip:
            continue
        if full in called or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _outermost(child, full, called, skip)
        elif any(p.dim() > 1 for p in child.parameters()) and not isinstance(child, nn.Embedding):
            yield full, child


def _calls(path: str, module: nn.Module, arguments: dict[type, tuple[Any, Any]]) -> list[Call]:
    """A call of the module that works, or calls of its children."""
    for args, kwargs in _guesses(module, arguments):
        if _works(module, args, kwargs):
            return [(path, args, kwargs)]
    found = []
    for name, child in module.named_children():
        if any(p.dim() > 1 for p in child.parameters()) and not isinstance(child, nn.Embedding):
            found += _calls(f"{path}.{name}", child, arguments)
    return found


def _works(module: nn.Module, args: Any, kwargs: Any) -> bool:
    try:
        with torch.no_grad(), Sketch():
            module(*args, **kwargs)
    except Exception:  # noqa: BLE001  (any module, any complaint: the next guess is tried)
        return False
    return True


def _guesses(
    module: nn.Module, arguments: dict[type, tuple[Any, Any]]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if type(module) in arguments:
        yield arguments[type(module)]
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return
    if not parameters:
        return
    tensors: list[Tensor] = [*images_for(module)]
    first = next((m for m in module.modules() if isinstance(m, (nn.Linear, nn.Embedding))), None)
    if isinstance(first, nn.Embedding):
        tensors.append(tokens_for(2, first.num_embeddings))
    flat = [t.shape[0] for t in [*module.buffers(), *module.parameters()] if t.dim() == 1][:2]
    widths = dict.fromkeys([first.in_features if isinstance(first, nn.Linear) else 0, *flat])
    for width in widths:
        if width:
            rows = torch.randn(2, 16, width, generator=torch.Generator().manual_seed(5))
            tensors += [rows, rows[0]]
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for tensor in tensors:
        yield (tensor, *(None for _ in required[1:])), {}
        if len(required) > 1:
            yield tuple(tensor for _ in required), {}
