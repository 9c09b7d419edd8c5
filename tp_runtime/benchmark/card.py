"""The card of a measurement: hardware, versions, commit. Figures without one cannot be compared."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from .._version import __version__
from ..engine.figures import last_level_cache_bytes

_PACKAGE = Path(__file__).resolve().parents[1]
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
_NVIDIA_PROC = Path("/proc/driver/nvidia")


def load_average() -> float:
    """Of the last minute: above the threads of a measurement, something else ran beside it."""
    return round(os.getloadavg()[0], 2)


def card(load_at_start: float | None = None, num_gpus: int = 0) -> dict[str, Any]:
    """Of this process's host, with the versions that are loaded; as JSON takes it.

    load_at_start: load_average() from before the measurement. num_gpus: how many took part in it; where
    some did, the kernels for CPUs are not built for the card's sake.
    """
    import torch

    from ..kernels.cpu import build

    isa = torch.ops.tp_cpu.isa() if num_gpus == 0 and build.available() else None
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_at_start": load_at_start,
        "load_average": load_average(),
        "isa": isa,
        "gpus": [torch.cuda.get_device_name(index) for index in range(num_gpus)],
        "driver": gpus_and_driver()[1] if num_gpus else None,
        "cuda": torch.version.cuda if num_gpus else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tp_runtime": __version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def card_lines(shown: dict[str, Any]) -> str:
    """The card for people, in two lines, and one more for GPUs."""
    cache, memory = shown["last_level_cache_bytes"] / 2**20, shown["memory_bytes"] / 2**30
    before = shown["load_average_at_start"]
    load = f"{shown['load_average']}" if before is None else f"{before} to {shown['load_average']}"
    names, kernels = shown.get("gpus"), f"kernels {shown['isa'] or 'not built'}"
    gpus = ""
    if names:
        gpus = f"{len(names)} x {names[0]}, driver {shown['driver']}\n"
        kernels = f"CUDA {shown['cuda']}"
    return gpus + (
        f"{shown['cpu']}, {shown['cpus']} CPUs, {shown['numa_nodes']} node(s), {cache:.0f} MiB last-"
        f"level cache, {memory:.0f} GiB, load {load}\n"
        f"tp_runtime {shown['tp_runtime']} at {shown['commit'] or 'no commit'}, torch {shown['torch']}, "
        f"{kernels}, {shown['date']}"
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


def gpus_and_driver() -> tuple[list[str], str | None]:
    """Names of this host's NVIDIA GPUs and their driver's version, as far as they can be known. No torch."""
    try:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=20, check=True)
        found = [line.rsplit(", ", 1) for line in done.stdout.splitlines() if ", " in line]
        if found:
            return [name for name, _ in found], found[0][1]
    except (OSError, subprocess.SubprocessError):
        pass
    names = [_after_colon(file, "Model:") for file in sorted(_NVIDIA_PROC.glob("gpus/*/information"))]
    try:
        version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", (_NVIDIA_PROC / "version").read_text())
    except OSError:
        version = None
    return [name for name in names if name], version.group(0) if version else None


def _after_colon(file: Path, start: str) -> str:
    for line in file.read_text().splitlines():
        if line.startswith(start):
            return line.partition(":")[2].strip()
    return ""


def cpu_model() -> str:
    """As /proc/cpuinfo has it."""
    return _after_colon(Path("/proc/cpuinfo"), "model name") or platform.machine()
