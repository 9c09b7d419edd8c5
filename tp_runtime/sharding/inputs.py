"""Example inputs: what a model is traced and verified with, where the user gives none.

What a forward function is called with is read from its signature and from errors, never from a model's name:
token ids for a model with an embedding, images for one that begins with a convolution, rows for a
linear. Token ids of several rows and positions, so that experts are hit and batch and sequence differ; and
once more with a mask of a batch padded on the left, where forward takes one: attention is then another code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ShardingError
from .surrogate import LARGE_WEIGHT, proof_dtype

TOKENS = 16
FEW_TOKENS = (
    1024  # ids drawn for a large vocabulary are below this, so that a proof can do with its first rows
)
MASK = "attention_mask"
PADDING = 3  # positions
MAX_PATCHES = 64  # along a side of an image
BATCHES = (2, 8, 4, 6, 12, 18)


Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # module path, positional arguments, keyword arguments


@dataclass
class Example:
    """What is called: the model, and modules of it on their own. cached: keyword arguments of a call with the
    model's own cache, or None. proved_only: how many of the first calls are for proofs and not traced,
    because another one reads more of the model."""

    calls: list[Call]
    cached: dict[str, Any] | None = None
    proved_only: int = 0

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
    shorter = {MASK: inputs[MASK][:, :-1]} if MASK in inputs else {}
    first = model(**{**inputs, name: ids[:, :-1], **shorter}, use_cache=True)
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
    errors: list[str] = []
    with Sketch():
        if given is not None:
            return _given_example(model, given)
        for guess in _guesses(model):
            if _works(partial(model, *guess[0], **guess[1]), errors):
                return _with_cache_and_mask(model, guess)
    reason = errors[0] if errors else "its forward has no argument that looks like tokens, an image or rows"
    raise ShardingError(
        f"{type(model).__name__} cannot be traced with guessed inputs ({reason[:200]}); pass "
        "example_inputs, a dict of the arguments of its forward"
    )


def _given_example(model: nn.Module, given: Any) -> Example:
    """The user's inputs, as the copy takes them."""
    given = _for_proof(given)
    kwargs = given if isinstance(given, dict) else {}
    args = () if kwargs else tuple(given) if isinstance(given, (tuple, list)) else (given,)
    errors: list[str] = []
    if not _works(partial(model, *args, **kwargs), errors):
        raise ShardingError(
            f"{type(model).__name__} does not run on the example_inputs ({errors[0][:200]}); pass what its "
            "forward takes, a dict by keyword or a tuple by position"
        )
    return Example([("", args, kwargs)])


def _for_proof(value: Any) -> Any:
    """Tensors on the CPU, floating ones in fp32."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", proof_dtype(value.dtype))
    if isinstance(value, dict):
        return {key: _for_proof(item) for key, item in value.items()}
    return type(value)(map(_for_proof, value)) if type(value) in (tuple, list) else value


def _with_cache_and_mask(model: nn.Module, guess: tuple[tuple[Any, ...], dict[str, Any]]) -> Example:
    """The guess, which works, besides with a mask of padding and with the model's own cache where it can."""
    found = Example([("", *guess)])
    cached = {k: v for k, v in guess[1].items() if k != "use_cache"}
    ids = next(iter(cached.values()), None)
    names = inspect.signature(model.forward).parameters
    if MASK in names and isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
        mask = torch.ones_like(ids)
        mask[1::2, :PADDING] = 0
        if _works(partial(model, **guess[1], **{MASK: mask}), []):
            found.calls.append(("", guess[0], {**guess[1], MASK: mask}))
            found.proved_only = 1
            cached[MASK] = mask
    if "use_cache" in guess[1] and _works(partial(_cached_steps, model, cached), []):
        found.cached = cached
    return found


class Sketch(TorchDispatchMode):
    """Runs operations, but draws the result of a product with a matrix of many million elements: for whether
    a call works, and what it reaches, that does as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in ("mm", "addmm", "bmm", "_grouped_mm"):
            a, b = args[1:3] if name == "addmm" else args[:2]
            if max(a.numel(), b.numel()) > LARGE_WEIGHT and a.shape[-1] == b.shape[-2]:
                return torch.randn((*a.shape[:-1], b.shape[-1]), generator=self.generator, dtype=a.dtype)
        return func(*args, **(kwargs or {}))


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
    if any(m.weight.numel() > LARGE_WEIGHT for m in model.modules() if isinstance(m, nn.Embedding)):
        vocabulary = min(vocabulary, FEW_TOKENS)
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
