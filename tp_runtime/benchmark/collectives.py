"""collectives: latency of all_reduce, all_gather and broadcast over ranks of one host, against gloo.

An all_reduce of the step is measured as a step has it: a compiled chain of CHAIN dependent reductions, its
time divided by CHAIN, waiting included. Over shared memory the chain's wrapper is compiled to C++ too, as the
engine's step calls its reductions from C++. Both transports run in the same processes, turn by turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import collectives
from .definitions import CHAIN, quantile
from .read import slowest

SIZES = (64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
_ROUNDS = 7
_SECONDS = 0.25  # aimed at, for all rounds of one case
_FEWEST, _MOST = 5, 2000  # calls a round


@dataclass(frozen=True)
class Case:
    """One op over one transport. per_call: reductions that one call of `run` makes."""

    op: str
    backend: str
    in_compiled: bool
    per_call: int
    run: Callable[[], Any]


def measure(sizes: Sequence[int], group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Every case, each rank's own times. group: all ranks of the job, which call this together."""
    ranks = dist.get_process_group_ranks(group)
    shared, plain = dist.new_group(ranks), dist.new_group(ranks)
    backend = collectives.attach(shared)
    collectives.attach(plain, transport="c10d")
    groups = {"gloo": plain} if backend == "c10d" else {backend: shared, "gloo": plain}
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        torch._dynamo.reset()
        chains = {name: chain_of(over, from_cpp=name == "shm") for name, over in groups.items()}
        for num_bytes in sizes:
            x = torch.zeros(max(1, num_bytes // dtype.itemsize), dtype=dtype)
            cases = [case for name, over in groups.items() for case in _cases(name, over, x, chains[name])]
            rows += [
                _row(case, x, times) for case, times in zip(cases, _turn_by_turn(cases, plain), strict=True)
            ]
    return rows


def chain_of(group: dist.ProcessGroup, *, from_cpp: bool) -> Callable[[Tensor], Tensor]:
    """x, flat, through CHAIN reductions in one compiled graph, which is compiled once for all sizes.

    from_cpp: no Python between the reductions (gloo's op is Python itself).
    """

    def reduce_often(x: Tensor) -> Tensor:
        for _ in range(CHAIN):
            x = collectives.all_reduce(x, group)
        return x

    return torch.compile(reduce_often, fullgraph=True, dynamic=True, options={"cpp_wrapper": from_cpp})


def _cases(
    backend: str, group: dist.ProcessGroup, x: Tensor, chain: Callable[[Tensor], Tensor]
) -> list[Case]:
    return [
        Case("all_reduce", backend, True, CHAIN, lambda: chain(x)),
        Case("all_reduce", backend, False, 1, lambda: collectives.all_reduce(x, group)),
        Case("all_gather", backend, False, 1, lambda: collectives.all_gather(x, group)),
        Case("broadcast", backend, False, 1, lambda: collectives.broadcast_(x, group)),
    ]


def _turn_by_turn(cases: Sequence[Case], plain: dist.ProcessGroup) -> list[list[float]]:
    """Microseconds of every call of every case; the rounds of the cases alternate."""
    calls = []
    for case in cases:
        _times_us(case, plain, 3)
        pace = slowest(statistics.median(_times_us(case, plain, _FEWEST)), plain)
        calls.append(max(_FEWEST, min(_MOST, int(_SECONDS * 1e6 / pace / _ROUNDS))))
    taken: list[list[float]] = [[] for _ in cases]
    for _ in range(_ROUNDS):
        for case, count, times in zip(cases, calls, taken, strict=True):
            times += _times_us(case, plain, count)
    return taken


def _times_us(case: Case, plain: dist.ProcessGroup, calls: int) -> list[float]:
    dist.barrier(plain)
    taken = []
    for _ in range(calls):
        started = time.perf_counter()
        case.run()
        taken.append((time.perf_counter() - started) * 1e6 / case.per_call)
    return taken


def _row(case: Case, x: Tensor, times: Sequence[float]) -> dict[str, Any]:
    return {
        "op": case.op,
        "backend": case.backend,
        "dtype": str(x.dtype).removeprefix("torch."),
        "bytes": x.nbytes,
        "p50_us": round(statistics.median(times), 3),
        "p99_us": round(quantile(times, 0.99), 3),
        "in_compiled": case.in_compiled,
    }


def line(row: dict[str, Any]) -> str:
    """One result for people."""
    where = "compiled" if row["in_compiled"] else "eager"
    return (
        f"{row['op']:<10} {row['backend']:<8} {row['dtype']:<8} {row['bytes']:>8} B {where:<8} "
        f"p50 {row['p50_us']:>9.2f} us  p99 {row['p99_us']:>9.2f} us{_checked(row)}"
    )


def _checked(row: dict[str, Any]) -> str:
    """What was found out about the sums of GPUs."""
    if "exact" not in row:
        return ""
    same = "the same on all ranks" if row["same_on_all_ranks"] else "NOT the same on all ranks"
    return f"  {'exact, ' if row['exact'] else ''}{same}"


def soak_line(document: dict[str, Any]) -> str:
    """The soak for people, where there was one."""
    soak = document.get("soak")
    if soak is None:
        return ""
    return f"soak: {soak['sums']} sums of {soak['values']} bf16 values, {soak['mistakes']} wrong values\n"
