"""Example inputs: what a model is traced and verified with, where the user gives none.

What a forward function is called with is read from its signature and from errors, never from a model's name:
token ids for a model with an embedding, images for one that begins with a convolution, rows for a
linear. Token ids of several rows and positions, so that experts are hit and batch and sequence differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShardingError

TOKENS = 16
MAX_PATCHES = 64  # along a side of an image
BATCHES = (2, 8, 4, 6, 12, 18)


Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # module path, positional arguments, keyword arguments


@dataclass
class Example:
    """What is called: the model, and modules of it on their own. cached: keyword arguments of a call with the
    model's own cache, or None."""

    calls: list[Call]
    cached: dict[str, Any] | None = None

    def run(self, model: nn.Module) -> list[Any]:
        """The results of all calls (of the cached one: after its first step)."""
        outs = []
        for path, args, kwargs in self.calls:
            outs.append(model.get_submodule(path)(*args, **kwargs))
        if self.cached is not None:
            outs += _cached_steps(model, self.cached)
        return outs


def _cached_steps(model: nn.Module, inputs: dict[str, Any]) -> list[Any]:
    """Prefill and one decode step with the model's own cache."""
    name = next(iter(inputs))
    ids = inputs[name]
    first = model(**{**inputs, name: ids[:, :-1]}, use_cache=True)
    past = {
        key: first[key] for key in ("past_key_values", "cache_params", "state") if first.get(key) is not None
    }
    results = [first]
    if past:
        results.append(model(**{**inputs, name: ids[:, -1:]}, **past, use_cache=True))
    return [{k: v for k, v in out.items() if isinstance(v, Tensor)} for out in results]


def find_example(model: nn.Module, given: Any = None) -> Example:
    """Inputs that the model's forward accepts. model: a disposable copy; given: the user's example inputs (a
    dict of keyword arguments, a tuple of positional ones, or one tensor). Raises ShardingError where none
    works.
    """
    if given is not None:
        if isinstance(given, dict):
            return Example([("", (), given)])
        return Example([("", tuple(given) if isinstance(given, (tuple, list)) else (given,), {})])
    errors: list[str] = []
    for guess in _guesses(model):
        if _works(partial(model, *guess[0], **guess[1]), errors):
            found = Example([("", *guess)])
            cached = {k: v for k, v in guess[1].items() if k != "use_cache"}
            if "use_cache" in guess[1] and _works(partial(_cached_steps, model, cached), []):
                found.cached = cached
            return found
    reason = errors[0] if errors else "its forward has no argument that looks like tokens, an image or rows"
    raise ShardingError(
        f"{type(model).__name__} cannot be traced with guessed inputs ({reason[:200]}); pass "
        "example_inputs, a dict of the arguments of its forward"
    )


def _works(call: Callable[[], Any], errors: list[str]) -> bool:
    try:
        with torch.no_grad():
            call()
    except Exception as error:  # noqa: BLE001  (any model, any complaint: the next guess is tried)
        errors.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return False
    return True


def _guesses(model: nn.Module) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    parameters = inspect.signature(model.forward).parameters
    named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not named:
        return []
    extra = {"use_cache": False} if "use_cache" in named or "past_key_values" in named else {}
    guesses: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    vocabulary = _vocabulary(model)
    tokens = "input_ids" if "input_ids" in named else named[0]
    if vocabulary and tokens != "pixel_values":
        for batch in BATCHES:
            ids = tokens_for(batch, vocabulary)
            for more in ({}, {"decoder_input_ids": ids[:, :8]} if "decoder_input_ids" in named else {}):
                guesses.append(((), {tokens: ids, **more, **extra}))
                if extra:
                    guesses.append(((), {tokens: ids, **more}))
            if "pixel_values" in named:
                for image in images_for(model):
                    guesses.append(((), {tokens: ids[:, :8], "pixel_values": image}))
    for image in images_for(model):
        guesses.append(((), {"pixel_values" if "pixel_values" in named else named[0]: image}))
    for width in _widths(model):
        rows = torch.randn(2, TOKENS, width, generator=_generator())
        guesses += [((), {named[0]: rows}), ((), {named[0]: rows[0]})]
    return guesses


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def tokens_for(batch: int, vocabulary: int) -> Tensor:
    """Token ids [batch, TOKENS]."""
    low = min(5, vocabulary - 1)
    return torch.randint(low, max(vocabulary - 10, low + 1), (batch, TOKENS), generator=_generator())


def _vocabulary(model: nn.Module) -> int:
    """Rows of the embedding that takes token ids: the largest one."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    sizes = [e.num_embeddings for e in embeddings]
    get = getattr(model, "get_input_embeddings", None)
    if get is not None:
        try:
            found = get()
        except (NotImplementedError, AttributeError):
            found = None
        if isinstance(found, nn.Embedding):
            return found.num_embeddings
    return max(sizes, default=0)


def images_for(model: nn.Module) -> list[Tensor]:
    """Images for the first convolution of the model: small ones first, for speed."""
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        return []
    sides: list[int] = []
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "vision_config", None)):
        side = getattr(holder, "image_size", None)
        if isinstance(side, (int, list, tuple)):
            sides.append(side if isinstance(side, int) else int(side[0]))
    stride = int(convolution.stride[0])
    sides = [4 * stride, 8 * stride, 16 * stride, *(side for side in sides if side <= MAX_PATCHES * stride)]
    return [torch.randn(1, convolution.in_channels, side, side, generator=_generator()) for side in sides]


def _widths(model: nn.Module) -> list[int]:
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    return [linear.in_features] if linear is not None else []
