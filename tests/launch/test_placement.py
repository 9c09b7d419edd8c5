"""Placement: what must hold for every plan, on real machines, synthetic ones and random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tp_testing import sysfs_writer, trees

from tp_runtime.errors import LaunchError
from tp_runtime.launch.placement import Options, plan_ranks
from tp_runtime.launch.plan import Plan, RankPlacement
from tp_runtime.launch.preload import Preload
from tp_runtime.launch.topology import Core, HostTopology, Node, read_topology

Machine = Callable[[str], Path]
NPROCS = (1, 2, 3, 4, 6, 8)
HYBRID = "20em64t-hybrid-1p6c2t+2ca4co1t"


@lru_cache(maxsize=4)
def read(root: Path) -> HostTopology:
    """A machine's topology, kept for the next rank counts."""
    return read_topology(root)


def usable(topology: HostTopology) -> list[Core]:
    allowed = set(topology.allowed_cpus)
    cores = [core for core in topology.cores if set(core.cpus) & allowed]
    fast = [core for core in cores if not core.efficient]
    return fast or cores


def fewest_nodes(topology: HostTopology, num_cores: int) -> int:
    sizes: dict[int | None, int] = {}
    for core in usable(topology):
        sizes[core.node] = sizes.get(core.node, 0) + 1
    total = count = 0
    for size in sorted(sizes.values(), reverse=True):
        if total >= num_cores:
            break
        total, count = total + size, count + 1
    return count


def check_plan(topology: HostTopology, nproc: int, plan: Plan) -> None:
    core_of = {cpu: core for core in topology.cores for cpu in core.cpus}
    assert [rank.rank for rank in plan.ranks] == list(range(nproc))
    for rank in plan.ranks:
        check_rank(topology, rank, core_of)
    cpus = [cpu for rank in plan.ranks for cpu in rank.cpus]
    num_cores = len(usable(topology))
    if nproc <= num_cores:
        assert len(cpus) == len(set(cpus)), "two ranks on one CPU"
        sizes = [rank.cores for rank in plan.ranks]
        if not topology.gpus:
            assert max(sizes) - min(sizes) <= 1
            check_sockets(topology, plan)
        if sum(sizes) < num_cores:
            assert any("stay idle" in warning for warning in plan.warnings)
    else:
        assert {rank.cores for rank in plan.ranks} == {rank.threads for rank in plan.ranks} == {1}
        counts = [cpus.count(cpu) for cpu in set(cpus)]
        assert len(counts) == num_cores and max(counts) - min(counts) <= 1
        assert any(f"{nproc} ranks share {num_cores}" in warning for warning in plan.warnings)


def check_sockets(topology: HostTopology, plan: Plan) -> None:
    """A rank over several sockets has them to itself. (Packages that share a node count as one socket.)"""
    packages_of: dict[int | None, set[int]] = {}
    for core in usable(topology):
        packages_of.setdefault(core.node, set()).add(core.package)
    if any(len(packages) > 1 for packages in packages_of.values()):
        return
    for rank in plan.ranks:
        others = {package for other in plan.ranks if other is not rank for package in other.packages}
        assert len(rank.packages) == 1 or not others & set(rank.packages), "half of two sockets"


def check_rank(topology: HostTopology, rank: RankPlacement, core_of: dict[int, Core]) -> None:
    assert set(rank.cpus) <= set(topology.cpus) & set(topology.allowed_cpus)
    cores = {core_of[cpu].cpus for cpu in rank.cpus}
    assert len(cores) == len(rank.cpus) == rank.cores, "one CPU a core"
    own_nodes = {core_of[cpu].node for cpu in rank.cpus}
    assert set(rank.nodes) == own_nodes - {None}
    assert set(rank.packages) == {core_of[cpu].package for cpu in rank.cpus}
    assert len(own_nodes) <= fewest_nodes(topology, rank.cores), "on more nodes than it must"
    assert 1 <= rank.threads <= rank.cores
    assert rank.env["OMP_NUM_THREADS"] == str(rank.threads)
    check_memory(topology, rank)


def check_memory(topology: HostTopology, rank: RankPlacement) -> None:
    """Memory nodes are allowed, hold memory, and are the nearest such of each of the rank's nodes."""
    holding = {n.number for n in topology.nodes if n.number in topology.allowed_mem_nodes and n.memory_bytes}
    holding = holding or set(topology.allowed_mem_nodes)
    assert set(rank.mem_nodes) <= holding
    expected: set[int] = set() if rank.nodes else holding
    for node in rank.nodes:
        nearest = min(topology.distance(node, other) for other in holding)
        expected |= (
            {n for n in holding if topology.distance(node, n) == nearest} if node not in holding else {node}
        )
    assert set(rank.mem_nodes) == expected
    assert rank.mem_policy == ("bind" if len(rank.mem_nodes) == 1 else "interleave")


@pytest.mark.parametrize("nproc", NPROCS)
@pytest.mark.parametrize("name", [*trees.NAMES, *sysfs_writer.SYNTHETIC])
def test_properties(name: str, nproc: int, machine: Machine) -> None:
    topology = read(machine(name))
    if name == HYBRID and nproc == 8:
        with pytest.raises(LaunchError, match="8 ranks were asked for and 6 P-cores are usable"):
            plan_ranks(topology, nproc)
        return
    plan = plan_ranks(topology, nproc)
    check_plan(topology, nproc, plan)
    assert plan == plan_ranks(topology, nproc), "the same plan twice"


@st.composite
def hosts(draw: st.DrawFn) -> HostTopology:
    """A random host: packages of uneven nodes, SMT or not, some CPUs and memory nodes not allowed."""
    smt = draw(st.integers(1, 2))
    cores: list[Core] = []
    nodes: list[Node] = []
    for package in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 3))):
            first = len(cores)
            for core in range(first, first + draw(st.integers(0, 6))):
                cpus = tuple(core * smt + thread for thread in range(smt))
                cores.append(Core(cpus, package, 0, len(nodes), first // 2 * 2 * smt, False))
            own = tuple(cpu for core in cores[first:] for cpu in core.cpus)
            nodes.append(Node(len(nodes), own, draw(st.sampled_from((0, 1 << 30))), ()))
    if not cores:
        cores, nodes[0] = [Core((0,), 0, 0, 0, 0, False)], replace(nodes[0], cpus=(0,))
    distances = [[10 if a == b else draw(st.sampled_from((12, 21, 28))) for b in nodes] for a in nodes]
    placed = tuple(replace(node, distances=tuple(distances[node.number])) for node in nodes)
    cpus = tuple(cpu for core in cores for cpu in core.cpus)
    allowed = tuple(sorted(draw(st.sets(st.sampled_from(cpus), min_size=1))))
    mem_nodes = tuple(sorted(draw(st.sets(st.sampled_from(range(len(nodes))), min_size=1))))
    return HostTopology(cpus, tuple(cores), placed, allowed, mem_nodes, cpus)


@settings(max_examples=300, deadline=None)
@given(topology=hosts(), nproc=st.integers(1, 12))
def test_properties_of_random_hosts(topology: HostTopology, nproc: int) -> None:
    check_plan(topology, nproc, plan_ranks(topology, nproc))


def test_whole_sockets_before_halves_of_two(machine: Machine) -> None:
    """Sub-NUMA clusters, node numbers interleaved over sockets: package 0 has nodes 0 and 2."""
    ranks = plan_ranks(read_topology(machine("memorysidecaches")), 2).ranks
    assert [(rank.packages, rank.nodes) for rank in ranks] == [((0,), (0, 2)), ((1,), (1, 3))]
    assert [(rank.mem_policy, rank.mem_nodes) for rank in ranks] == [
        ("interleave", (0, 2)),
        ("interleave", (1, 3)),
    ]


@pytest.mark.parametrize(
    ("name", "nproc", "cores", "packages"),
    [
        ("memorysidecaches", 3, 10, [(0,), (0,), (1,)]),
        ("2x Xeon 6 SNC3", 3, 64, [(0,), (0,), (1,)]),
        ("8 sockets", 6, 28, [(n,) for n in range(6)]),
        ("8 sockets", 3, 56, [(0, 1), (2, 3), (4, 5)]),
    ],
)
def test_cores_stay_idle_before_a_rank_reaches_into_a_shared_socket(
    name: str, nproc: int, cores: int, packages: list[tuple[int, ...]], machine: Machine
) -> None:
    plan = plan_ranks(read_topology(machine(name)), nproc)
    assert [rank.packages for rank in plan.ranks] == packages
    assert min(rank.cores for rank in plan.ranks) == cores
    assert any("usable cores stay idle" in warning for warning in plan.warnings)


@settings(max_examples=100, deadline=None)
@given(
    packages=st.integers(2, 4),
    nodes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    nproc=st.integers(1, 24),
)
def test_equal_sockets_carry_equal_ranks(packages: int, nodes: list[int], nproc: int) -> None:
    topology = equal_sockets(packages, nodes)
    plan = plan_ranks(topology, nproc)
    check_plan(topology, nproc, plan)
    if packages <= nproc <= len(topology.cores):
        ranks = [sum(rank.packages == (package,) for rank in plan.ranks) for package in range(packages)]
        assert max(ranks) - min(ranks) <= 1, ranks


def equal_sockets(packages: int, nodes: list[int]) -> HostTopology:
    """Sockets alike: the cores of each one's nodes."""
    cores: list[Core] = []
    numbers = [(package, cores) for package in range(packages) for cores in nodes]
    placed = []
    for node, (package, count) in enumerate(numbers):
        own = tuple(range(len(cores), len(cores) + count))
        cores += [Core((cpu,), package, 0, node, own[0], False) for cpu in own]
        distances = tuple(10 if n == node else 12 if p == package else 21 for n, (p, _) in enumerate(numbers))
        placed.append(Node(node, own, 1 << 30, distances))
    cpus = tuple(range(len(cores)))
    return HostTopology(cpus, tuple(cores), tuple(placed), cpus, tuple(range(len(placed))), cpus)


@pytest.mark.parametrize(
    ("name", "nproc", "each"), [("2x EPYC NPS4", 12, 6), ("2x Xeon 6 SNC3", 8, 4), ("memorysidecaches", 6, 3)]
)
def test_ranks_that_nodes_do_not_divide(name: str, nproc: int, each: int, machine: Machine) -> None:
    ranks = plan_ranks(read_topology(machine(name)), nproc).ranks
    assert [sum(rank.packages == (socket,) for rank in ranks) for socket in (0, 1)] == [each, each]


def test_three_nodes_a_socket(machine: Machine) -> None:
    topology = read_topology(machine("2x Xeon 6 SNC3"))
    assert [rank.nodes for rank in plan_ranks(topology, 2).ranks] == [(0, 1, 2), (3, 4, 5)]
    assert [rank.nodes for rank in plan_ranks(topology, 6).ranks] == [(n,) for n in range(6)]
    assert {rank.packages for rank in plan_ranks(topology, 4).ranks} == {(0,), (1,)}


def test_a_node_is_split_at_l3_boundaries(machine: Machine) -> None:
    topology = read_topology(machine("2x EPYC NPS4"))
    l3_of = {cpu: core.l3 for core in topology.cores for cpu in core.cpus}
    for rank in plan_ranks(topology, 16).ranks:
        assert rank.cores == 8 and len({l3_of[cpu] for cpu in rank.cpus}) == 1


def test_ranks_sit_next_to_their_gpus(machine: Machine) -> None:
    topology = read_topology(machine("8 GPUs"))
    ranks = plan_ranks(topology, 8).ranks
    assert [rank.gpu for rank in ranks] == list(range(8))
    assert [rank.nodes for rank in ranks] == [(0,)] * 4 + [(1,)] * 4
    assert {rank.cores for rank in ranks} == {8}
    assert ranks[0].env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    two = plan_ranks(topology, 2).ranks
    assert [rank.nodes for rank in two] == [(0,), (0,)], "GPUs 0 and 1 are both on node 0"
    visible = plan_ranks(topology, 2, Options(visible_gpus=(6, 2))).ranks
    assert [(rank.gpu, rank.nodes) for rank in visible] == [(6, (1,)), (2, (0,))]
    without = plan_ranks(topology, 2, Options(use_gpus=False)).ranks
    assert [(rank.gpu, rank.nodes) for rank in without] == [(None, (0,)), (None, (1,))]


def test_gpus_of_unknown_node_and_too_few_gpus(tmp_path: Path) -> None:
    host = sysfs_writer.Host(packages=2, gpu_nodes=(-1, -1))
    topology = read_topology(sysfs_writer.write(host, tmp_path))
    plan = plan_ranks(topology, 2)
    assert [rank.gpu for rank in plan.ranks] == [0, 1]
    assert "does not say which node GPUs 0-1 are on" in plan.warnings[0]
    plan = plan_ranks(topology, 4)
    assert {rank.gpu for rank in plan.ranks} == {None}
    assert "4 ranks and 2 GPUs" in plan.warnings[0]


def test_p_cores_first(machine: Machine) -> None:
    topology = read_topology(machine(HYBRID))
    efficient = {cpu for core in topology.cores if core.efficient for cpu in core.cpus}
    assert not efficient & {cpu for rank in plan_ranks(topology, 3).ranks for cpu in rank.cpus}
    everything = plan_ranks(topology, 8, Options(use_e_cores=True))
    assert efficient & {cpu for rank in everything.ranks for cpu in rank.cpus}


def test_smt_on_request(machine: Machine) -> None:
    topology = read_topology(machine("memorysidecaches"))
    (rank,) = plan_ranks(topology, 1, Options(smt=True)).ranks
    assert (rank.cores, rank.threads, len(rank.cpus)) == (40, 80, 80)


@pytest.mark.parametrize(("quota", "nproc", "threads"), [("600000 100000", 2, 3), ("100000 100000", 4, 1)])
def test_cpu_quota_caps_threads(quota: str, nproc: int, threads: int, tmp_path: Path) -> None:
    host = sysfs_writer.Host(cores_of_nodes=(16,), cpu_max=quota)
    plan = plan_ranks(read_topology(sysfs_writer.write(host, tmp_path)), nproc)
    assert {rank.threads for rank in plan.ranks} == {threads}
    assert {rank.cores for rank in plan.ranks} == {16 // nproc}
    assert "CPU quota" in plan.warnings[0]


def test_cores_reserved_for_a_server(machine: Machine) -> None:
    topology = read_topology(machine("memorysidecaches"))
    plan = plan_ranks(topology, 2, Options(reserve_cores=2))
    assert [rank.cores for rank in plan.ranks] == [19, 19]
    with pytest.raises(LaunchError, match="--reserve-cores 39 leaves 1 of 40 usable cores for 2 ranks"):
        plan_ranks(topology, 2, Options(reserve_cores=39))


def test_other_jobs_keep_their_cores(machine: Machine) -> None:
    topology = read_topology(machine("memorysidecaches"))
    socket0 = plan_ranks(topology, 2).ranks[0].cpus
    beside = plan_ranks(topology, 1, Options(busy_cpus=socket0))
    assert not set(beside.ranks[0].cpus) & set(socket0)
    assert "ranks of another job hold CPUs" in beside.warnings[0]
    crowded = plan_ranks(topology, 1, Options(busy_cpus=tuple(topology.cpus)))
    assert "both jobs share cores" in crowded.warnings[0]


def test_only_these_cpus(machine: Machine) -> None:
    topology = read_topology(machine("memorysidecaches"))
    plan = plan_ranks(topology, 2, Options(cpus=(0, 4, 8, 12, 999)))
    assert [rank.cpus for rank in plan.ranks] == [(0, 4), (8, 12)]
    assert "999 are not online and allowed" in plan.warnings[0]
    with pytest.raises(LaunchError, match="--cpus 999: none of them is online"):
        plan_ranks(topology, 1, Options(cpus=(999,)))


def test_preloads_stand_in_the_plan(machine: Machine) -> None:
    options = Options(preload=Preload(("/lib/libtcmalloc.so.4",)), already_preloaded="/lib/mine.so")
    (rank,) = plan_ranks(read_topology(machine("2arm-2c")), 1, options).ranks
    assert rank.env["LD_PRELOAD"] == "/lib/libtcmalloc.so.4:/lib/mine.so"


@pytest.mark.parametrize(
    ("name", "nproc", "says"),
    [
        ("2arm-2c", 3, "3 ranks share 2 usable cores"),
        ("16amd64-4n4c-cgroup-distance-merge", 2, "may not be used for memory; memory goes to nodes 2-3"),
        ("offline-cpu0-node0", 2, "computes on CPUs that no online node has"),
        ("fakememinitiators-1np2c+1npp+gi", 4, "holds no memory|may not be used for memory"),
    ],
)
def test_strict_refuses_what_else_is_a_warning(name: str, nproc: int, says: str, machine: Machine) -> None:
    topology = read_topology(machine(name))
    assert plan_ranks(topology, nproc).warnings
    with pytest.raises(LaunchError, match=f"--numa-strict: .*({says}).*drop --numa-strict"):
        plan_ranks(topology, nproc, Options(strict=True))


@pytest.mark.parametrize("policy", ["bind", "preferred", "interleave", "weighted_interleave", "none"])
def test_a_policy_that_was_asked_for(policy: str, machine: Machine) -> None:
    (rank,) = plan_ranks(read_topology(machine("memorysidecaches")), 1, Options(mem_policy=policy)).ranks
    assert rank.mem_policy == policy
    assert rank.mem_nodes == (() if policy == "none" else (0, 1, 2, 3))


def test_an_unknown_policy_is_refused(machine: Machine) -> None:
    with pytest.raises(LaunchError, match="--mem-policy 'striped' is unknown; choose from auto, bind"):
        plan_ranks(read_topology(machine("2arm-2c")), 1, Options(mem_policy="striped"))


def test_placements_survive_their_json(machine: Machine) -> None:
    for rank in plan_ranks(read_topology(machine("memorysidecaches")), 3).ranks:
        assert RankPlacement.from_dict(rank.to_dict()) == rank
    with pytest.raises(LaunchError, match="placement cannot be read"):
        RankPlacement.from_dict({"rank": 0})
