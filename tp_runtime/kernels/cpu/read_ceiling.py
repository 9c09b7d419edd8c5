"""The read ceiling: the fastest that this process's threads read memory, in GB/s (10^9 bytes a second).

Bandwidth-bound kernels are measured by it. It is the best of 1, 2, 4 and 8 sequential streams a thread:
one stream a thread does not saturate memory, and which count is best differs by machine. The memory read
is at least eight times the last-level cache.

    python -m tp_runtime.kernels.cpu.read_ceiling --json [--cpus 0,1] [--threads 2] [--bytes N]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

STREAMS = (1, 2, 4, 8)
CACHES_READ = 8
_FALLBACK_CACHE_BYTES = 64 << 20


def last_level_cache_bytes() -> int:
    """Bytes of one instance of the largest cache that CPU 0 sees (64 MiB where the host does not say)."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=_FALLBACK_CACHE_BYTES)


def read_ceiling(num_bytes: int | None = None, repeat: int = 3) -> dict[int, float]:
    """GB/s by streams a thread, the best of `repeat` passes each, with torch's current thread count.

    num_bytes: memory to read (default: 8 times the last-level cache). Raises KernelBuildError.
    """
    import torch

    from . import build

    build.load()
    memory = torch.ops.tp_cpu.empty_weight(num_bytes or CACHES_READ * last_level_cache_bytes())
    memory.fill_(1)
    seconds = {
        streams: min(torch.ops.tp_cpu.read_seconds(memory, streams) for _ in range(repeat))
        for streams in STREAMS
    }
    return {streams: memory.numel() / taken / 1e9 for streams, taken in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(prog="read_ceiling", description="measure the memory read bandwidth")
    parser.add_argument("--cpus", help="comma-separated CPUs to run on (default: those allowed)")
    parser.add_argument("--threads", type=int, help="threads that read at once (default: one a CPU)")
    parser.add_argument("--bytes", type=int, help="memory to read (default: 8 times the last-level cache)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    if args.cpus:
        os.sched_setaffinity(0, {int(cpu) for cpu in args.cpus.split(",")})
    import torch

    threads = args.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    by_streams = read_ceiling(args.bytes)
    best = max(by_streams.values())
    if args.json:
        document = {"gb_s": best, "threads": threads, "by_streams": by_streams}
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        for streams, gb_s in by_streams.items():
            sys.stdout.write(f"{streams} streams a thread: {gb_s:6.2f} GB/s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
