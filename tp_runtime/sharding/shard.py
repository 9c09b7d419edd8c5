"""shard, unshard, plan, explain: tensor parallelism for models nobody edited.

    mesh = tp_runtime.init_mesh()
    model = tp_runtime.shard(transformers.AutoModelForCausalLM.from_pretrained(path), mesh)

`shard` reads the plan off a traced forward pass (`trace`, `planner`), proves it in one process (`verify`) and
makes the model this rank's part in place (`apply`). Rank 0 finds the plan and the others get it, so that all
ranks decide alike. docs/sharding.md says how it works and what it makes of which model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .. import log
from ..collectives import broadcast_
from ..errors import ShardingError
from ..mesh import tp_group, tp_rank, tp_size
from .apply import GroupCommunicator, applied, apply_plan, unapply
from .asked import watch_requests
from .declared import check_followed, declared_styles
from .plan_cache import read_plan, structure_key, write_plan
from .planner import prove, search_plan
from .shardplan import ShardPlan, plan_from_json, plan_to_json


def plan(
    model: nn.Module,
    mesh: DeviceMesh | int,
    *,
    plan: Any = "trace",
    example_inputs: Any = None,
    verify: bool = True,
    cache: bool = True,
) -> ShardPlan:
    """How `shard` would divide the model, as data; print it for a table. Nothing is changed, no rank is
    needed.

    mesh: a DeviceMesh with a "tp" axis, or a number of ranks. The model may be on the meta device.
    Arguments and errors otherwise as `shard`.
    """
    world = mesh if isinstance(mesh, int) else tp_size(mesh)
    if world < 1:
        raise ShardingError(f"a model cannot be divided over {world} ranks; ask for 1 or more")
    _refuse_other(model)
    if isinstance(plan, ShardPlan):
        if verify:
            prove(model, plan, example_inputs)
        return plan
    styles = None if isinstance(plan, str) and plan == "trace" else declared_styles(model, plan)
    key = structure_key(model, world, styles, example_inputs, verify) if cache else ""
    found = read_plan(key) if key else None
    if found is None:
        found = search_plan(model, world, example_inputs, styles=styles, verify=verify)
        if styles is not None:
            check_followed(found, styles)
        if key and not found.cut_short:
            write_plan(key, found)
    if found.branches:
        log.get_logger().warning(
            "%s decides by values at %s; its plan holds for the side that the example took: pass "
            "example_inputs that take yours",
            type(model).__name__,
            ", ".join(found.branches),
        )
    if world > 1 and styles is None and all(w.dim is None for w in found.weights):
        _complain_if_smaller_works(model, world, example_inputs, verify)
    return found


def _refuse_other(model: nn.Module) -> None:
    """Raise ShardingError for what is no model, or one that is sharded."""
    if not isinstance(model, nn.Module):
        raise ShardingError(f"{model!r} is no torch.nn.Module; give a model")
    for path, module in model.named_modules():
        if applied(module) is not None:
            raise ShardingError(f"{path or 'the model'} is sharded already; unshard it first")


def _complain_if_smaller_works(model: nn.Module, world: int, example_inputs: Any, verify: bool) -> None:
    """A model that stays whole is right on any mesh, but where fewer ranks can divide it, that is what was
    meant.
    """
    for smaller in range(world - 1, 1, -1):
        smaller_plan = search_plan(model, smaller, example_inputs, verify=verify)
        if any(w.dim is not None for w in smaller_plan.weights):
            raise ShardingError(
                f"{type(model).__name__} has too few independent units for {world} ranks; "
                f"use {smaller} ranks or fewer"
            )
    log.get_logger().warning(
        "nothing in %s can be divided over %d ranks; each holds all of it", type(model).__name__, world
    )


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    plan: Any = "trace",
    example_inputs: Any = None,
    verify: bool = True,
    cache: bool = True,
) -> nn.Module:
    """Make `model` this rank's part of itself, in place, and return it. Every rank of the mesh calls it.

    mesh: a DeviceMesh; its "tp" axis is used. plan: "trace" (found from the model itself), "declared" (the
    plan that a transformers model brings), a dict of names and styles ("column", "row", "gather",
    "replicate"), a Plan or a ShardPlan; all are proved. example_inputs: keyword arguments of forward (a
    dict), positional ones (a tuple) or one tensor, where they cannot be guessed. verify: compare the ranks
    with the whole model on a small input first. cache: keep and use plans below TP_CACHE_DIR.

    Raises ConfigError for a mesh without a "tp" axis, and ShardingError for a model that is sharded already,
    that cannot be traced, that a declared plan does not fit, or that has too few units for the mesh.
    """
    world, rank, group = tp_size(mesh), tp_rank(mesh), tp_group(mesh)
    _refuse_other(model)
    wanted = plan

    def find() -> ShardPlan:
        return globals()["plan"](
            model, world, plan=wanted, example_inputs=example_inputs, verify=verify, cache=cache
        )

    made = find() if world == 1 else _agreed(find, rank, group)
    sharded = apply_plan(model, made, GroupCommunicator(group, rank, world))
    state = applied(sharded)
    if world > 1 and state is not None and not (isinstance(wanted, ShardPlan) and example_inputs is None):
        state.handles.append(watch_requests(sharded, example_inputs))
    return sharded


def _agreed(find: Any, rank: int, group: dist.ProcessGroup) -> ShardPlan:
    """Rank 0's plan, or its error, on all ranks."""
    answer = ""
    failure: Exception | None = None
    if rank == 0:
        try:
            answer = plan_to_json(find())
        except Exception as error:  # noqa: BLE001  (raised below, when the ranks that wait know)
            failure = error
            known = isinstance(error, ShardingError)
            answer = "!" + (
                str(error) if known else f"rank 0 found no plan ({type(error).__name__}: {error})"
            )
    data = answer.encode()
    size = broadcast_(torch.tensor([len(data)]), group)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if rank == 0:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    answer = broadcast_(buffer, group).numpy().tobytes().decode()
    if failure is not None:
        raise failure
    if answer.startswith("!"):
        raise ShardingError(answer[1:])
    return plan_from_json(answer)


def unshard(model: nn.Module) -> nn.Module:
    """Make a sharded model whole again on every rank, in place, and return it. Every rank calls it.

    A model that is not sharded is returned as it is.
    """
    return unapply(model)


def explain(model: nn.Module | ShardPlan, name: str) -> str:
    """Why a weight (or each weight of a module) is divided as it is, or whole.

    model: a sharded model, or a plan. Raises ShardingError for a model that is not sharded and for an unknown
    name.
    """
    if isinstance(model, ShardPlan):
        made = model
    else:
        state = applied(model)
        if state is None:
            raise ShardingError("the model is not sharded; pass it through shard, or pass a plan")
        made = state.plan
    try:
        return made.explain(name)
    except KeyError:
        raise ShardingError(
            f"no weight is called {name!r}; names are those of model.named_parameters()"
        ) from None
