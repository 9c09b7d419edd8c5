"""Topologies of real machines equal hwloc's view of them; synthetic ones equal what was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tp_testing import sysfs_writer, trees

from tp_runtime.errors import LaunchError
from tp_runtime.launch.sysfs import format_list, parse_list, parse_mask
from tp_runtime.launch.topology import read_topology

Machine = Callable[[str], Path]
# hwloc leaves out nodes without memory; here the CPUs' nodes are 0-3 and the memory's are 5-10.
SPLIT_NODES = "fakememinitiators-1np2c+1npp+gi"


@pytest.mark.parametrize("name", [n for n in trees.NAMES if n not in (*trees.CGROUP_NAMES, SPLIT_NODES)])
def test_equals_hwloc(name: str, machine: Machine) -> None:
    topology, hwloc = read_topology(machine(name)), trees.hwloc_view(name)
    assert len(topology.packages) == hwloc.packages
    assert len(topology.cores) == hwloc.cores or not hwloc.cores
    assert set(topology.cpus) == hwloc.cpus
    assert [node.number for node in topology.nodes] == sorted(hwloc.node_cpus)
    cores_of = Counter(core.node for core in topology.cores)
    for node in topology.nodes:
        assert set(node.cpus) == hwloc.node_cpus[node.number], node.number
        if hwloc.node_cores:
            assert cores_of[node.number] == hwloc.node_cores[node.number], node.number


def test_nodes_of_cpus_and_nodes_of_memory_apart(machine: Machine) -> None:
    topology, hwloc = read_topology(machine(SPLIT_NODES)), trees.hwloc_view(SPLIT_NODES)
    assert (len(topology.packages), len(topology.cores)) == (hwloc.packages, hwloc.cores) == (2, 8)
    assert set(topology.cpus) == hwloc.cpus
    assert set(topology.allowed_mem_nodes) == set(hwloc.node_cpus)
    assert [node.number for node in topology.nodes] == list(range(11))
    for node in (node for node in topology.nodes if node.cpus):
        nearest = min(topology.allowed_mem_nodes, key=lambda memory: topology.distance(node.number, memory))
        assert set(node.cpus) == hwloc.node_cpus[nearest]


@pytest.mark.parametrize("name", trees.CGROUP_NAMES)
def test_control_groups(name: str, machine: Machine) -> None:
    root = machine(name)
    topology, hwloc = read_topology(root), trees.hwloc_view(name)
    assert set(topology.allowed_cpus) == hwloc.cpus
    assert set(topology.allowed_mem_nodes) == set(hwloc.node_cpus)
    system = root / "sys/devices/system"
    assert topology.cpus == parse_list((system / "cpu/online").read_text())
    assert tuple(node.number for node in topology.nodes) == parse_list((system / "node/online").read_text())


@pytest.mark.parametrize("name", sysfs_writer.SYNTHETIC)
def test_synthetic(name: str, machine: Machine) -> None:
    host, topology = sysfs_writer.SYNTHETIC[name], read_topology(machine(name))
    num_nodes = host.packages * len(host.cores_of_nodes)
    num_cpus = host.packages * sum(host.cores_of_nodes) * host.smt
    assert len(topology.packages) == host.packages
    assert len(topology.nodes) == num_nodes
    assert len(topology.cpus) == num_cpus - len(host.offline)
    assert not set(topology.cpus) & set(host.offline)
    assert len({core.l3 for core in topology.cores}) == num_nodes * host.l3_of_node
    if not host.offline:
        assert len(topology.cores) == host.packages * sum(host.cores_of_nodes)
        assert {len(core.cpus) for core in topology.cores} == {host.smt}
    assert [gpu.node for gpu in topology.gpus] == list(host.gpu_nodes)


def test_unplugged_cores_are_gone_and_half_ones_stay(machine: Machine) -> None:
    topology = read_topology(machine("hot-unplugged CPUs"))
    by_first = {core.cpus[0]: core.cpus for core in topology.cores}
    assert 0 not in by_first and 32 not in by_first  # both threads of core 0 are offline
    assert by_first[37] == (37,)  # the other thread of core 5
    assert by_first[1] == (1,)  # CPU 33 is offline
    assert by_first[2] == (2, 34)


def test_two_kinds_of_core(machine: Machine) -> None:
    topology = read_topology(machine("20em64t-hybrid-1p6c2t+2ca4co1t"))
    assert sum(core.efficient for core in topology.cores) == 8
    assert {len(core.cpus) for core in topology.cores if core.efficient} == {1}


def test_more_than_1024_cpus(machine: Machine) -> None:
    topology = read_topology(machine("2048 CPUs"))
    assert topology.cpus[-1] == 2047
    assert topology.cores[-1].cpus == (1023, 2047)


def test_pci_devices_without_gpus(machine: Machine) -> None:
    """37 devices, some with numa_node -1, a Matrox console chip among them: none is a GPU."""
    assert read_topology(machine("40intel64-2g2n4c+pcilocality")).gpus == ()


def test_gpu_links(machine: Machine) -> None:
    gpus = read_topology(machine("8 GPUs")).gpus
    assert gpus[0].links == ("X", "NODE", "NODE", "NODE", "SYS", "SYS", "SYS", "SYS")


def test_cpu_quota_of_both_versions(tmp_path: Path) -> None:
    version2 = sysfs_writer.write(sysfs_writer.Host(cpu_max="350000 100000"), tmp_path / "v2")
    assert read_topology(version2).cpu_quota == 3.5
    version1 = sysfs_writer.write(sysfs_writer.Host(), tmp_path / "v1")
    for name, text in {
        "proc/mounts": "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0",
        "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc",
        # A container sees its own group as the mount's root, under the host's path.
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    }.items():
        (version1 / name).parent.mkdir(parents=True, exist_ok=True)
        (version1 / name).write_text(text + "\n")
    assert read_topology(version1).cpu_quota == 1.5


def test_overlapping_claims_are_said_and_counted_once(tmp_path: Path) -> None:
    root = sysfs_writer.write(sysfs_writer.Host(cores_of_nodes=(2, 2)), tmp_path)
    (root / "sys/devices/system/node/node1/cpulist").write_text("1-3\n")
    topology = read_topology(root)
    assert [node.cpus for node in topology.nodes] == [(0, 1), (2, 3)]
    assert "node 1 claims CPUs 1" in topology.notes[0]


def test_no_cpu_files_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="describes no CPU; --sysroot wants"):
        read_topology(tmp_path)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0-2,33\n\0", (0, 1, 2, 33)), ("", ()), ("7", (7,)), (" 4-5 , 9 ", (4, 5, 9))],
)
def test_lists(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_list(text) == numbers
    assert parse_list(format_list(numbers)) == numbers


def test_masks() -> None:
    assert parse_mask("00000001,00000000,00000003\n\0") == (0, 1, 64)
    assert parse_mask("0") == ()
