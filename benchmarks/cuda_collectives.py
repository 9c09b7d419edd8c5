"""All-reduce among the GPUs of one host inside a CUDA graph: pushing against NCCL, microseconds by size.

    tp-launch --nproc 2 benchmarks/cuda_collectives.py

A chain of 40 dependent reductions is captured and replayed; the time is the median replay over 40. Results
are compared with the sum in fp32 in the order of the ranks, bit for bit. The last line is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

CHAIN = 40
SIZES_KIB = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)


def graph_us(torch: Any, group: Any, run: Callable[[], None]) -> float:
    """Median microseconds of one reduction of the chain."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    taken = []
    for _ in range(9):
        torch.cuda.synchronize()
        torch.distributed.barrier(group)
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop) * 1e3 / CHAIN / 5)
    return statistics.median(taken)


def main() -> None:
    import torch
    import torch.distributed as dist

    from tp_runtime import init_mesh
    from tp_runtime.collectives.push_group import PushGroup

    group = init_mesh(device="cuda").get_group("tp")
    rank, world = group.rank(), group.size()
    push = PushGroup(group, "cuda", max_words=SIZES_KIB[-1] << 8, timeout_s=20)
    rows = []
    for kib in SIZES_KIB:
        x = torch.randn(kib << 9, device="cuda").bfloat16()
        out = torch.full_like(x, torch.nan)

        def pushed(x: Any = x, out: Any = out) -> None:
            for op in range(CHAIN):
                push.all_reduce(x, out, op=op)
            push.advance(CHAIN)

        def nccl(out: Any = out) -> None:
            for _ in range(CHAIN):
                dist.all_reduce(out, group=group)

        pushed()
        every = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(every, x, group=group)
        total = torch.zeros_like(x, dtype=torch.float32)
        for each in every:
            total += each.float()
        exact = torch.tensor([int(torch.equal(out, total.bfloat16()))], device="cuda")
        dist.all_reduce(exact, op=dist.ReduceOp.MIN, group=group)
        row = {"kib": kib, "push_us": graph_us(torch, group, pushed), "exact": bool(exact)}
        out.zero_()
        row["nccl_us"] = graph_us(torch, group, nccl)
        rows.append(row)
        push.check()
        if rank == 0:
            print(f"{kib:6d} KiB  push {row['push_us']:8.2f} us  nccl {row['nccl_us']:8.2f} us  "
                  f"exact {row['exact']}", file=sys.stderr, flush=True)  # fmt: skip
    if rank == 0:
        print(json.dumps({"world_size": world, "gpu": torch.cuda.get_device_name(), "dtype": "bf16",
                          "torch": torch.__version__, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
