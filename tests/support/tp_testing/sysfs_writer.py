"""A small writer of sysfs trees: hosts nobody here has, from a few numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tp_runtime.launch.sysfs import format_list


@dataclass(frozen=True)
class Host:
    """A host to write. Cores are numbered node by node; further threads of all cores come after them."""

    packages: int = 1
    cores_of_nodes: tuple[int, ...] = (4,)  # cores of each node of a package
    l3_of_node: int = 1  # L3 domains of a node; 0: one for the whole package
    smt: int = 1
    adjacent_siblings: bool = False  # threads of a core numbered next to each other
    gpu_nodes: tuple[int, ...] = ()  # node of each GPU, -1 for unknown
    offline: tuple[int, ...] = ()  # CPUs
    allowed: tuple[int, ...] | None = None  # by a version 2 control group
    mem_nodes: tuple[int, ...] | None = None
    cpu_max: str | None = None
    node_memory_kb: int = 64 << 20
    memoryless: tuple[int, ...] = field(default=())


def write(host: Host, root: Path) -> Path:
    """Write the host's tree below `root` and return it."""
    _Writer(host, root).write()
    return root


class _Writer:
    def __init__(self, host: Host, root: Path) -> None:
        self.host, self.root = host, root
        self.threads: dict[int, list[int]] = {}  # of each core
        self.place: dict[int, tuple[int, int, int]] = {}  # of each core: package, node, L3
        core = 0
        num_cores = host.packages * sum(host.cores_of_nodes)
        for package in range(host.packages):
            for index, cores in enumerate(host.cores_of_nodes):
                node = package * len(host.cores_of_nodes) + index
                for position in range(cores):
                    l3 = (node, position * host.l3_of_node // cores) if host.l3_of_node else (-package - 1, 0)
                    step = (1, host.smt) if host.adjacent_siblings else (num_cores, 1)
                    self.threads[core] = [core * step[1] + thread * step[0] for thread in range(host.smt)]
                    self.place[core] = (package, node, hash_free(l3))
                    core += 1

    def write(self) -> None:
        host = self.host
        present = sorted(cpu for cpus in self.threads.values() for cpu in cpus)
        online = [cpu for cpu in present if cpu not in host.offline]
        self._put("sys/devices/system/cpu/online", format_list(online))
        self._put("sys/devices/system/cpu/possible", f"0-{len(present) * 2 - 1}")
        self._put("sys/devices/system/cpu/present", format_list(present))
        for core, cpus in self.threads.items():
            for cpu in cpus:
                self._cpu(core, cpu, cpu in online)
        self._nodes()
        for index, node in enumerate(host.gpu_nodes):
            self._gpu(index, node)
        self._cgroup()

    @cache  # noqa: B019  (one writer lives for one host)
    def _members(self, level: int, number: int) -> str:
        """The online CPUs of a package (level 0), node (1) or L3 domain (2), as a list."""
        cores = (core for core, place in self.place.items() if place[level] == number)
        return format_list(
            cpu for core in cores for cpu in self.threads[core] if cpu not in self.host.offline
        )

    def _cpu(self, core: int, cpu: int, is_online: bool) -> None:
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        self._put(f"{folder}/online", "1" if is_online else "0")
        if not is_online:
            return
        package, _, l3 = self.place[core]
        siblings = format_list(set(self.threads[core]) - set(self.host.offline))
        self._put(f"{folder}/topology/physical_package_id", str(package))
        self._put(f"{folder}/topology/core_id", str(core))
        self._put(f"{folder}/topology/core_cpus_list", siblings)
        self._put(f"{folder}/topology/package_cpus_list", self._members(0, package))
        self._put(f"{folder}/cache/index3/level", "3")
        self._put(f"{folder}/cache/index3/type", "Unified")
        self._put(f"{folder}/cache/index3/shared_cpu_list", self._members(2, l3))

    def _nodes(self) -> None:
        host, per_package = self.host, len(self.host.cores_of_nodes)
        nodes = range(host.packages * per_package)
        self._put("sys/devices/system/node/online", format_list(nodes))
        for node in nodes:
            folder = f"sys/devices/system/node/node{node}"
            distances = [
                10 if n == node else 12 if n // per_package == node // per_package else 21 for n in nodes
            ]
            self._put(f"{folder}/cpulist", self._members(1, node))
            self._put(f"{folder}/distance", " ".join(map(str, distances)))
            memory = 0 if node in host.memoryless else host.node_memory_kb
            self._put(f"{folder}/meminfo", f"Node {node} MemTotal:       {memory} kB")

    def _gpu(self, index: int, node: int) -> None:
        bus = 0x10 + 0x10 * index
        address = f"0000:{bus:02x}:00.0"
        device = f"sys/devices/pci0000:{bus - 1:02x}/{address}"
        for name, text in (("vendor", "0x10de"), ("class", "0x030200"), ("numa_node", str(node))):
            self._put(f"{device}/{name}", text)
        link = self.root / "sys/bus/pci/devices" / address
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../../../{device}")

    def _cgroup(self) -> None:
        host = self.host
        if host.allowed is None and host.mem_nodes is None and host.cpu_max is None:
            return
        self._put("proc/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0")
        self._put("proc/self/cgroup", "0::/job")
        for name, text in (
            ("cpuset.cpus.effective", None if host.allowed is None else format_list(host.allowed)),
            ("cpuset.mems.effective", None if host.mem_nodes is None else format_list(host.mem_nodes)),
            ("cpu.max", host.cpu_max),
        ):
            if text is not None:
                self._put(f"sys/fs/cgroup/job/{name}", text)

    def _put(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def hash_free(l3: tuple[int, int]) -> int:
    """One number for an L3 domain: node (or -package - 1) and index within it."""
    return l3[0] * 1000 + l3[1]


XEON6_SNC3 = Host(packages=2, cores_of_nodes=(43, 43, 42), smt=2)
EPYC_NPS4 = Host(packages=2, cores_of_nodes=(16, 16, 16, 16), l3_of_node=2, smt=2)
EIGHT_SOCKETS = Host(packages=8, cores_of_nodes=(28,), smt=2)
CPUS_2048 = Host(packages=8, cores_of_nodes=(64, 64), smt=2)
EIGHT_GPUS = Host(packages=2, cores_of_nodes=(32,), smt=2, gpu_nodes=(0, 0, 0, 0, 1, 1, 1, 1))
UNPLUGGED = Host(
    packages=2, cores_of_nodes=(8, 8), smt=2, offline=(0, 5, 6, 7, 9, 32, 33, 41, 60, 61, 62, 63)
)
SYNTHETIC = {
    "2x Xeon 6 SNC3": XEON6_SNC3,
    "2x EPYC NPS4": EPYC_NPS4,
    "8 sockets": EIGHT_SOCKETS,
    "2048 CPUs": CPUS_2048,
    "8 GPUs": EIGHT_GPUS,
    "hot-unplugged CPUs": UNPLUGGED,
}
