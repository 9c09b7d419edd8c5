"""The collective ops, and which transport serves a group: shared memory (shm.py), or c10d (gloo, NCCL).

An op takes the process group's name, as torch's functional collectives do, because a custom op cannot take
a group object. A group's transport is settled when it is attached, which all its ranks do together: by an
explicit `attach`, or at its first collective. At world 1 each function returns its input without an op.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from .. import env
from ..errors import CollectiveError, ConfigError
from . import shm

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_DEFAULT_TIMEOUT_S = 600.0
# Group name -> (the group, whether it is in shared memory). Names are reused when a process leaves a job
# and joins another, hence the group itself.
_attached: dict[str, tuple[weakref.ref[Any], bool]] = {}


def _group_named(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(cast(Any, name))  # a type of its own in some torch releases, str in others


@torch.library.custom_op("tp_runtime::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, reduction: str, group: str) -> Tensor:
    out = x.contiguous().clone()
    dist.all_reduce(out, op=_REDUCTIONS[reduction], group=_group_named(group))
    return out


@_all_reduce.register_fake
def _(x: Tensor, reduction: str, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("tp_runtime::all_gather", mutates_args=())
def _all_gather(x: Tensor, world_size: int, group: str) -> Tensor:
    out = x.new_empty((world_size, *x.shape))
    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=_group_named(group))
    return out


@_all_gather.register_fake
def _(x: Tensor, world_size: int, group: str) -> Tensor:
    return x.new_empty((world_size, *x.shape))


def attach(group: dist.ProcessGroup, timeout_s: float | None = None, *, shared_memory: bool = True) -> str:
    """Settle how `group` communicates, and return it: "shm" or "c10d". All its ranks call it together.

    timeout_s: how long a collective may wait for a peer (default: TP_COLLECTIVE_TIMEOUT, else 600).
    Shared memory serves CPU groups whose ranks can open each other's files, unless it is not wanted here
    or TP_COLLECTIVES=c10d.
    """
    if timeout_s is None:
        timeout_s = _timeout_from_env()
    possible = shared_memory and group.size() > 1 and shm.wanted() and _has_cpu_backend(group)
    in_shm = possible and shm.attach(group, timeout_s)
    _attached[group.group_name] = (weakref.ref(group), in_shm)
    return "shm" if in_shm else "c10d"


def set_timeout(group: dist.ProcessGroup, timeout_s: float) -> None:
    """From now on a collective of `group` may wait that long for a peer."""
    if _in_shm(group.group_name):
        torch.ops.tp_shm.set_timeout(group.group_name, timeout_s)
    elif group.size() > 1:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


@contextlib.contextmanager
def collective_errors() -> Iterator[None]:
    """Turn torch's errors for a failed collective, as compiled graphs raise them, into CollectiveError."""
    try:
        yield
    except RuntimeError as error:
        # gloo's own are plain RuntimeErrors that name its source file.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise CollectiveError(str(error).splitlines()[0]) from None
        raise


def _timeout_from_env() -> float:
    value = env.get("TP_COLLECTIVE_TIMEOUT")
    try:
        seconds = _DEFAULT_TIMEOUT_S if value is None else float(value)
    except ValueError:
        seconds = -1.0
    if seconds <= 0:
        raise ConfigError(
            f"TP_COLLECTIVE_TIMEOUT={value!r} is no positive number of seconds; unset it or give one"
        )
    return seconds


def _has_cpu_backend(group: dist.ProcessGroup) -> bool:
    return any(device.type == "cpu" for device in group._device_types)


# Inside a traced function the answer is a constant; a group is attached before it is traced, or then. By
# name, because tracing shows a stand-in for the group.
@torch.compiler.assume_constant_result
def _in_shm(group_name: str) -> bool:
    group = _group_named(group_name)
    known = _attached.get(group_name)
    if known is None or known[0]() is not group:
        attach(group)
        known = _attached[group_name]
    return known[1]


def all_reduce(x: Tensor, group: dist.ProcessGroup, reduction: str = "sum") -> Tensor:
    """The element-wise sum, max or min of every rank's x, the same bits on every rank.

    x: any shape; fp32, bf16, fp16 (both summed in fp32), int32 or int64. Returns a new tensor (x itself at
    world 1). Raises CollectiveError where a peer died or the deadline passed (a compiled graph raises
    torch's own error instead: run it within collective_errors).
    """
    if group.size() == 1:
        return x
    if torch.compiler.is_compiling():
        return _reduce(x, group, reduction)
    with collective_errors():
        return _reduce(x, group, reduction)


def _reduce(x: Tensor, group: dist.ProcessGroup, reduction: str) -> Tensor:
    if x.device.type == "cpu" and _in_shm(group.group_name):
        return torch.ops.tp_shm.all_reduce(x, reduction, group.group_name)
    return _all_reduce(x, reduction, group.group_name)


def all_reduce_op(group: dist.ProcessGroup) -> str:
    """The name of the op behind all_reduce on CPU tensors, for C++ callers: (x, reduction, group name) -> x.

    Empty at world 1.
    """
    if group.size() == 1:
        return ""
    return "tp_shm::all_reduce" if _in_shm(group.group_name) else "tp_runtime::all_reduce"


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x, stacked: [world_size, *x.shape]. All ranks bring the same shape and dtype.

    Raises as all_reduce.
    """
    if group.size() == 1:
        return x.unsqueeze(0)
    if torch.compiler.is_compiling():
        return _gather(x, group)
    with collective_errors():
        return _gather(x, group)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if x.device.type == "cpu" and _in_shm(group.group_name):
        return torch.ops.tp_shm.all_gather(x, group.size(), group.group_name)
    return _all_gather(x, group.size(), group.group_name)


def broadcast_(x: Tensor, group: dist.ProcessGroup, source: int = 0) -> Tensor:
    """Overwrite x with group rank `source`'s x, in place, and return it. Any dtype, contiguous.

    Not for compiled graphs. Raises as all_reduce.
    """
    if group.size() == 1:
        return x
    with collective_errors():
        if x.device.type == "cpu" and _in_shm(group.group_name):
            torch.ops.tp_shm.broadcast_(x, source, group.group_name)
        else:
            dist.broadcast(x, src=dist.get_global_rank(group, source), group=group)
    return x
