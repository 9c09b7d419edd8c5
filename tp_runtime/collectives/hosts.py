"""Two levels for a group over several hosts: shared memory inside each, c10d among one rank of each.

A message between hosts costs ten times what shared memory costs, so one rank a host, its leader (the
lowest), sends and receives for all of it. Leaders send each other what they have (point to point over the
group's own CPU backend), which is the least traffic there is for two hosts, and each works on all parts in
the order of hosts, so that every rank ends with the same bits. A host's sum is taken in fp32 in rank order
and travels in x's dtype; the sum over hosts is taken in fp32 again and rounded once.

Limits: H hosts send H - 1 messages of full size each. A leader that fails says so to its host at once
(group.h's abort word); the other hosts learn it when its process ends, or at the deadline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 0x7470
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
# Leaders give up a little before those who wait for them, so that the error names the host that is missing.
_SHARE_OF_TIMEOUT = 0.9


class Hosts:
    """The collectives of one rank in a group over several hosts.

    hosts: the group's ranks by host, each ascending. rank: this one's. local: name of the shared-memory
    group of this rank's host (not attached where the host has one rank). timeout_s: as in attach.
    """

    def __init__(self, hosts: Sequence[Sequence[int]], rank: int, local: str, timeout_s: float) -> None:
        self._hosts = hosts
        self._own = next(h for h, ranks in enumerate(hosts) if rank in ranks)
        self._is_leader = rank == hosts[self._own][0]
        self._world_size = sum(len(ranks) for ranks in hosts)
        self._local = local if len(hosts[self._own]) > 1 else None
        self._timeout_s = timeout_s
        self._failure = ""

    def set_timeout(self, timeout_s: float) -> None:
        """From now on an operation may wait that long for a peer."""
        self._timeout_s = timeout_s
        if self._local is not None:
            torch.ops.tp_shm.set_timeout(self._local, timeout_s)

    def all_reduce(self, x: Tensor, reduction: str, group: dist.ProcessGroup) -> Tensor:
        """As ops.all_reduce."""
        if x.dtype not in _DTYPES:
            raise RuntimeError(f"all_reduce takes fp32, bf16, fp16, int32 and int64, not {x.dtype}")
        with self._giving_up():
            here = x.clone()
            if self._local is not None:
                here = torch.ops.tp_shm.all_reduce(x, reduction, self._local)
            if self._is_leader:
                parts = [torch.empty_like(here) for _ in self._hosts]
                self._exchange(here, parts, "all_reduce", group)
                here = _reduced(parts, reduction)
            return self._spread(here)

    def all_gather(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """As ops.all_gather."""
        with self._giving_up():
            here = x.unsqueeze(0)
            if self._local is not None:
                here = torch.ops.tp_shm.all_gather(x, len(self._hosts[self._own]), self._local)
            out = x.new_empty((self._world_size, *x.shape))
            if self._is_leader:
                parts = [x.new_empty((len(ranks), *x.shape)) for ranks in self._hosts]
                self._exchange(here, parts, "all_gather", group)
                for ranks, part in zip(self._hosts, parts, strict=True):
                    out[list(ranks)] = part
            return self._spread(out)

    def broadcast_(self, x: Tensor, source: int, group: dist.ProcessGroup) -> None:
        """As ops.broadcast_."""
        home = next(h for h, ranks in enumerate(self._hosts) if source in ranks)
        with self._giving_up():
            if home != self._own:
                if self._is_leader:
                    self._transfer([], [(home, x)], "broadcast", group)
                self._spread(x)
                return
            if self._local is not None:
                torch.ops.tp_shm.broadcast_(x, self._hosts[home].index(source), self._local)
            if self._is_leader:
                others = [(h, x) for h in range(len(self._hosts)) if h != home]
                self._transfer(others, [], "broadcast", group)

    def _exchange(self, here: Tensor, parts: list[Tensor], what: str, group: dist.ProcessGroup) -> None:
        """Fill `parts`, one a host: `here` is this host's, and goes to all others."""
        parts[self._own].copy_(here)
        others = [h for h in range(len(self._hosts)) if h != self._own]
        self._transfer([(h, parts[self._own]) for h in others], [(h, parts[h]) for h in others], what, group)

    def _transfer(
        self,
        sent: Sequence[tuple[int, Tensor]],
        received: Sequence[tuple[int, Tensor]],
        what: str,
        group: dist.ProcessGroup,
    ) -> None:
        """Send and receive contiguous tensors, each to or from the leader of the host named."""
        limit = timedelta(seconds=self._timeout_s * _SHARE_OF_TIMEOUT)
        works = []
        for host, x in sent:
            with self._blaming(host, what):
                works.append((host, group.send([x], self._hosts[host][0], _TAG)))
        for host, x in received:
            with self._blaming(host, what):
                works.append((host, group.recv([x], self._hosts[host][0], _TAG)))
        for host, work in works:
            with self._blaming(host, what):
                work.wait(limit)

    @contextlib.contextmanager
    def _blaming(self, host: int, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise dist.DistBackendError(
                f"rank {self._hosts[host][0]} of {self._world_size}, on another host, did not take part in "
                f"{what}: {str(error).splitlines()[0]}"
            ) from None

    def _spread(self, x: Tensor) -> Tensor:
        """The leader's x to all ranks of its host, in place."""
        if self._local is not None:
            torch.ops.tp_shm.broadcast_(x, 0, self._local)
        return x

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Whatever fails inside ends the group for this rank, and its host is told."""
        if self._failure:
            raise dist.DistBackendError(self._failure)
        try:
            yield
        except RuntimeError as error:
            self._failure = str(error)
            if self._local is not None:
                torch.ops.tp_shm.give_up(self._local, self._failure)
            raise


def _reduced(parts: list[Tensor], reduction: str) -> Tensor:
    """The parts combined in their order; bf16 and fp16 in fp32, rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    result = parts[0].to(wide)
    for part in parts[1:]:
        result = _COMBINE[reduction](result, part.to(wide))
    return result.to(dtype)
