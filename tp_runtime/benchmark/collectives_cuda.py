"""collectives of GPUs: latency of all_reduce among the GPUs of one host, ours against NCCL's and torch's.

A case is a chain of CHAIN sums, each of what the one before gave (torch's one-shot and two-shot sums, and
NCCL's, work in place or between two buffers likewise). It is captured as a CUDA graph (`in_compiled`), as the
engine's step is one, and replayed; its time between two events over CHAIN, waiting included, is a sample.
NCCL's is timed eagerly, too: prompts are summed so.

Backends: "push" (collectives/push_group.py), "nccl", and torch's symmetric memory, "one_shot" and "two_shot".
What a host has not got is left out, with a sentence on stderr. Results of every case are compared among the
ranks and with the sum in fp32 in the order of the ranks, bit for bit.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..log import once
from .definitions import CHAIN, quantile
from .read import slowest, total

SIZES = tuple(kib << 10 for kib in (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384))
_DTYPES = (torch.bfloat16, torch.float32)
_ROUNDS, _REPLAYS = 5, 8  # samples of a case: replays of each round but the first, which waits for all ranks
_TIMEOUT_S = 20.0
_SOAK_VALUES = 8192
_SOAK_PAUSE_EVERY, _SOAK_PAUSE_S = 50, 0.003


@dataclass(frozen=True)
class Ranks:
    """device: the group of the GPUs' tensors. host: of the same ranks, for the host's."""

    device: dist.ProcessGroup
    host: dist.ProcessGroup

    def start(self) -> None:
        """Wait for all ranks, host and GPU."""
        torch.cuda.synchronize()
        dist.barrier(self.host)


@dataclass(frozen=True)
class Backend:
    """How a buffer is summed. buffers(count, dtype): two that sums go between, or one twice, in place.

    reduce(x, out, number): out = the sum of x; `number` counts a chain's sums from 0 on. finish(count): after
    a chain of `count`.
    """

    name: str
    buffers: Callable[[int, torch.dtype], tuple[Tensor, Tensor]]
    reduce: Callable[[Tensor, Tensor, int], Any]
    finish: Callable[[int], None] = lambda count: None
    eager_too: bool = False


def measure(sizes: Sequence[int] | None, soak: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """The document's "collectives", and "soak" where it is asked for. group: all ranks, which call this.

    sizes: bytes of a message; None: SIZES. soak: sums that are checked one by one. Raises CollectiveError
    where a peer does not come.
    """
    ranks = Ranks(group, dist.new_group(dist.get_process_group_ranks(group), backend="gloo"))
    sizes = [max(16, size // 16 * 16) for size in sizes or SIZES]
    push = _push(group, max(*sizes, 2 * _SOAK_VALUES))
    backends = [_nccl(group), *_symmetric(ranks, max(sizes))]
    if push is not None:
        backends.insert(0, _pushing(push))
    rows = [
        row
        for dtype in _DTYPES
        for size in sizes
        for backend in backends
        for row in _rows(backend, size // dtype.itemsize, dtype, ranks)
    ]
    document: dict[str, Any] = {"collectives": rows}
    if push is not None:
        push.check()
    if soak and push is not None:
        document["soak"] = _soak(push, soak, ranks)
    return document


def _push(group: dist.ProcessGroup, num_bytes: int) -> Any:
    from ..collectives.push_group import connect

    return connect(group, "cuda", max_words=num_bytes // 4, timeout_s=_TIMEOUT_S)


def _pushing(push: Any) -> Backend:
    def reduce(x: Tensor, out: Tensor, number: int) -> None:
        push.all_reduce(x, out, op=number)

    return Backend("push", _two_buffers, reduce, push.advance)


def _nccl(group: dist.ProcessGroup) -> Backend:
    def reduce(x: Tensor, out: Tensor, number: int) -> None:
        dist.all_reduce(out, group=group)

    return Backend("nccl", _one_buffer, reduce, eager_too=True)


def _two_buffers(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, dtype=dtype, device="cuda"), torch.zeros(count, dtype=dtype, device="cuda")


def _one_buffer(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    one = torch.zeros(count, dtype=dtype, device="cuda")
    return one, one


def _symmetric(ranks: Ranks, num_bytes: int) -> Iterator[Backend]:
    """torch's own sums in symmetric memory, as far as they work here on every rank."""
    group_name = ranks.device.group_name
    memory: list[Tensor] = []

    def make() -> None:
        import torch.distributed._symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        for _ in range(2):
            memory.append(symmetric.empty(num_bytes, dtype=torch.uint8, device=device))
            memory[-1].zero_()
            symmetric.rendezvous(memory[-1], group_name)

    def one_shot(x: Tensor, out: Tensor, number: int) -> None:
        torch.ops.symm_mem.one_shot_all_reduce_out(x, "sum", group_name, out)

    def two_shot(x: Tensor, out: Tensor, number: int) -> None:
        torch.ops.symm_mem.two_shot_all_reduce_(out, "sum", group_name)

    def both(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, out = (each[: count * dtype.itemsize].view(dtype) for each in memory)
        return x, out

    def first(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, _ = both(count, dtype)
        return x, x

    if not _works(make, "one_shot and two_shot", ranks):
        return
    for backend in (Backend("one_shot", both, one_shot), Backend("two_shot", first, two_shot)):

        def attempt(backend: Backend = backend) -> None:
            x, out = backend.buffers(1024, torch.bfloat16)
            backend.reduce(x, out, 0)
            torch.cuda.synchronize()

        if _works(attempt, backend.name, ranks):
            yield backend


def _works(attempt: Callable[[], None], name: str, ranks: Ranks) -> bool:
    """Whether `attempt` succeeds on all ranks; says once why it does not."""
    trouble = ""
    try:
        attempt()
    except (RuntimeError, AttributeError, ImportError) as error:
        trouble = (str(error).strip() or type(error).__name__).splitlines()[0]
    works = slowest(float(bool(trouble)), ranks.host) == 0
    if not works:
        why = trouble or "on another rank"
        once(f"{name} of torch's symmetric memory is left out: it does not work here ({why})")
    return works


def _rows(backend: Backend, count: int, dtype: torch.dtype, ranks: Ranks) -> Iterator[dict[str, Any]]:
    """One size of one backend: captured, and eagerly where that is asked for."""
    checked = _check(backend, count, dtype, ranks)
    x, out = backend.buffers(count, dtype)
    x.zero_()
    out.zero_()

    def chain() -> None:
        pair = (x, out)
        for number in range(CHAIN):
            backend.reduce(*pair, number)
            pair = (pair[1], pair[0])
        backend.finish(CHAIN)

    from ..kernels.cuda.read_ceiling import captured

    for in_compiled in (True, False) if backend.eager_too else (True,):
        times = _times_us(captured(chain).replay if in_compiled else chain, ranks)
        yield {
            "op": "all_reduce",
            "backend": backend.name,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": count * dtype.itemsize,
            "p50_us": round(statistics.median(times), 3),
            "p99_us": round(quantile(times, 0.99), 3),
            "in_compiled": in_compiled,
            **checked,
        }


def _times_us(run: Callable[[], None], ranks: Ranks) -> list[float]:
    """Microseconds of one sum of the chain, by replay."""
    taken = []
    run()
    for _ in range(_ROUNDS):
        ranks.start()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 2)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        pairs = zip(events[1:-1], events[2:], strict=True)
        taken += [start.elapsed_time(stop) * 1e3 / CHAIN for start, stop in pairs]
    return taken


def _check(backend: Backend, count: int, dtype: torch.dtype, ranks: Ranks) -> dict[str, bool]:
    """One sum of random numbers: whether it is that in fp32 in the order of the ranks, and alike on all."""
    world, rank = ranks.device.size(), ranks.device.rank()
    torch.manual_seed(rank)
    mine = torch.randn(count, device="cuda").to(dtype)
    x, out = backend.buffers(count, dtype)
    out.fill_(torch.nan)
    x.copy_(mine)
    ranks.start()
    backend.reduce(x, out, 0)
    backend.finish(1)
    found = out.clone()
    torch.cuda.synchronize()
    wanted = torch.zeros(count, dtype=torch.float32, device="cuda")
    for each in _of_all(mine, world, ranks.device):
        wanted += each.float()
    results = _of_all(found, world, ranks.device)
    return {
        "exact": total(float(torch.equal(found, wanted.to(dtype))), ranks.host) == world,
        "same_on_all_ranks": all(torch.equal(results[0], each) for each in results),
    }


def _of_all(x: Tensor, world_size: int, group: dist.ProcessGroup) -> list[Tensor]:
    every = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(every, x, group=group)
    return every


def _soak(push: Any, sums: int, ranks: Ranks) -> dict[str, int]:
    """Chains of sums in a graph with random pauses of all ranks, every value checked on the GPU.

    sums: at least so many. The mistakes are values, of all ranks.
    """
    rank, world = ranks.device.rank(), ranks.device.size()
    torch.manual_seed(1)
    parts = torch.randn(CHAIN, world, _SOAK_VALUES, device="cuda").bfloat16()
    wanted = torch.zeros(CHAIN, _SOAK_VALUES, device="cuda")
    for each in parts.unbind(1):
        wanted += each.float()
    expected, x = wanted.bfloat16(), parts[:, rank].contiguous()
    out = torch.empty_like(x)
    mistakes = torch.zeros(1, dtype=torch.int64, device="cuda")

    def chain() -> None:
        out.fill_(torch.nan)
        for number in range(CHAIN):
            push.all_reduce(x[number], out[number], op=number)
        push.advance(CHAIN)
        mistakes.add_((out != expected).sum())

    from ..kernels.cuda.read_ceiling import captured

    graph = captured(chain)
    ranks.start()
    random.seed(rank)
    replays = -(-sums // CHAIN)
    for turn in range(replays):
        graph.replay()
        if turn % _SOAK_PAUSE_EVERY == 0:
            time.sleep(random.random() * _SOAK_PAUSE_S)
    push.check()
    found = int(total(float(mistakes), ranks.host))
    return {"sums": replays * CHAIN, "values": _SOAK_VALUES, "mistakes": found}
