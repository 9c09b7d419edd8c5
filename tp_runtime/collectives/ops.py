"""The collective ops, and which transport serves a group: shared memory (shm.py), c10d (gloo, NCCL), or
shared memory inside each host and c10d among hosts (hosts.py).

An op takes the process group's name, as torch's functional collectives do, because a custom op cannot take
a group object. A group's transport is settled when it is attached, which all its ranks do together: by an
explicit `attach`, or at its first collective. At world 1 each function returns its input without an op.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from .. import env
from ..config import COLLECTIVES
from ..errors import CollectiveError, ConfigError
from ..log import once
from . import shm
from .hosts import Hosts

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class _Attached:
    """How a group communicates. Names are reused when a process leaves a job and joins another, hence the
    group itself. in_shm: all of it in shared memory. hosts: set where it spans several hosts, two levels."""

    group: weakref.ref[Any]
    in_shm: bool = False
    hosts: Hosts | None = None

    @property
    def transport(self) -> str:
        return "shm" if self.in_shm else "c10d" if self.hosts is None else "shm+c10d"


_attached: dict[str, _Attached] = {}


def _group_named(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(cast(Any, name))  # a type of its own in some torch releases, str in others


@torch.library.custom_op("tp_runtime::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, reduction: str, group: str) -> Tensor:
    hosts = _hosts_of(x, group)
    if hosts is not None and x.numel():
        return hosts.all_reduce(x.contiguous(), reduction, _group_named(group))
    out = x.contiguous().clone()
    dist.all_reduce(out, op=_REDUCTIONS[reduction], group=_group_named(group))
    return out


@_all_reduce.register_fake
def _(x: Tensor, reduction: str, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("tp_runtime::all_gather", mutates_args=())
def _all_gather(x: Tensor, world_size: int, group: str) -> Tensor:
    hosts = _hosts_of(x, group)
    if hosts is not None and x.numel():
        return hosts.all_gather(x.contiguous(), _group_named(group))
    out = x.new_empty((world_size, *x.shape))
    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=_group_named(group))
    return out


@_all_gather.register_fake
def _(x: Tensor, world_size: int, group: str) -> Tensor:
    return x.new_empty((world_size, *x.shape))


def attach(
    group: dist.ProcessGroup, timeout_s: float | None = None, *, transport: str = "auto", host: str = ""
) -> str:
    """Settle how `group` communicates, and return it. All its ranks call it together.

    Returns "shm", "shm+c10d" (shared memory inside each host, c10d among hosts) or "c10d". timeout_s: how
    long a collective may wait for a peer (default: TP_COLLECTIVE_TIMEOUT, else 600). transport: "auto"
    (what TP_COLLECTIVES says; else shared memory among CPU ranks that can open each other's files), "shm"
    (or ConfigError), or "c10d". host: ranks that give different names count as on different hosts.
    """
    if timeout_s is None:
        timeout_s = _timeout_from_env()
    wanted = _chosen(transport)
    by_host: shm.RanksByHost = ()
    if wanted != "c10d" and group.size() > 1:
        trouble = "the group has no CPU ranks"
        if _has_cpu_backend(group):
            by_host, trouble = shm.attach(group, timeout_s, host)
            if trouble and wanted == "auto":
                once(f"collectives go through c10d, not shared memory ({trouble})")
        if trouble and wanted == "shm":
            raise ConfigError(
                f"shared memory was asked for and is not to be had: {trouble}; mend that, or use "
                "--collectives auto (TP_COLLECTIVES=auto) to go through c10d"
            )
    hosts = None
    if len(by_host) > 1:
        hosts = Hosts(by_host, group.rank(), shm.local_name(group, by_host), timeout_s)
    found = _Attached(weakref.ref(group), len(by_host) == 1, hosts)
    _attached[group.group_name] = found
    return found.transport


def _chosen(transport: str) -> str:
    """`transport`, or what TP_COLLECTIVES says in place of "auto". Raises ConfigError for unknown ones."""
    source, choice = "transport", transport
    if transport == "auto":
        source, choice = "TP_COLLECTIVES", env.get("TP_COLLECTIVES") or "auto"
    if choice not in COLLECTIVES:
        raise ConfigError(f"{source}={choice!r} is not known; use one of: {', '.join(COLLECTIVES)}")
    return choice


def set_timeout(group: dist.ProcessGroup, timeout_s: float) -> None:
    """From now on a collective of `group` may wait that long for a peer."""
    if group.size() == 1:
        return
    found = _find(group.group_name)
    if found.in_shm:
        torch.ops.tp_shm.set_timeout(group.group_name, timeout_s)
    elif found.hosts is not None:
        found.hosts.set_timeout(timeout_s)
    else:
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


def _find(group_name: str) -> _Attached:
    """How the group communicates; attached now if it was not."""
    group = _group_named(group_name)
    known = _attached.get(group_name)
    if known is None or known.group() is not group:
        attach(group)
        known = _attached[group_name]
    return known


# Inside a traced function the answer is a constant; a group is attached before it is traced, or then. By
# name, because tracing shows a stand-in for the group.
@torch.compiler.assume_constant_result
def _in_shm(group_name: str) -> bool:
    return _find(group_name).in_shm


def _hosts_of(x: Tensor, group_name: str) -> Hosts | None:
    return _find(group_name).hosts if x.device.type == "cpu" else None


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


def start_all_reduce_(x: Tensor, group: dist.ProcessGroup) -> Callable[[], None]:
    """Begin to sum x over ranks, in place, beside what the current CUDA stream does next.

    x: contiguous, on a GPU. Returns what makes the stream wait for the sum (not the host); until then x is
    not to be touched. Not for compiled graphs. Raises as all_reduce.
    """
    if group.size() == 1:
        return lambda: None
    with collective_errors():
        work = dist.all_reduce(x, group=group, async_op=True)

    def wait() -> None:
        with collective_errors():
            work.wait()

    return wait


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
        hosts = _hosts_of(x, group.group_name)
        if x.device.type == "cpu" and _in_shm(group.group_name):
            torch.ops.tp_shm.broadcast_(x, source, group.group_name)
        elif hosts is not None and x.numel():
            hosts.broadcast_(x, source, group)
        else:
            dist.broadcast(x, src=dist.get_global_rank(group, source), group=group)
    return x
