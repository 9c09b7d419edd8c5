"""The card of a measurement: hardware, versions, commit. Figures without one cannot be compared."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from .._version import __version__
from ..engine.figures import last_level_cache_bytes

_PACKAGE = Path(__file__).resolve().parents[1]


def load_average() -> float:
    """Of the last minute: above the threads of a measurement, something else ran beside it."""
    return round(os.getloadavg()[0], 2)


def card(load_at_start: float | None = None) -> dict[str, Any]:
    """Of this process's host, with the versions that are loaded; as JSON takes it.

    load_at_start: load_average() from before the measurement.
    """
    import torch

    from ..kernels.cpu import build

    isa = torch.ops.tp_cpu.isa() if build.available() else None
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_at_start": load_at_start,
        "load_average": load_average(),
        "isa": isa,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tp_runtime": __version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def card_lines(shown: dict[str, Any]) -> str:
    """The card for people, in two lines."""
    cache, memory = shown["last_level_cache_bytes"] / 2**20, shown["memory_bytes"] / 2**30
    before = shown["load_average_at_start"]
    load = f"{shown['load_average']}" if before is None else f"{before} to {shown['load_average']}"
    return (
        f"{shown['cpu']}, {shown['cpus']} CPUs, {shown['numa_nodes']} node(s), {cache:.0f} MiB last-"
        f"level cache, {memory:.0f} GiB, load {load}\n"
        f"tp_runtime {shown['tp_runtime']} at {shown['commit'] or 'no commit'}, torch {shown['torch']}, "
        f"kernels {shown['isa'] or 'not built'}, {shown['date']}"
    )


def commit() -> str | None:
    """The commit this package runs from, with -dirty where files differ; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            cwd=_PACKAGE,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
