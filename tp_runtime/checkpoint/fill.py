"""load(model, path): fill a model that nobody edited, whole or sharded, from safetensors.

A model on the meta device has shapes and no values. `shard` makes it this rank's part while it is still on
meta, and `load` then reads this rank's slices alone: its peak memory is its share and one weight. Names in
the file are those of `model.state_dict()`; a model whose checkpoint has other names (transformers renames
and joins some when it loads) is loaded by its own library and sharded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..sharding.apply import applied, parameter_places
from ..sharding.plan import Ranges, WeightPlan
from .inventory import require_exists, same_values
from .safetensors_header import SafetensorsEntry, read_safetensors_headers


def load(model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Fill `model` from a safetensors file, an index or a folder with either; return it.

    model: on the meta device or not, sharded by `shard` or whole. dtype: of its floating weights; by
    default each parameter's own. Tied weights need one name in the file; where it has several, they hold the
    same values. Buffers that no file holds are
    made by the model's own `_init_weights`, where it has one.
    Raises CheckpointError, before anything is filled, for a tensor that is missing or of another shape and
    for tied ones that differ; and for a buffer that stays without values.
    """
    require_exists(Path(path))
    held = read_safetensors_headers(Path(path))
    state = applied(model)
    plans = {} if state is None else {w.name: w for w in state.plan.weights}
    rank = 0 if state is None else state.comm.rank
    places = parameter_places(model)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    optional = _unsaved(model)
    chosen: dict[str, SafetensorsEntry] = {}
    stored: dict[str, str] = {}
    for name, found in places.items():
        tensor = _at(*found[0])
        source = next((n for n in [name, *aliases.get(id(tensor), [])] if n in held), None)
        if source is None:
            if name not in optional:
                raise CheckpointError(
                    f"{path} has no tensor {name!r}; give weights whose names are those of model.state_dict()"
                )
            continue
        shape = plans[name].shape if name in plans else tuple(tensor.shape)
        if held[source].shape != shape:
            raise CheckpointError(
                f"{path}: tensor {source!r} has shape {list(held[source].shape)}, not {list(shape)}; give "
                "the weights that belong to the model's config"
            )
        for other in aliases.get(id(tensor), []):
            if other in held and not same_values(held[other], held[source]):
                raise CheckpointError(
                    f"{path} holds other values for {other!r} than for {source!r}, which the model ties; "
                    "make the model with tie_word_embeddings=False"
                )
        chosen[name], stored[name] = held[source], source
    for name, entry in chosen.items():
        _fill(places[name], entry, stored[name], plans.get(name), rank, dtype)
    _make_buffers(model, str(path))
    return model


def _at(module: nn.Module, leaf: str) -> Tensor:
    tensor: Tensor = getattr(module, leaf)
    return tensor


def _unsaved(model: nn.Module) -> set[str]:
    """Names of the buffers that a state dict leaves out."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _fill(
    found: list[tuple[nn.Module, str]],
    entry: SafetensorsEntry,
    name: str,
    plan: WeightPlan | None,
    rank: int,
    dtype: torch.dtype | None,
) -> None:
    """Put this rank's part of a stored tensor wherever the model keeps it."""
    old = _at(*found[0])
    with safe_open(entry.path, framework="pt") as file:
        data = read_part(file.get_slice(name), plan, rank)
    if plan is not None and plan.style == "once" and rank > 0:
        data = torch.zeros_like(data)
    wanted = dtype if dtype is not None and old.is_floating_point() else old.dtype
    data = data.to(device="cpu" if old.is_meta else old.device, dtype=wanted).contiguous()
    made: Tensor = nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data
    for module, leaf in found:
        store: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        store[leaf] = made


def read_part(stored: Any, plan: WeightPlan | None, rank: int) -> Tensor:
    """One rank's part of a tensor in a file, reading no more than it. stored: a slice of safetensors."""
    ranges: Ranges | None = None if plan is None else plan.part(rank)
    if ranges is None or plan is None or plan.dim is None:
        return stored[:] if stored.get_shape() else stored[...]
    before: tuple[slice, ...] = (slice(None),) * plan.dim
    parts = [stored[(*before, slice(start, stop))] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=plan.dim)


def _make_buffers(model: nn.Module, path: str) -> None:
    """Values of the buffers that stayed on meta, by the model's own initialiser of a module."""
    own: Callable[[nn.Module], None] | None = getattr(model, "_init_weights", None)
    for name, module in model.named_modules():
        empty = [leaf for leaf, b in module._buffers.items() if b is not None and b.is_meta]
        if not empty:
            continue
        for leaf in empty:
            buffer = module._buffers[leaf]
            assert buffer is not None, f"{leaf} is a buffer"
            made = torch.empty_like(buffer, device="cpu")
            module._buffers[leaf] = made.fill_(torch.nan) if made.is_floating_point() else made.zero_()
        if own is not None:
            with torch.no_grad():
                own(module)
        for leaf in empty:
            buffer = module._buffers[leaf]
            if buffer is None or own is None or (buffer.is_floating_point() and bool(buffer.isnan().any())):
                raise CheckpointError(
                    f"{path} has no values for the buffer {name}.{leaf}; build the model with real buffers"
                )
