"""What the control groups of a process allow: CPUs, memory nodes, CPU quota, memory.

Versions 1 and 2, the older cpuset file system, and mounts in unusual places are read through the
mount table. The tightest limit of a group and all its ancestors counts. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from .sysfs import SysRoot

# Version 1 writes "no limit" as the largest page-aligned number; anything near it is none.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True)
class Limits:
    """None where nothing limits."""

    cpus: tuple[int, ...] | None = None
    mem_nodes: tuple[int, ...] | None = None
    cpu_quota: float | None = None  # CPUs
    memory_bytes: int | None = None


@dataclass(frozen=True)
class _Mount:
    folder: str
    kind: str
    options: frozenset[str]


def _mounts(root: SysRoot) -> list[_Mount]:
    found = []
    for line in (root.read("/proc/self/mounts") or root.read("/proc/mounts") or "").splitlines():
        words = line.split()
        if len(words) >= 4 and words[2] in ("cgroup", "cgroup2", "cpuset"):
            found.append(_Mount(words[1].replace("\\040", " "), words[2], frozenset(words[3].split(","))))
    return found


def _own_groups(root: SysRoot) -> dict[str, str]:
    """The process's group by controller; "" is version 2's."""
    groups: dict[str, str] = {}
    for line in (root.read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            groups[controller] = path
    legacy = root.read("/proc/self/cpuset")
    if legacy:
        groups.setdefault("cpuset", legacy)
    return groups


def _ancestry(root: SysRoot, mount: str, group: str) -> list[str]:
    """Folders of the group and its ancestors below the mount, innermost first.

    A container may see the host's path of its group while the mount shows the group itself as the
    root: leading parts are dropped until the rest exists.
    """
    parts = PurePosixPath(group).parts[1:]
    while parts and not root.exists("/".join((mount, *parts))):
        parts = parts[1:]
    return ["/".join((mount, *parts[:depth])) for depth in range(len(parts), -1, -1)]


def _first_list(root: SysRoot, folders: list[str], *names: str) -> tuple[int, ...] | None:
    for folder in folders:
        for name in names:
            numbers = root.read_list(f"{folder}/{name}")
            if numbers:
                return numbers
    return None


def _quota(root: SysRoot, folder: str) -> float | None:
    words = (root.read(f"{folder}/cpu.max") or "").split()
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    quota = root.read_int(f"{folder}/cpu.cfs_quota_us")
    period = root.read_int(f"{folder}/cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _memory(root: SysRoot, folder: str) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        limit = root.read_int(f"{folder}/{name}")
        if limit is not None and limit < _UNLIMITED_BYTES:
            return limit
    return None


def group_folders(root: SysRoot) -> list[str]:
    """All folders whose limits hold for the process `self` under `root`."""
    return [folder for _, ancestry in _own_folders(root) for folder in ancestry]


def _own_folders(root: SysRoot) -> list[tuple[_Mount, list[str]]]:
    groups = _own_groups(root)
    found = []
    for mount in _mounts(root):
        if mount.kind == "cgroup2":
            group = groups.get("", groups.get("cpuset", "/"))
        elif mount.kind == "cpuset":
            group = groups.get("cpuset", "/")
        else:
            group = next(
                (groups[c] for c in ("cpuset", "cpu", "memory") if c in mount.options and c in groups), "/"
            )
        found.append((mount, _ancestry(root, mount.folder.rstrip("/"), group)))
    return found


def read_limits(root: SysRoot) -> Limits:
    """What all groups of the process `self` under `root` allow together."""
    cpus: set[int] | None = None
    nodes: set[int] | None = None
    quotas: list[float] = []
    memories: list[int] = []
    for mount, folders in _own_folders(root):
        if mount.kind != "cgroup" or "cpuset" in mount.options:
            names = ("cpuset.{}.effective", "cpuset.effective_{}", "cpuset.{}", "effective_{}", "{}")
            allowed = _first_list(root, folders, *(name.format("cpus") for name in names))
            cpus = cpus if allowed is None else set(allowed) & (cpus if cpus is not None else set(allowed))
            allowed = _first_list(root, folders, *(name.format("mems") for name in names))
            nodes = (
                nodes if allowed is None else set(allowed) & (nodes if nodes is not None else set(allowed))
            )
        quotas += [q for folder in folders if (q := _quota(root, folder)) is not None]
        memories += [m for folder in folders if (m := _memory(root, folder)) is not None]
    return Limits(
        cpus=None if cpus is None else tuple(sorted(cpus)),
        mem_nodes=None if nodes is None else tuple(sorted(nodes)),
        cpu_quota=min(quotas, default=None),
        memory_bytes=min(memories, default=None),
    )
