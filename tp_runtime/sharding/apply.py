"""Making a model one rank's part of a ShardPlan, in place, and back.

Nothing of the user's code is edited or subclassed: parameters are replaced by their parts, integers by local
ones, and hooks on modules cut arguments, sum partial results over ranks and gather cut ones. `Applied`
remembers every change, so that it can be undone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from ..collectives import all_gather, all_reduce
from ..errors import ShardingError
from .layers import take
from .multihead import (
    own_weights,
    replace_forward,
    replaceable,
    restore_forward,
    without_nested_tensors,
)
from .norms import collective_forward
from .plan import Ranges, WeightPlan, extent
from .shardplan import Gather, Integer, Norm, ShardPlan, Slice
from .surrogate import Divisible

STATE = "_tp_applied"


class Communicator(Protocol):
    """The collectives a sharded model needs."""

    rank: int
    world_size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, stacked."""


class GroupCommunicator:
    """Collectives over a process group."""

    def __init__(self, group: ProcessGroup, rank: int, world_size: int) -> None:
        self.group, self.rank, self.world_size = group, rank, world_size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x."""
        return all_reduce(x, self.group)

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, stacked."""
        return all_gather(x, self.group)


@dataclass
class Applied:
    """A plan on a model: what was changed. originals are not kept: `unshard` gathers the parts."""

    plan: ShardPlan
    comm: Communicator
    handles: list[RemovableHandle] = field(default_factory=list)
    restore: list[Callable[[], None]] = field(default_factory=list)


def applied(model: nn.Module) -> Applied | None:
    """What was applied to the model, if anything."""
    return vars(model).get(STATE)


def apply_plan(model: nn.Module, plan: ShardPlan, comm: Communicator) -> nn.Module:
    """Make `model` rank `comm.rank`'s part, in place, and return it. Raises ShardingError where it does not
    fit.
    """
    if plan.world_size != comm.world_size:
        raise ShardingError(
            f"a plan for {plan.world_size} ranks cannot be applied on {comm.world_size}; make one for those"
        )
    _check_fits(model, plan)
    state = Applied(plan, comm)
    _replace_forwards(model, plan, comm, state)
    _cut_weights(model, plan, comm.rank)
    _set_integers(model, plan, comm.rank, state)
    for path in plan.vocabularies:
        _install_vocabulary(model.get_submodule(path), plan[f"{path}.weight"], comm, state)
    for norm in plan.norms:
        _install_norm(model.get_submodule(norm.module), norm, comm, state)
    for cut in plan.slices:
        _install_slice(model.get_submodule(cut.module), cut, comm.rank, state)
    # Before the user's own hooks, which expect whole results; of both, sums come first.
    for gather in plan.gathers:
        joins = _GatherHook(gather, comm)
        state.handles.append(model.get_submodule(gather.module).register_forward_hook(joins, prepend=True))
    by_module: dict[str, list[str]] = {}
    for module, place in plan.sums:
        by_module.setdefault(module, []).append(place)
    for module, places in by_module.items():
        adds = _SumHook(comm, tuple(places))
        state.handles.append(model.get_submodule(module).register_forward_hook(adds, prepend=True))
    vars(model)[STATE] = state
    return model


# weights


def _cut_weights(model: nn.Module, plan: ShardPlan, rank: int) -> None:
    _divide_modules(model, plan, rank)
    places = parameter_places(model)
    made: dict[int, Tensor] = {}
    for weight in plan.weights:
        if weight.style == "replicate":
            continue
        for module, name in places.get(weight.name, []):
            store = module._parameters if name in module._parameters else module._buffers
            old = store[name]
            assert old is not None, f"{weight.name} is a tensor of the model"
            if id(old) not in made:
                made[id(old)] = _part(old, weight, rank)
            store[name] = made[id(old)]  # type: ignore[assignment]


def _divide_modules(model: nn.Module, plan: ShardPlan, rank: int) -> None:
    """Quantised linears, which divide themselves. All or, where one refuses, none."""
    made: dict[str, nn.Module] = {}
    divisible = {path: m for path, m in model.named_modules() if isinstance(m, Divisible)}
    for weight in plan.weights:
        path, _, leaf = weight.name.rpartition(".")
        module = divisible.get(path)
        ranges = weight.part(rank)
        if module is None or leaf != "weight" or ranges is None or weight.dim is None:
            continue
        try:
            made[path] = module.divided(weight.dim, ranges)
        except ValueError as error:
            raise ShardingError(f"{weight.name} cannot be cut: {error}; quantize after shard") from None
    for path, part in made.items():
        model.set_submodule(path, part)


def _check_fits(model: nn.Module, plan: ShardPlan) -> None:
    """Raise ShardingError where the plan is for another model, before anything is changed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    divisible = {path for path, module in modules.items() if isinstance(module, Divisible)}
    shapes = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for weight in plan.weights:
        found = shapes.get(weight.name)
        if weight.style == "replicate" or weight.name.rpartition(".")[0] in divisible:
            continue
        if found != weight.shape:
            what = "does not exist" if found is None else f"has shape {found}"
            raise ShardingError(
                f"{weight.name} {what} and the plan is for {weight.shape}; make a plan of this model"
            )
    owners = [i.owner.partition(">")[0] for i in plan.integers]
    gathered, sliced = [g.module for g in plan.gathers], [s.module for s in plan.slices]
    hooked = [*(module for module, _ in plan.sums), *gathered, *sliced, *(n.module for n in plan.norms)]
    for path in [*hooked, *plan.vocabularies, *owners]:
        if path not in modules:
            raise ShardingError(f"the plan names {path}, which the model has not; make a plan of this model")
    for integer in plan.integers:
        path, _, attribute = integer.owner.partition(">")
        holder = vars(modules[path]).get(attribute) if attribute else modules[path]
        value = getattr(holder, integer.name, None)
        if integer.index is not None and isinstance(value, (list, tuple)):
            value = value[integer.index] if integer.index < len(value) else None
        if value != integer.whole:
            raise ShardingError(
                f"{integer.name} of {integer.owner or 'the model'} is {value} and the plan is for "
                f"{integer.whole}; make a plan of this model"
            )


def parameter_places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """(module, attribute) of each parameter and buffer, by its first name; tied ones have several."""
    first: dict[int, str] = {}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                full = first.setdefault(id(tensor), f"{path}.{name}" if path else name)
                found.setdefault(full, []).append((module, name))
    return found


def _part(tensor: Tensor, weight: WeightPlan, rank: int) -> Tensor:
    data = tensor.detach()
    if weight.style == "once":
        part = data if rank == 0 else torch.zeros_like(data)
    else:
        ranges = weight.part(rank)
        assert ranges is not None and weight.dim is not None, f"{weight.name} is cut"
        part = take(data, weight.dim, ranges)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


# integers


def _set_integers(model: nn.Module, plan: ShardPlan, rank: int, state: Applied) -> None:
    """Integers of modules in place; those of a shared object (a configuration) in a copy for the modules
    below the model, so that the model's own configuration stays the whole model's.
    """
    by_object: dict[str, list[Integer]] = {}
    for integer in plan.integers:
        if ">" in integer.owner:
            by_object.setdefault(integer.owner, []).append(integer)
        else:
            _set(model.get_submodule(integer.owner), integer, rank, state)
    for owner, integers in by_object.items():
        path, _, attribute = owner.partition(">")
        original = vars(model.get_submodule(path))[attribute]
        local = copy.copy(original)
        for integer in integers:
            _set(local, integer, rank, None)
        for child in model.modules():
            if child is model:
                continue
            for name, value in list(vars(child).items()):
                if value is original:
                    vars(child)[name] = local
                    state.restore.append(_restorer(vars(child), name, original))


def _set(holder: Any, integer: Integer, rank: int, state: Applied | None) -> None:
    store = vars(holder)
    old = store[integer.name]
    value: Any = integer.values[rank]
    if integer.index is not None:
        value = type(old)(value if place == integer.index else item for place, item in enumerate(old))
    if state is not None:
        state.restore.append(_restorer(store, integer.name, old))
    store[integer.name] = value


def _restorer(store: dict[str, Any], name: str, value: Any) -> Callable[[], None]:
    def restore() -> None:
        store[name] = value

    return restore


# hooks


class _SumHook:
    """Adds a module's partial results over ranks."""

    def __init__(self, comm: Communicator, places: tuple[str, ...]) -> None:
        self.comm, self.places = comm, places

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        for place in self.places:
            if isinstance(out, Tensor) != (place == ""):
                raise ShardingError(
                    f"{type(module).__name__} returns a {type(out).__name__}, which it did not for its "
                    "plan's example; pass shard example_inputs for which it does"
                )
            out = replace_at(out, place, self.comm.all_reduce)
        return out


class _GatherHook:
    """Joins a module's cut result."""

    def __init__(self, gather: Gather, comm: Communicator) -> None:
        self.comm = comm
        self.sizes = [extent(ranges) for ranges in gather.parts]
        order = [i for ranges in gather.parts for a, b in ranges for i in range(a, b)]
        self.order = None if order == sorted(order) else sorted(range(len(order)), key=order.__getitem__)

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return gather_parts(out, self.sizes, self.order, self.comm)


def gather_parts(x: Tensor, sizes: list[int], order: list[int] | None, comm: Communicator) -> Tensor:
    """The whole of a tensor whose last dim is cut into parts of `sizes`, put in `order`."""
    if max(sizes) > x.shape[-1]:
        x = F.pad(x, (0, max(sizes) - x.shape[-1]))
    every = comm.all_gather(x)
    whole = torch.cat([every[rank][..., :size] for rank, size in enumerate(sizes)], dim=-1)
    return whole if order is None else whole[..., torch.tensor(order, device=whole.device)]


def replace_at(out: Any, place: str, change: Callable[[Tensor], Tensor]) -> Any:
    """The result of a module with `change` applied to one of its tensors."""
    if place == "" and isinstance(out, Tensor):
        return change(out)
    if isinstance(out, dict):
        made = copy.copy(out)
        made[place] = change(out[place])
        return made
    if isinstance(out, (tuple, list)):
        return type(out)(change(item) if str(i) == place else item for i, item in enumerate(out))
    return out


def _replace_forwards(model: nn.Module, plan: ShardPlan, comm: Communicator, state: Applied) -> None:
    """Of torch's own attentions and encoders, as in the copies of the proof. Weights are still whole."""
    if all(weight.dim is None for weight in plan.weights):
        return
    plans = {weight.name: weight for weight in plan.weights}
    projections = {
        id(module): plans[name]
        for name, places in parameter_places(model).items()
        for module, attribute in places
        if attribute in ("in_proj_weight", "q_proj_weight") and name in plans
    }
    for attention in replaceable(model):
        weights = _attention_weights(projections.get(id(attention)), attention.head_dim, comm)
        replace_forward(attention, weights)
        state.restore.append(partial(restore_forward, attention))
    state.restore += without_nested_tensors(model)


def _attention_weights(
    weight: WeightPlan | None, head_dim: int, comm: Communicator
) -> Callable[[Tensor, bool], Tensor]:
    """How the attention weights of each head on this rank become the whole module's. weight: its first rows,
    as many as it has columns, make queries.
    """
    if weight is None or weight.dim is None:
        return own_weights
    queries = weight.shape[1]
    rows = [[i for a, b in ranges for i in range(a, min(b, queries))] for ranges in weight.parts]
    heads = [[row // head_dim for row in held if row % head_dim == 0] for held in rows]
    order = [head for held in heads for head in held]
    back = sorted(range(len(order)), key=order.__getitem__)

    def whole(weights_BHLS: Tensor, average: bool) -> Tensor:
        if average:
            return comm.all_reduce(weights_BHLS.sum(dim=1)) / len(order)
        last = weights_BHLS.movedim(1, -1).contiguous()
        return gather_parts(last, [len(held) for held in heads], back, comm).movedim(-1, 1)

    return whole


def _install_slice(module: nn.Module, cut: Slice, rank: int, state: Applied) -> None:
    indices = [i for a, b in cut.parts[rank] for i in range(a, b)]

    def part(x: Tensor) -> Tensor:
        if x.dim() < -cut.dim or x.shape[cut.dim] < cut.period:
            return x
        if len(cut.parts[rank]) == 1 and x.shape[cut.dim] == cut.period:
            start, stop = cut.parts[rank][0]
            return x.narrow(cut.dim, start, stop - start)
        full = [p + i for p in range(0, int(x.shape[cut.dim]), cut.period) for i in indices]
        return x.index_select(cut.dim, torch.tensor(full, device=x.device))

    if cut.kind == "result":
        state.handles.append(
            module.register_forward_hook(lambda _m, _a, out: replace_at(out, cut.place, part))
        )
        return

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if cut.place.isdecimal():
            place = int(cut.place)
            if place < len(args) and isinstance(args[place], Tensor):
                args = (*args[:place], part(args[place]), *args[place + 1 :])
        elif isinstance(kwargs.get(cut.place), Tensor):
            kwargs = {**kwargs, cut.place: part(kwargs[cut.place])}
        return args, kwargs

    state.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))


def _install_vocabulary(module: nn.Module, weight: WeightPlan, comm: Communicator, state: Applied) -> None:
    """The embedding looks up tokens it holds, brings zeros for others, and sums them over ranks."""
    ((start, stop),) = weight.parts[comm.rank]
    look_up = module.forward

    def forward(ids: Tensor) -> Tensor:
        held = (ids >= start) & (ids < stop)
        part = look_up(torch.where(held, ids - start, 0))
        return comm.all_reduce(torch.where(held.unsqueeze(-1), part, 0))

    if "padding_idx" in vars(module):  # of the gradient only, and checked against the rows
        state.restore.append(_restorer(vars(module), "padding_idx", vars(module)["padding_idx"]))
        vars(module)["padding_idx"] = None
    vars(module)["forward"] = forward
    state.restore.append(lambda: vars(module).pop("forward", None))


def _install_norm(module: nn.Module, norm: Norm, comm: Communicator, state: Applied) -> None:
    vars(module)["forward"] = collective_forward(module, norm, comm)
    state.restore.append(lambda: vars(module).pop("forward", None))


def unapply(model: nn.Module) -> nn.Module:
    """Make a sharded model whole again, in place: parts are gathered, hooks removed, integers restored."""
    state = applied(model)
    if state is None:
        return model
    if any(w.dim is not None and _no_tensor(model, w.name) for w in state.plan.weights):
        raise ShardingError("a quantised model cannot be made whole again; unshard it before quantize")
    for handle in state.handles:
        handle.remove()
    for restore in reversed(state.restore):
        restore()
    places = parameter_places(model)
    made: dict[int, Tensor] = {}
    for weight in state.plan.weights:
        if weight.style == "replicate":
            continue
        for module, name in places.get(weight.name, []):
            store = module._parameters if name in module._parameters else module._buffers
            old = store[name]
            assert old is not None, f"{weight.name} is a tensor of the model"
            if id(old) not in made:
                whole = gather_weight(old.detach(), weight, state.comm)
                made[id(old)] = (
                    nn.Parameter(whole, old.requires_grad) if isinstance(old, nn.Parameter) else whole
                )
            store[name] = made[id(old)]  # type: ignore[assignment]
    vars(model).pop(STATE)
    return model


def _no_tensor(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf, None) is None


def gather_weight(part: Tensor, weight: WeightPlan, comm: Communicator) -> Tensor:
    """The whole of a weight from every rank's part. Copies are taken from the first rank that has them."""
    if weight.style == "once":
        return comm.all_gather(part)[0].clone()
    assert weight.dim is not None, f"{weight.name} is cut"
    sizes = [extent(ranges) for ranges in weight.parts]
    moved = part.movedim(weight.dim, -1)
    if max(sizes) > moved.shape[-1]:
        moved = F.pad(moved, (0, max(sizes) - moved.shape[-1]))
    every = comm.all_gather(moved.contiguous())
    whole = moved.new_empty((*moved.shape[:-1], weight.shape[weight.dim]))
    for rank in reversed(range(comm.world_size)):
        at = 0
        for start, stop in weight.parts[rank]:
            whole[..., start:stop] = every[rank][..., at : at + stop - start]
            at += stop - start
    return whole.movedim(-1, weight.dim).contiguous()


def ranges_of(mask: list[bool]) -> Ranges:
    """The runs of True."""
    found: list[tuple[int, int]] = []
    for place, held in enumerate(mask):
        if held and found and found[-1][1] == place:
            found[-1] = found[-1][0], place + 1
        elif held:
            found.append((place, place + 1))
    return tuple(found)
