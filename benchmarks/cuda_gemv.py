"""One-row linears of Llama-70B over 2 GPUs, by format and tile: microseconds and share of the read ceiling.

Copies of a weight worth 600 MB run back to back in one CUDA graph, so that the L2 holds none of them; the
time is the median replay over the number of copies. Tiles are compiled by many processes first.

    python benchmarks/cuda_gemv.py [--kinds int8,int4] [--rows 1] [--json FILE] [--best]
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from typing import Any

SHAPES = {
    "qkv": (5120, 8192, False),
    "o": (8192, 4096, False),
    "gate_up": (28672, 8192, True),
    "down": (8192, 14336, False),
    "head": (64128, 8192, False),
}
COPIES_BYTES = 600 << 20
# (outputs a tile, columns a tile, warps, stages); int4 takes its columns from the group.
TILES = [
    (64, 128, 4, 4), (64, 256, 4, 3), (64, 256, 4, 4), (32, 256, 2, 4), (32, 256, 4, 4), (128, 128, 4, 4),
    (128, 128, 8, 4), (32, 512, 4, 3), (16, 512, 4, 4), (16, 256, 1, 4), (64, 128, 4, 6),
]  # fmt: skip
SPLITS = (1, 2, 4, 8)


def make_weights(kind: str, n: int, k: int, copies: int) -> list[tuple[Any, ...]]:
    """`copies` packed weights of random bytes (scales of a sane size) on the GPU."""
    import torch

    def scales(*shape: int) -> Any:
        return torch.rand(shape, device="cuda") / 1000

    made: list[tuple[Any, ...]] = []
    for _ in range(copies):
        if kind == "bf16":
            made.append((torch.randn(n, k, device="cuda", dtype=torch.bfloat16),))
        elif kind in ("int8", "fp8"):
            q = torch.randint(-80, 80, (n, k), device="cuda", dtype=torch.int8)
            made.append((q if kind == "int8" else q.view(torch.float8_e4m3fn), scales(n)))
        else:
            group = int(kind.removeprefix("int4-g"))
            q = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
            made.append((q, scales(k // group // 2, n, 2).half().view(torch.int32).squeeze(-1)))
    return made


def candidates(kind: str, gated: bool, k: int) -> list[Any]:
    from tp_runtime.kernels.cuda.linear import Tile

    found = []
    for (bn, bk, warps, stages), splits in itertools.product(TILES, SPLITS):
        if kind.startswith("int4"):
            bk = 2 * int(kind.removeprefix("int4-g"))
        if kind == "bf16":
            bk //= 2
        if splits > 1 and (gated or k // splits < 4 * bk):
            continue
        tile = Tile(bn, bk, splits, warps, stages)
        if tile not in found:
            found.append(tile)
    return found


def run_once(kind: str, shape: str, tile: Any, weights: list[tuple[Any, ...]], x: Any, sums: Any) -> Any:
    import torch

    from tp_runtime.kernels.cuda.linear import gemv_

    n, _, gated = SHAPES[shape]
    outputs = n // 2 if gated else n
    y = torch.empty((tile.splits, x.shape[0], outputs), device="cuda")
    group = int(kind.removeprefix("int4-g")) if kind.startswith("int4") else 0

    def run() -> None:
        for tensors in weights:
            gemv_(x, tensors, y, group_size=group, gated=gated, sums=sums, eps=1e-5, tile=tile)

    return run


def compile_some(kinds: list[str], rows: int, part: int, parts: int) -> None:
    """This process's share of the tiles, launched once: Triton keeps the result on disk."""
    import torch

    jobs = [(kind, shape, tile) for kind in kinds for shape in SHAPES
            for tile in candidates(kind, SHAPES[shape][2], SHAPES[shape][1])]  # fmt: skip

    def binary(job: tuple[str, str, Any]) -> tuple[Any, ...]:
        """What the compiled kernel depends on."""
        kind, shape, tile = job
        return kind, SHAPES[shape][2], tile.bn, tile.bk, tile.warps, tile.stages

    jobs.sort(key=binary)
    grouped = [list(group) for _, group in itertools.groupby(jobs, key=binary)]
    for group in grouped[part::parts]:
        for kind, shape, tile in group[:1]:
            n, k, gated = SHAPES[shape]
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            sums = torch.rand(rows, 8, device="cuda") * k
            try:
                run_once(kind, shape, tile, make_weights(kind, n, k, 1), x, sums)()
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001  (a tile too large for shared memory is no answer)
                print(f"{kind} {shape} {tile}: {str(error)[:80]}", file=sys.stderr)


def measure(kinds: list[str], rows: int, ceiling: float) -> list[dict[str, Any]]:
    import torch

    from tp_runtime.kernels.cuda.read_ceiling import graph_seconds

    found = []
    for kind, shape in itertools.product(kinds, SHAPES):
        n, k, gated = SHAPES[shape]
        one = make_weights(kind, n, k, 1)
        size = sum(each.nbytes for each in one[0])
        weights = one + make_weights(kind, n, k, max(2, COPIES_BYTES // size))
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        sums = torch.rand(rows, 8, device="cuda") * k
        times = []
        for tile in candidates(kind, gated, k):
            try:
                run = run_once(kind, shape, tile, weights, x, sums)
                times.append((graph_seconds(run) / len(weights) * 1e6, tile))
            except Exception:  # noqa: BLE001  (said while compiling)
                continue
        times.sort(key=lambda pair: pair[0])
        for us, tile in times[:4]:
            share = size / us / 1e3 / ceiling
            row = {"kind": kind, "shape": shape, "rows": rows, "us": us, "share": share, "tile": vars(tile)}
            found.append(row)
            t = tile
            print(
                f"{kind:9s} {shape:8s} x{rows} {us:8.2f} us {share:6.1%}  "
                f"bn {t.bn} bk {t.bk} splits {t.splits} warps {t.warps} stages {t.stages}",
                flush=True,
            )
        del weights, one
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", default="int8,int4-g128,bf16,fp8,int4-g32")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    started = time.time()
    processes = max(1, min(14, (os.cpu_count() or 1) - 2))
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=compile_some, args=(kinds, args.rows, part, processes))
        for part in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    from tp_runtime.kernels.cuda.read_ceiling import read_ceiling_gb_s

    ceiling = read_ceiling_gb_s()
    print(f"read ceiling {ceiling:.0f} GB/s", flush=True)
    found = measure(kinds, args.rows, ceiling)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"ceiling_gb_s": ceiling, "rows": found}, file)
    print(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
