"""A host as a frozen value: packages, NUMA nodes, cores, L3 domains, what is allowed, GPUs.

Read from sysfs, procfs and cgroups below a root folder, so that another machine's tree can be read
as well. hwloc's view of the same tree is the reference. Only what is online appears. No torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LaunchError
from . import cgroups, pci
from .sysfs import SysRoot, format_list, parse_list

_CPU = "/sys/devices/system/cpu"
_NODE = "/sys/devices/system/node"
_LAST_LEVEL = 3
# A kernel without node files is one node; ACPI's distance of a node to itself is 10, to others 20.
_LOCAL_DISTANCE, _FAR_DISTANCE = 10, 20


@dataclass(frozen=True)
class Core:
    """One physical core: its online logical CPUs, ascending, and where it sits."""

    cpus: tuple[int, ...]
    package: int
    die: int
    node: int | None  # None where no online node claims its CPUs
    l3: int  # the lowest CPU that shares its L3; cores with the same number share one
    efficient: bool  # an E-core of a host with two kinds of core


@dataclass(frozen=True)
class Node:
    """One online NUMA node. Its CPUs may be none, and so may its memory."""

    number: int
    cpus: tuple[int, ...]
    memory_bytes: int
    distances: tuple[int, ...]  # to HostTopology.nodes, in their order
    huge_pages: tuple[tuple[int, int], ...] = ()  # (page size in bytes, pages in the pool)


@dataclass(frozen=True)
class HostTopology:
    """What the launcher knows of a host. CPU numbers are logical ones (the kernel's)."""

    cpus: tuple[int, ...]  # online
    cores: tuple[Core, ...]
    nodes: tuple[Node, ...]
    allowed_cpus: tuple[int, ...]
    allowed_mem_nodes: tuple[int, ...]
    cgroup_cpus: tuple[int, ...]  # online CPUs the cgroups leave; allowed_cpus may be fewer (taskset, srun)
    cpu_quota: float | None = None  # CPUs' worth of time per unit of time, from cgroups
    memory_limit_bytes: int | None = None
    gpus: tuple[pci.Gpu, ...] = ()
    notes: tuple[str, ...] = field(default=())  # what had to be assumed while reading
    has_nodes: bool = True  # False: the kernel has no node files, and `nodes` is the whole host as one

    @property
    def packages(self) -> tuple[int, ...]:
        """Numbers of the packages (sockets) that have online CPUs."""
        return tuple(sorted({core.package for core in self.cores}))

    @property
    def smt(self) -> int:
        """The largest number of online hardware threads of a core."""
        return max((len(core.cpus) for core in self.cores), default=1)

    def node(self, number: int) -> Node:
        """The online node of that number. Raises KeyError where it is none."""
        for node in self.nodes:
            if node.number == number:
                return node
        raise KeyError(number)

    def distance(self, a: int, b: int) -> int:
        """The firmware's distance between two online nodes (10 is local)."""
        order = [node.number for node in self.nodes]
        return self.node(a).distances[order.index(b)]


def read_topology(sysroot: str | os.PathLike[str] = "/") -> HostTopology:
    """The topology of this host, or of the host whose files lie below `sysroot`.

    Raises LaunchError where the folder holds no CPU files.
    """
    root = SysRoot(sysroot)
    notes: list[str] = []
    cpus = _online_cpus(root)
    if not cpus and root.root == Path("/"):
        cpus = tuple(sorted(os.sched_getaffinity(0)))
        notes.append(f"no {_CPU} here; each allowed CPU is taken for a core of one socket")
    if not cpus:
        raise LaunchError(
            f"{root.path(_CPU)} describes no CPU; --sysroot wants a folder that holds sys/devices/system/cpu"
        )
    nodes = _read_nodes(root, cpus, notes)
    cores = _read_cores(root, cpus, nodes)
    limits = cgroups.read_limits(root)
    allowed_cpus, allowed_nodes = _allowed(root, cpus, nodes, limits, notes)
    return HostTopology(
        cpus=cpus,
        cores=cores,
        nodes=nodes,
        allowed_cpus=allowed_cpus,
        allowed_mem_nodes=allowed_nodes,
        cgroup_cpus=tuple(cpu for cpu in cpus if limits.cpus is None or cpu in limits.cpus),
        cpu_quota=limits.cpu_quota,
        memory_limit_bytes=limits.memory_bytes,
        gpus=pci.read_gpus(root),
        notes=tuple(notes),
        has_nodes=bool(root.numbered(_NODE, "node")),
    )


def _online_cpus(root: SysRoot) -> tuple[int, ...]:
    online = root.read_list(f"{_CPU}/online")
    if online:
        return online
    return tuple(n for n in root.numbered(_CPU, "cpu") if root.read(f"{_CPU}/cpu{n}/online") in (None, "1"))


def _read_nodes(root: SysRoot, cpus: tuple[int, ...], notes: list[str]) -> tuple[Node, ...]:
    numbers = root.read_list(f"{_NODE}/online") or root.numbered(_NODE, "node")
    numbers = tuple(n for n in numbers if root.exists(f"{_NODE}/node{n}"))
    if not numbers:
        total = _meminfo_bytes(root.read("/proc/meminfo") or "")
        return (Node(0, cpus, total, (_LOCAL_DISTANCE,), _huge_pages(root, "/sys/kernel/mm/hugepages")),)
    nodes, taken = [], set[int]()
    for position, number in enumerate(numbers):
        folder = f"{_NODE}/node{number}"
        claimed = set(root.read_set(f"{folder}/cpulist", f"{folder}/cpumap") or ()) & set(cpus)
        if claimed & taken:
            notes.append(
                f"node {number} claims CPUs {format_list(claimed & taken)}, which a node before it has; "
                "they are counted there"
            )
        own = tuple(sorted(claimed - taken))
        taken |= claimed
        distances = tuple(int(word) for word in (root.read(f"{folder}/distance") or "").split())
        if len(distances) != len(numbers):
            distances = tuple(
                _LOCAL_DISTANCE if i == position else _FAR_DISTANCE for i in range(len(numbers))
            )
        memory = _meminfo_bytes(root.read(f"{folder}/meminfo") or "")
        nodes.append(Node(number, own, memory, distances, _huge_pages(root, f"{folder}/hugepages")))
    return tuple(nodes)


def _meminfo_bytes(text: str) -> int:
    found = re.search(r"MemTotal:\s*(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def _huge_pages(root: SysRoot, folder: str) -> tuple[tuple[int, int], ...]:
    pools = []
    for name in root.listdir(folder):
        size = re.fullmatch(r"hugepages-(\d+)kB", name)
        if size:
            pools.append((int(size[1]) * 1024, root.read_int(f"{folder}/{name}/nr_hugepages") or 0))
    return tuple(sorted(pools))


def _read_cores(root: SysRoot, cpus: tuple[int, ...], nodes: tuple[Node, ...]) -> tuple[Core, ...]:
    online = set(cpus)
    node_of = {cpu: node.number for node in nodes for cpu in node.cpus}
    package_of = _packages(root, cpus)
    efficient = _efficient_cpus(root, cpus)
    cores: list[Core] = []
    seen: set[int] = set()
    for cpu in cpus:
        if cpu in seen:
            continue
        folder = f"{_CPU}/cpu{cpu}/topology"
        names = ("core_cpus_list", "core_cpus", "thread_siblings_list", "thread_siblings")
        shared = set(root.read_set(*(f"{folder}/{name}" for name in names)) or ()) & online
        # A core does not span nodes; where files claim it does, the node files are believed.
        own = {c for c in shared if node_of.get(c) == node_of.get(cpu)} - seen | {cpu}
        seen |= own
        l3 = _l3_first_cpu(root, cpu, online)
        if l3 is None:
            place = (node_of.get(cpu), package_of[cpu])
            l3 = min(c for c in cpus if (node_of.get(c), package_of[c]) == place)
        die = root.read_int(f"{folder}/die_id") or 0
        cores.append(
            Core(tuple(sorted(own)), package_of[cpu], max(die, 0), node_of.get(cpu), l3, cpu in efficient)
        )
    return tuple(cores)


def _packages(root: SysRoot, cpus: tuple[int, ...]) -> dict[int, int]:
    """Package number of each CPU. Where ids are missing (-1) or double, packages are counted up."""
    online = frozenset(cpus)
    members: dict[int, frozenset[int]] = {}
    ids: dict[frozenset[int], int] = {}
    groups: dict[tuple[int, ...], frozenset[int]] = {}
    for cpu in cpus:
        folder = f"{_CPU}/cpu{cpu}/topology"
        names = ("package_cpus_list", "package_cpus", "core_siblings_list", "core_siblings")
        number = root.read_int(f"{folder}/physical_package_id")
        shared = root.read_set(*(f"{folder}/{name}" for name in names))
        if shared is None:
            group = online  # without any topology files the whole host is one package
        else:
            group = groups.setdefault(shared, online.intersection(shared)) or frozenset((cpu,))
        members[cpu] = group
        ids[group] = -1 if number is None else number
    if min(ids.values()) < 0 or len(set(ids.values())) < len(ids):
        ids = {group: count for count, group in enumerate(sorted(ids, key=min))}
    return {cpu: ids[group] for cpu, group in members.items()}


def _l3_first_cpu(root: SysRoot, cpu: int, online: set[int]) -> int | None:
    folder = f"{_CPU}/cpu{cpu}/cache"
    for index in root.numbered(folder, "index"):
        cache = f"{folder}/index{index}"
        if root.read_int(f"{cache}/level") == _LAST_LEVEL:
            shared = set(root.read_set(f"{cache}/shared_cpu_list", f"{cache}/shared_cpu_map") or ()) & online
            return min(shared | {cpu})
    return None


def _efficient_cpus(root: SysRoot, cpus: tuple[int, ...]) -> frozenset[int]:
    """CPUs on the smaller kind of core: the kernel's word, else its capacity, else the clock.

    Clocks of equal cores differ by a few percent (favoured cores), those of two kinds by far more.
    """
    atoms = root.read_list("/sys/devices/cpu_atom/cpus")
    if atoms:
        return frozenset(atoms) if set(atoms) < set(cpus) else frozenset()
    for name, ratio in (
        ("cpu_capacity", 0.9),
        ("cpufreq/base_frequency", 0.85),
        ("cpufreq/cpuinfo_max_freq", 0.85),
    ):
        if root.read_int(f"{_CPU}/cpu{cpus[0]}/{name}") is None:
            continue
        values = {cpu: root.read_int(f"{_CPU}/cpu{cpu}/{name}") for cpu in cpus}
        known = {cpu: value for cpu, value in values.items() if value}
        if len(known) == len(cpus):
            return frozenset(cpu for cpu, value in known.items() if value < ratio * max(known.values()))
    return frozenset()


def _allowed(
    root: SysRoot, cpus: tuple[int, ...], nodes: tuple[Node, ...], limits: cgroups.Limits, notes: list[str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """CPUs and memory nodes that the kernel's word on this process and its cgroups leave."""
    online_nodes = tuple(node.number for node in nodes)
    status = root.read("/proc/self/status") or ""
    allowed: list[tuple[int, ...]] = []
    for what, online, limit in (("Cpus", cpus, limits.cpus), ("Mems", online_nodes, limits.mem_nodes)):
        listed = re.search(rf"^{what}_allowed_list:\s*(\S+)", status, re.MULTILINE)
        left = set(online)
        for allowance in (parse_list(listed[1]) if listed else None, limit):
            if allowance is None:
                continue
            if not left & set(allowance):
                notes.append(
                    f"allowed {what.lower()} {format_list(allowance)} and online ones {format_list(left)} "
                    "do not meet; planned as if all online ones were allowed"
                )
                continue
            left &= set(allowance)
        allowed.append(tuple(sorted(left)))
    return allowed[0], allowed[1]
