"""The read ceiling of one GPU: how fast a kernel that does nothing else reads memory, in GB/s.

Every word of a buffer many times the L2 is read once and folded into one number a program. Timed with
events over launches captured in a graph; the best of a few shapes, each the median of several replays.

    python -m tp_runtime.kernels.cuda.read_ceiling [--bytes N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import torch
import triton
import triton.language as tl

_SHAPES = ((1024, 4, 4, 8), (2048, 4, 8, 4), (2048, 8, 8, 2), (1024, 8, 4, 8))


@triton.jit
def _read_kernel(data_ptr, out_ptr, blocks, WORDS: tl.constexpr, UNROLL: tl.constexpr):
    acc = tl.zeros([WORDS], tl.int32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        base = tl.cast(block, tl.int64) * (WORDS * UNROLL)
        for part in tl.static_range(UNROLL):
            acc ^= tl.load(data_ptr + base + part * WORDS + tl.arange(0, WORDS))
    tl.store(out_ptr + tl.program_id(0), tl.xor_sum(acc, 0))


class Reader:
    """Readings of memory that exists, captured once: a reading makes and frees nothing.

    data: int32, flat, on the current GPU, many times its L2.
    """

    def __init__(self, data: torch.Tensor) -> None:
        processors = torch.cuda.get_device_properties(data.device).multi_processor_count
        self._kept = [data]
        self._graphs = []  # each with the bytes that it reads
        for words, unroll, warps, programs in _SHAPES:
            blocks = data.numel() // (words * unroll)
            out = torch.empty(processors * programs, dtype=torch.int32, device="cuda")

            def run(words=words, unroll=unroll, warps=warps, out=out, blocks=blocks) -> None:
                _read_kernel[(len(out),)](data, out, blocks, WORDS=words, UNROLL=unroll, num_warps=warps)

            self._kept.append(out)
            self._graphs.append((captured(run), blocks * words * unroll * 4))

    def gb_s(self, repeat: int = 5) -> float:
        """GB/s (10^9 bytes) of the fastest shape, each the median of `repeat` readings."""
        return max(size / replay_seconds(graph, repeat) / 1e9 for graph, size in self._graphs)


def read_ceiling_gb_s(num_bytes: int = 4 << 30, repeat: int = 5) -> float:
    """GB/s (10^9 bytes) at which the current GPU reads `num_bytes` of its memory."""
    return Reader(torch.empty(num_bytes // 4, dtype=torch.int32, device="cuda").random_()).gb_s(repeat)


def captured(run) -> torch.cuda.CUDAGraph:
    """run() as a graph, replayed once. It runs once before: a capture can load no code."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, repeat: int) -> float:
    """Median seconds of one replay, behind another one, so that the host's launching is hidden."""
    taken = []
    for _ in range(repeat):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(taken)


def graph_seconds(run, repeat: int = 5) -> float:
    """Median seconds of one replay of run(), captured."""
    return replay_seconds(captured(run), repeat)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(prog="read_ceiling", description="measure a GPU's read bandwidth")
    parser.add_argument("--bytes", type=int, default=4 << 30, help="memory to read (default: 4 GiB)")
    args = parser.parse_args(argv)
    figure = read_ceiling_gb_s(args.bytes)
    sys.stdout.write(json.dumps({"gpu": torch.cuda.get_device_name(), "gb_s": figure}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
