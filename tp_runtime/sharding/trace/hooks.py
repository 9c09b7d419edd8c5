"""Hooks of a traced model: which module runs, and what is cut, normalised or gathered at its ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .grids import SHARED
from .rules import tensors_in

if TYPE_CHECKING:
    from .mode import Trace

BIRTH_LIMIT = 1 << 18  # elements of an activation that may get ids of its own


class Enter:
    """Forward pre-hook: the module is running; its arguments may be cut."""

    def __init__(self, trace: Trace, name: str) -> None:
        self.trace, self.name = trace, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with unseen():
            return self._enter(args, kwargs)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace = self.trace
        trace.stack.append(self.name)
        if trace.suspended:
            return None
        if self.name in trace.hooked:
            _show(trace, self.name, [*tensors_in(args), *tensors_in(kwargs)])
            return None
        if self.name in trace.decisions.norms:
            tensors = tensors_in(args) + tensors_in(kwargs)
            labels = trace.labels.get(tensors[0]) if len(tensors) == 1 else None
            if labels is not None and bool((labels > 0).any()):
                trace.norm_inputs[self.name] = labels
                trace.suspended += 1
                return None
        if self.name and self.name in trace.decisions.births:
            born = False

            def cut(place: str, value: Any) -> Any:
                nonlocal born
                if (
                    isinstance(value, Tensor)
                    and not trace.labelled(value)
                    and trace.partials.get(value) is None
                ):
                    copy = value.clone()
                    trace.birth(f"{self.name}@{place}", copy, "argument")
                    born = True
                    return copy
                return value

            args = tuple(cut(str(place), value) for place, value in enumerate(args))
            kwargs = {key: cut(key, value) for key, value in kwargs.items()}
            return (args, kwargs) if born else None
        return None


class Leave:
    """Forward hook: notes what the module returns, and cuts or gathers it where that was decided."""

    def __init__(self, trace: Trace, name: str) -> None:
        self.trace, self.name = trace, name

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        with unseen():
            return self._leave(module, out)

    def _leave(self, module: nn.Module, out: Any) -> Any:
        trace = self.trace
        if self.name in trace.decisions.norms and self.name in trace.norm_inputs:
            trace.suspended -= 1
            out = self._after_norm(module, out)
        if trace.suspended:
            trace.stack.pop()
            return out
        if self.name in trace.decisions.gathers:
            out = self._gathered(out)
        seen = tensors_in(out) if self.name in trace.hooked else []
        for place, tensor in result_tensors(out):
            trace.partials.returned(self.name, place, tensor)
            labels = trace.labels.get(tensor)
            cut = labels is not None and bool((labels > 0).any())
            trace.result_whole[self.name] = trace.result_whole.get(self.name, True) and not cut
            if labels is not None and not cut and labels.numel() <= BIRTH_LIMIT:
                trace.result_soft.setdefault(self.name, []).append(torch.unique(labels).numpy())
        _show(trace, self.name, seen)
        trace.stack.pop()
        if trace.where in trace.decisions.births and trace.where:
            out = self._born(out)
        return out

    def _after_norm(self, module: nn.Module, out: Any) -> Any:
        trace = self.trace
        labels = trace.norm_inputs.pop(self.name)
        rows = labels.reshape(-1, labels.shape[-1])
        if not isinstance(out, Tensor) or labels.shape != out.shape or not bool((rows == rows[:1]).all()):
            trace.labels.fail(labels, "a norm that is none of rows", self.name)
            return out
        trace.normed[self.name] = rows[0].numpy() & ~SHARED
        out = out.clone()
        trace.labels.put(out, labels)
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.dim() == 1 and tensor.shape[0] == labels.shape[-1]:
                own = trace.labels.get(tensor)
                if own is not None:
                    trace.labels.meet(labels, own.expand(labels.shape))
        return out

    def _gathered(self, out: Any) -> Any:
        trace = self.trace
        if not isinstance(out, Tensor):
            return out
        labels = trace.labels.get(out)
        if labels is None:
            return out
        rows = labels.reshape(-1, labels.shape[-1])
        if not bool((rows == rows[:1]).all()) or not bool((rows[0] > 0).all()):
            trace.labels.fail(labels, "a result that cannot be gathered", self.name)
            return out
        trace.gathered[self.name] = rows[0].numpy() & ~SHARED
        return out.clone()

    def _born(self, out: Any) -> Any:
        trace = self.trace
        if isinstance(out, Tensor):
            labels = trace.labels.get(out)
            if (labels is None or not bool((labels > 0).any())) and trace.partials.get(out) is None:
                out = out.clone()
                trace.birth(f"{self.name}@", out, "result")
        return out


def _show(trace: Trace, name: str, tensors: list[Tensor]) -> None:
    """Tensors that a user's hook on module `name` sees."""
    for tensor in tensors:
        labels = trace.labels.get(tensor)
        if labels is not None and bool((labels > 0).any()):
            trace.shown.add(name)
        trace.need_whole(tensor, f"the hook on {name} sees it", name)


@contextmanager
def unseen() -> Iterator[None]:
    """Operations in here are seen by no mode."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def result_tensors(out: Any) -> list[tuple[str, Tensor]]:
    """(place, tensor) of what a module returns to others: itself, in a tuple or list, in a mapping."""
    if isinstance(out, Tensor):
        return [("", out)]
    if isinstance(out, (tuple, list)):
        return [(str(i), t) for i, t in enumerate(out) if isinstance(t, Tensor)]
    if isinstance(out, dict):
        return [(str(k), t) for k, t in out.items() if isinstance(t, Tensor)]
    return []


_CACHES = ("past_key_values", "past_key_value", "cache_params")


def answer_tensors(out: Any) -> list[Tensor]:
    """The tensors of a model's whole answer, however deep in tuples, lists, mappings and dataclasses.

    An answer that is an object of another class is looked into, once. Left out are caches, which hold a
    rank's own heads: what transformers calls so, and, inside a tuple or list, pairs of equal shape
    [.., heads, tokens, head_dim]. Two layers' attention maps are no such pair: they are known by their
    key, or, directly in the tuple that is the answer, by being square (of cross-attention they are not).
    """
    known = isinstance(out, (Tensor, tuple, list, Mapping)) or is_dataclass(out)
    return list(_walk(out if known or not hasattr(out, "__dict__") else vars(out), 0))


def _walk(out: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for key, value in out.items():
            if key not in _CACHES:
                yield from _walk(value, 0 if isinstance(key, str) and "attention" in key else depth + 1)
    elif isinstance(out, (tuple, list)):
        if depth and _is_pair_of_heads(out) and (depth > 1 or out[0].shape[-1] != out[0].shape[-2]):
            return
        for value in out:
            yield from _walk(value, depth + 1)
    elif is_dataclass(out) and not isinstance(out, type):
        yield from _walk({each.name: getattr(out, each.name) for each in fields(out)}, depth)


def _is_pair_of_heads(values: Sequence[Any]) -> bool:
    """Whether this looks like the keys and values of a layer."""
    return (
        len(values) == 2
        and all(isinstance(t, Tensor) and t.dim() == 4 for t in values)
        and values[0].shape == values[1].shape
    )
