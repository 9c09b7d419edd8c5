"""From which size on an all_reduce in shared memory is faster in two shots (each rank sums a part) than one.

    tp-launch --nproc 2 --numa benchmarks/two_shot.py [BYTES,...]

Both ways take turns in the same processes; the figure of each is the fastest of ROUNDS rounds of CALLS calls
on the slowest rank, since a machine that others use delays some rounds and speeds up none. The last line of
stdout is one JSON document. group.cpp's kTwoShotBytes is set by it.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist

from tp_runtime import collectives, mesh

SIZES = tuple(1 << k for k in range(10, 20))
ROUNDS, CALLS = 200, 10
WAYS = {"one": 1 << 62, "two": 0}  # two shots from so many bytes on


def _microseconds(x: torch.Tensor, group: dist.ProcessGroup) -> float:
    for _ in range(3):
        collectives.all_reduce(x, group)
    started = time.perf_counter()
    for _ in range(CALLS):
        collectives.all_reduce(x, group)
    return (time.perf_counter() - started) * 1e6 / CALLS


def _measure(num_bytes: int, group: dist.ProcessGroup) -> dict[str, float]:
    x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(ROUNDS):
        for way, least in WAYS.items():
            torch.ops.tp_shm.set_two_shot_bytes(group.group_name, least)
            taken = torch.tensor([_microseconds(x, group)], dtype=torch.float32)
            best[way] = min(best[way], float(collectives.all_reduce(taken, group, "max")))
    return best


def main() -> None:
    """Measure every size and print a line each."""
    sizes = [int(word) for word in sys.argv[1].split(",")] if len(sys.argv) > 1 else SIZES
    group = mesh.tp_group(mesh.init_mesh())
    if collectives.attach(group, transport="shm") != "shm":
        raise SystemExit("the ranks are on several hosts; start them on one")
    rows = []
    for num_bytes in sizes:
        best = _measure(num_bytes, group)
        rows.append({"bytes": num_bytes, **{f"{way}_us": round(us, 2) for way, us in best.items()}})
        if group.rank() == 0:
            print(
                f"{num_bytes:>8} B  one shot {best['one']:>8.2f} us  two shots {best['two']:>8.2f} us",
                flush=True,
            )
    if group.rank() == 0:
        print(json.dumps({"world_size": group.size(), "two_shot": rows}))


if __name__ == "__main__":
    main()
