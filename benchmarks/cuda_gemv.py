"""One-row linears of a Llama over some GPUs, by format and tile: microseconds and share of the read ceiling.

Copies of a weight worth 600 MB run back to back in one CUDA graph, so that the L2 holds none of them; the
time is the median replay over the number of copies. Tiles are compiled by many processes first.

    python benchmarks/cuda_gemv.py [--models llama-70b/2,llama-8b/1] [--kinds int8,none] [--rows 1]
        [--linears gate_up,down] [--chosen] [--json FILE]

Weights and launches are those of tp-bench kernels --device cuda, which measures the runtime's own tiles.
--chosen: only the tile that the runtime takes; without it every candidate is timed, and the best are shown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Shape = tuple[str, str, int, int, bool]  # model/ranks, linear, outputs, inputs, whether it is gated
# (rows of W a tile, bytes of each row a tile, warps, stages); int4's bytes follow from the group.
TILES = [
    (16, 256, 1, 4), (16, 512, 1, 4), (16, 256, 1, 6), (32, 256, 1, 4), (32, 256, 2, 4), (32, 512, 2, 4),
    (32, 512, 4, 3), (64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (64, 256, 4, 4), (64, 256, 8, 4),
    (64, 512, 4, 3), (64, 256, 2, 3),
    (64, 256, 2, 4), (128, 128, 4, 4), (128, 128, 8, 4), (128, 256, 4, 3), (128, 256, 8, 3),
    (16, 256, 1, 8), (32, 128, 2, 8), (32, 256, 1, 6), (32, 256, 2, 6), (32, 256, 2, 8), (64, 256, 4, 6),
    (64, 256, 2, 6), (64, 128, 4, 8), (16, 512, 1, 6), (32, 128, 1, 8), (32, 128, 2, 6), (32, 512, 1, 4),
    (32, 512, 2, 3), (32, 256, 4, 4), (32, 256, 2, 5), (64, 128, 2, 8),
]  # fmt: skip
INT4_TILES = [
    (16, 1, 4), (16, 1, 8), (32, 1, 4), (32, 2, 4), (32, 2, 6), (64, 2, 4), (64, 4, 2), (64, 4, 3),
    (64, 4, 4), (64, 4, 6), (64, 2, 6), (128, 4, 3), (128, 4, 4), (128, 8, 3),
    (16, 1, 6), (32, 1, 6), (32, 1, 8), (32, 2, 8), (64, 2, 8), (64, 4, 8), (128, 4, 6), (128, 8, 6),
]  # fmt: skip
SPLITS = (1, 2, 4, 8)
NUM_SUMS = 8  # of every linear's norm, so that tiles of all shapes are compiled once


def shapes_of(models: str) -> list[Shape]:
    """The linears of each "model/ranks", as the runtime joins them: q, k and v; gate and up."""
    from tp_runtime.models import registry

    found: list[Shape] = []
    for each in models.split(","):
        name, ranks = each.split("/")
        c, n = registry.find(name).config, int(ranks)
        heads, kv = c.num_heads * c.head_dim // n, c.num_kv_heads * c.head_dim // n
        middle = c.intermediate_size // n
        found += [
            (each, "qkv", heads + 2 * kv, c.hidden_size, False),
            (each, "o", c.hidden_size, heads, False),
            (each, "gate_up", 2 * middle, c.hidden_size, True),
            (each, "down", c.hidden_size, middle, False),
            (each, "head", c.vocab_size // n, c.hidden_size, False),
        ]
    return found


def candidates(kind: str, shape: Shape, rows: int, chosen: bool) -> list[Any]:
    """Tiles to time: every one, or the runtime's."""
    from tp_runtime.benchmark.kernels_cuda import make_weights
    from tp_runtime.kernels.cuda.linear import Tile, choose_tile

    _, _, n, k, gated = shape
    if chosen:
        weight = make_weights(kind, n, k, 1)[0][0]
        return [choose_tile(weight, k, rows=rows, gated=gated, split=shape[1] != "head")]
    found = []
    splits = [1] if gated else [each for each in SPLITS if each == 1 or k // each >= 1024]
    if kind.startswith("int4"):
        group = int(kind.removeprefix("int4-g"))
        return [Tile(bn, 2 * group, s, warps, stages) for (bn, warps, stages) in INT4_TILES for s in splits]
    for (bn, row_bytes, warps, stages), s in itertools.product(TILES, splits):
        found.append(Tile(bn, row_bytes // (2 if kind == "none" else 1), s, warps, stages))
    return found


def compile_some(
    kinds: list[str], shapes: list[Shape], rows: int, chosen: bool, part: int, parts: int
) -> None:
    """This process's share of the tiles, launched once: Triton keeps the result on disk."""
    import torch

    from tp_runtime.benchmark.kernels_cuda import chain, make_weights

    jobs: dict[tuple[Any, ...], tuple[str, Shape, Any]] = {}
    for kind, shape in itertools.product(kinds, shapes):
        for tile in candidates(kind, shape, rows, chosen):
            # What the compiled kernel depends on.
            even = shape[2] // (2 if shape[4] else 1) % tile.bn == 0, shape[3] % max(1, tile.bk) == 0
            jobs.setdefault(
                (kind, shape[4], tile.bn, tile.bk, tile.warps, tile.stages, even), (kind, shape, tile)
            )
    for kind, shape, tile in list(jobs.values())[part::parts]:
        _, _, n, k, gated = shape
        try:
            chain(kind, make_weights(kind, n, k, 1), rows, k, tile, gated=gated, num_sums=NUM_SUMS)()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001  (a tile too large for shared memory is no answer)
            print(f"{kind} {shape} {tile}: {str(error)[:80]}", file=sys.stderr)


def in_processes(target: Callable[..., None], *args: Any) -> None:
    """Run target(*args, part, parts) in each of `parts` processes, and wait for all."""
    parts = max(1, min(14, (os.cpu_count() or 1) - 2))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=target, args=(*args, part, parts)) for part in range(parts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def measure(
    kinds: list[str], shapes: list[Shape], rows: int, chosen: bool, ceiling: float
) -> list[dict[str, Any]]:
    import torch

    from tp_runtime.benchmark.kernels_cuda import COPIES_BYTES, chain, make_weights
    from tp_runtime.kernels.cuda.read_ceiling import graph_seconds

    found = []
    for kind, shape in itertools.product(kinds, shapes):
        model, name, n, k, gated = shape
        one = make_weights(kind, n, k, 1)
        size = sum(each.nbytes for each in one[0])
        weights = one + make_weights(kind, n, k, max(2, COPIES_BYTES // size))
        times = []
        for tile in candidates(kind, shape, rows, chosen):
            try:
                run = chain(kind, weights, rows, k, tile, gated=gated, num_sums=NUM_SUMS)
                times.append((graph_seconds(run, 3) / len(weights) * 1e6, tile))
            except Exception:  # noqa: BLE001  (said while compiling)
                continue
        times.sort(key=lambda pair: pair[0])
        for place, (us, tile) in enumerate(times):
            share = size / us / 1e3 / ceiling
            found.append({"model": model, "kind": kind, "linear": name, "n": n, "k": k, "gated": gated,
                          "rows": rows, "us": us, "share": share, "tile": vars(tile)})  # fmt: skip
            if place < 3:
                print(
                    f"{model:12s} {kind:9s} {name:8s} x{rows} {us:8.2f} us {share:6.1%}  bn {tile.bn} "
                    f"bk {tile.bk} splits {tile.splits} warps {tile.warps} stages {tile.stages}",
                    flush=True,
                )
        del weights, one
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="llama-70b/2")
    parser.add_argument("--kinds", default="int8,int4-g128,none,fp8,int4-g32")
    parser.add_argument("--linears", default="qkv,o,gate_up,down,head")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--chosen", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    kinds, wanted = args.kinds.split(","), args.linears.split(",")
    shapes = [shape for shape in shapes_of(args.models) if shape[1] in wanted]
    started = time.time()
    in_processes(compile_some, kinds, shapes, args.rows, args.chosen)
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    import torch

    from tp_runtime.kernels.cuda.read_ceiling import read_ceiling_gb_s

    ceiling = read_ceiling_gb_s()
    print(f"read ceiling {ceiling:.0f} GB/s", flush=True)
    found = measure(kinds, shapes, args.rows, args.chosen, ceiling)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "ceiling_gb_s": ceiling, "rows": found}, file)
    print(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
