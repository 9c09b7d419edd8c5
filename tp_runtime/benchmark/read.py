"""The read ceiling of a case: what the ranks' memory gives to plain reading loops, all at once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.cpu import build
from ..kernels.cpu.read_ceiling import STREAMS


class Ceiling:
    """Readings of what the ranks' memory gives, all at once. Every rank makes and reads one.

    group: the ranks that read at once; None: this one alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.readings: list[float] = []

    def read(self) -> float:
        """The ranks' rates together, GB/s."""
        self.readings.append(self._reading())
        return self.readings[-1]

    def _reading(self) -> float:
        raise NotImplementedError

    @property
    def best(self) -> float:
        """The largest reading so far, which is the one that counts."""
        return max(self.readings)

    def restart(self) -> None:
        """Forget all readings, which were another number of threads', and read."""
        self.readings.clear()
        self.read()

    def start_case(self) -> None:
        """Forget earlier readings but the last, which is the one before the case, and read again."""
        del self.readings[:-1]
        self.read()


class ReadCeiling(Ceiling):
    """Memory kept for reading by the CPUs, at the best number of streams a thread.

    num_bytes: what this rank reads. passes: a reading takes the best of, at each number of streams. Raises
    KernelBuildError where the C++ kernels cannot be built.
    """

    def __init__(self, num_bytes: int, group: dist.ProcessGroup | None = None, passes: int = 3) -> None:
        super().__init__(group)
        self._passes = passes
        build.load()
        self._memory: Tensor = torch.ops.tp_cpu.empty_weight(num_bytes)
        self._memory.fill_(1)  # or the kernel would map all of it to one page of zeros

    def _reading(self) -> float:
        return max(self._together(streams) for streams in STREAMS for _ in range(self._passes))

    def _together(self, streams: int) -> float:
        if self._group is not None:
            dist.barrier(self._group)
        rate = self._memory.numel() / torch.ops.tp_cpu.read_seconds(self._memory, streams) / 1e9
        return total(rate, self._group)


def total(value: float, group: dist.ProcessGroup | None) -> float:
    """The sum of every rank's value, the same on all of them."""
    if group is None or group.size() == 1:
        return value
    summed = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(summed, group=group)
    return float(summed)


def slowest(value: float, group: dist.ProcessGroup | None) -> float:
    """The largest of every rank's value, the same on all of them."""
    if group is None or group.size() == 1:
        return value
    largest = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return float(largest)
