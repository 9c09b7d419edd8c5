"""The collective ops. Each takes the process group's name, as torch's functional collectives do,
because a custom op cannot take a group object.

At world 1 each returns its input without an op. The implementation below is c10d's (gloo, NCCL).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@torch.library.custom_op("tp_runtime::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, reduction: str, group: str) -> Tensor:
    out = x.contiguous().clone()
    dist.all_reduce(out, op=_REDUCTIONS[reduction], group=_resolve_process_group(group))
    return out


@_all_reduce.register_fake
def _(x: Tensor, reduction: str, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("tp_runtime::all_gather", mutates_args=())
def _all_gather(x: Tensor, world_size: int, group: str) -> Tensor:
    out = x.new_empty((world_size, *x.shape))
    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=_resolve_process_group(group))
    return out


@_all_gather.register_fake
def _(x: Tensor, world_size: int, group: str) -> Tensor:
    return x.new_empty((world_size, *x.shape))


def all_reduce(x: Tensor, group: dist.ProcessGroup, reduction: str = "sum") -> Tensor:
    """The element-wise sum, max or min of every rank's x, the same bits on every rank.

    x: any shape, floating point. Returns a new tensor (x itself at world 1). Raises CollectiveError
    where a peer died or the group's deadline passed.
    """
    return x if group.size() == 1 else _all_reduce(x, reduction, group.group_name)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x, stacked: [world_size, *x.shape]. All ranks bring the same shape and dtype."""
    return x.unsqueeze(0) if group.size() == 1 else _all_gather(x, group.size(), group.group_name)


def broadcast_(x: Tensor, group: dist.ProcessGroup, source: int = 0) -> Tensor:
    """Overwrite x with group rank `source`'s x, in place, and return it. Not for compiled graphs."""
    if group.size() > 1:
        dist.broadcast(x, src=dist.get_global_rank(group, source), group=group)
    return x
