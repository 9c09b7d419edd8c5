"""Free memory of each rank: of its NUMA nodes or its GPU, shared with the ranks beside it. No torch."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import psutil

from ..errors import LaunchError
from ..launch import cgroups
from ..launch.placement import plan_ranks
from ..launch.sysfs import SysRoot
from ..launch.topology import read_topology

_NVIDIA_SMI = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]


def free_bytes_by_rank(nproc: int, device: str) -> list[int | None]:
    """Bytes each of `nproc` ranks on this host may still take, as `tp-launch --numa` would place them.

    None where it cannot be known (no nvidia-smi, fewer GPUs than ranks).
    """
    if device == "cuda":
        return _free_of_gpus(nproc)
    topology = read_topology()
    shared = host_free_bytes()
    try:
        nodes_of = [rank.mem_nodes for rank in plan_ranks(topology, nproc).ranks]
    except LaunchError:
        nodes_of = [()] * nproc  # this host cannot place them; the plan is for another one
    ranks_on = Counter(node for nodes in nodes_of for node in nodes)
    free = {node: _free_of_node(node) for node in ranks_on}
    found = [
        sum(free[node] // ranks_on[node] for node in nodes) if nodes else shared // nproc
        for nodes in nodes_of
    ]
    total = sum(found)
    return [own * shared // total if total > shared else own for own in found]


def host_free_bytes(sysroot: str = "/") -> int:
    """Bytes that processes of this host, or of this container, may still take together."""
    root = SysRoot(sysroot)
    free = [
        left for folder in cgroups.group_folders(root) if (left := _left_in_group(root, folder)) is not None
    ]
    return min([psutil.virtual_memory().available, *free])


def _left_in_group(root: SysRoot, folder: str) -> int | None:
    """What a control group's limit leaves: page cache counts as free. None where there is no limit."""
    for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        limit, used = (root.read_int(f"{folder}/{name}") for name in names)
        if limit is not None and used is not None:
            words = [line.split() for line in (root.read(f"{folder}/memory.stat") or "").splitlines()]
            kept = {line[0]: int(line[1]) for line in words if len(line) == 2}
            prefix = "total_" if "total_inactive_file" in kept else ""
            cached = sum(kept.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            return max(0, limit - max(0, used - cached))
    return None


def _free_of_node(node: int) -> int:
    """Free bytes of a node and those of its page cache, which the kernel gives up first."""
    try:
        text = Path(f"/sys/devices/system/node/node{node}/meminfo").read_text()
    except OSError:
        return psutil.virtual_memory().available
    words = [line.split() for line in text.splitlines()]
    sizes = {line[2].rstrip(":"): int(line[3]) * 1024 for line in words if len(line) >= 4}
    return sizes.get("MemFree", 0) + sizes.get("Active(file)", 0) + sizes.get("Inactive(file)", 0)


def _free_of_gpus(nproc: int) -> list[int | None]:
    try:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=10, check=True)
        free = [int(line) << 20 for line in done.stdout.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return [None] * nproc
    return [free[rank] if rank < len(free) else None for rank in range(nproc)]
