"""Latency of all_reduce, all_gather and broadcast over ranks of one host, shared memory against gloo.

An all_reduce of the step is measured as the step has it: a compiled chain of CHAIN dependent reductions,
its time divided by CHAIN, waiting included. Both transports run in the same processes, turn by turn.

    tp-launch --nproc 2 benchmarks/collectives.py [--json]
    python benchmarks/collectives.py --nproc 2 [--json]      (starts the ranks itself)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = (64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
CHAIN = 64
_ROUNDS = 7
_SECONDS = 0.25  # aimed at, a round of one case


def _time_us(run: Callable[[], Any], barrier: Callable[[], Any], calls: int) -> list[float]:
    barrier()
    taken = []
    for _ in range(calls):
        started = time.perf_counter()
        run()
        taken.append((time.perf_counter() - started) * 1e6)
    return taken


def measure(sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """This job's figures, the same on every rank up to noise. Needs an initialised process group."""
    import torch
    import torch.distributed as dist

    from tp_runtime import collectives

    shared, plain = dist.new_group(), dist.new_group()
    backend = collectives.attach(shared)
    collectives.attach(plain, shared_memory=False)
    groups = {backend: shared, "gloo": plain} if backend == "shm" else {"gloo": plain}

    def chain(group: dist.ProcessGroup) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduce_often(x: torch.Tensor) -> torch.Tensor:
            for _ in range(CHAIN):
                x = collectives.all_reduce(x, group)
            return x

        return torch.compile(reduce_often, fullgraph=True, dynamic=False)

    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for num_bytes in sizes:
            x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype)
            torch._dynamo.reset()  # or its limit on recompilations would be met
            chains = {name: chain(group) for name, group in groups.items()}
            cases: list[tuple[str, str, bool, int, Callable[[], Any]]] = []
            for name, group in groups.items():
                cases.append(("all_reduce", name, True, CHAIN, lambda c=chains[name], x=x: c(x)))
                cases.append(
                    ("all_reduce", name, False, 1, lambda g=group, x=x: collectives.all_reduce(x, g))
                )
                cases.append(
                    ("all_gather", name, False, 1, lambda g=group, x=x: collectives.all_gather(x, g))
                )
                cases.append(("broadcast", name, False, 1, lambda g=group, x=x: collectives.broadcast_(x, g)))
            taken: dict[int, list[float]] = {index: [] for index in range(len(cases))}
            for index, case in enumerate(cases):
                _time_us(case[4], lambda: dist.barrier(plain), 3)
                pace = torch.tensor(statistics.median(_time_us(case[4], lambda: dist.barrier(plain), 5)))
                dist.all_reduce(pace, op=dist.ReduceOp.MAX, group=plain)
                calls = max(5, min(2000, int(_SECONDS * 1e6 / float(pace) / _ROUNDS)))
                for _ in range(_ROUNDS):
                    taken[index] += _time_us(case[4], lambda: dist.barrier(plain), calls)
            for index, (op, name, compiled, per_call, _) in enumerate(cases):
                ordered = sorted(value / per_call for value in taken[index])
                rows.append(
                    {
                        "op": op,
                        "backend": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "bytes": num_bytes,
                        "p50_us": round(ordered[len(ordered) // 2], 3),
                        "p99_us": round(ordered[len(ordered) * 99 // 100], 3),
                        "in_compiled": compiled,
                    }
                )
    return rows


def _run_rank(args: argparse.Namespace) -> None:
    import torch

    from tp_runtime.mesh import init_mesh

    torch.set_num_threads(1)
    mesh = init_mesh(timeout_s=120)
    rows = measure(tuple(args.bytes) if args.bytes else SIZES)
    if mesh.get_rank() == 0:
        for row in rows:
            where = "compiled" if row["in_compiled"] else "eager"
            print(
                f"{row['op']:<10} {row['backend']:<5} {row['dtype']:<8} {row['bytes']:>8} B {where:<8} "
                f"p50 {row['p50_us']:>9.2f} us  p99 {row['p99_us']:>9.2f} us"
            )
        if args.json:
            print(json.dumps({"world_size": mesh.size(), "collectives": rows}))
    import torch.distributed as dist

    dist.destroy_process_group()


def _start_ranks(args: argparse.Namespace, argv: list[str]) -> int:
    cpus = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(args.nproc):
            environ = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(args.nproc),
                "LOCAL_WORLD_SIZE": str(args.nproc),
                "TP_STORE_FILE": str(Path(folder) / "store"),
                "OMP_NUM_THREADS": "1",
            }
            cpu = cpus[rank % len(cpus)]
            command = ["taskset", "-c", str(cpu), sys.executable, __file__, *argv]
            ranks.append(subprocess.Popen(command, env=environ))
        try:
            return max(rank.wait(timeout=900) for rank in ranks)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2, help="ranks to start (ignored inside a job)")
    parser.add_argument("--bytes", type=int, nargs="*", help="message sizes (default: 64 B to 4 MiB)")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        return _start_ranks(args, argv)
    _run_rank(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
