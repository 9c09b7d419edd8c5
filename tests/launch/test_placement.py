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
from tp_runtime.launch.pci import Gpu
from tp_runtime.launch.placement import Options, plan_ranks, unbound_threads
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
        if topology.cpu_quota is not None:
            assert rank.threads <= max(1, topology.cpu_quota / nproc)
        gpu_node = None if rank.gpu is None else topology.gpus[rank.gpu].node
        if gpu_node is not None and gpu_node not in rank.nodes:
            assert any(f"of node {gpu_node} from " in warning for warning in plan.warnings)
    assert {rank.gpu is None for rank in plan.ranks} == {not topology.gpus or len(topology.gpus) < nproc}
    cpus = [cpu for rank in plan.ranks for cpu in rank.cpus]
    num_cores = len(usable(topology))
    if nproc <= num_cores:
        assert len(cpus) == len(set(cpus)), "two ranks on one CPU"
        sizes = [rank.cores for rank in plan.ranks]
        if plan.ranks[0].gpu is None:
            assert max(sizes) - min(sizes) <= 1
            check_sockets(topology, plan)
        if sum(sizes) < num_cores:
            assert any("stay idle" in warning for warning in plan.warnings)
        if any(core.node is None for core in topology.cores for cpu in core.cpus if cpu in cpus):
            assert any("on CPUs that no online node has" in warning for warning in plan.warnings)
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
    """Memory nodes are allowed, hold memory, and are the nearest such of each of the rank's nodes.

    CPUs without a node have the memory of their sockets, where there is some.
    """
    if not topology.has_nodes:
        assert (rank.mem_policy, rank.mem_nodes) == ("none", ())
        return
    holding = {n.number for n in topology.nodes if n.number in topology.allowed_mem_nodes and n.memory_bytes}
    holding = holding or set(topology.allowed_mem_nodes)
    assert set(rank.mem_nodes) <= holding
    expected: set[int] = set()
    homeless = {c.package for c in topology.cores if c.node is None and set(c.cpus) & set(rank.cpus)}
    if homeless:
        beside = {c.node for c in topology.cores if c.package in homeless}
        expected = (beside & holding) or holding
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


WRITTEN = {
    "siblings side by side": sysfs_writer.Host(
        packages=2, cores_of_nodes=(5, 4), smt=2, adjacent_siblings=True, allowed=(*range(1, 20), 30, 31)
    ),
    "memory here and there": sysfs_writer.Host(
        packages=2, cores_of_nodes=(3, 3), memoryless=(0, 3), mem_nodes=(1, 2), allowed=tuple(range(2, 12))
    ),
    "one L3 a socket, quota": sysfs_writer.Host(
        packages=2, cores_of_nodes=(6, 6), l3_of_node=0, smt=2, mem_nodes=(1,), cpu_max="700000 100000"
    ),
    "GPUs on one socket": sysfs_writer.Host(
        packages=2, cores_of_nodes=(4, 4), gpu_nodes=(1, 1, 1, 1, -1, 0, 1, 1), offline=(4, 9)
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_properties_of_hosts_with_limits(name: str, tmp_path: Path) -> None:
    topology = read_topology(sysfs_writer.write(WRITTEN[name], tmp_path))
    for nproc in (*NPROCS, 40):
        check_plan(topology, nproc, plan_ranks(topology, nproc))


@st.composite
def hosts(draw: st.DrawFn) -> HostTopology:
    """A random host: packages of uneven nodes, SMT or not, some CPUs and memory nodes not allowed; GPUs,
    E-cores and a CPU quota on some.
    """
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
    small = draw(st.integers(0, len(cores) - 1)) if draw(st.booleans()) else 0
    kinds = tuple(replace(core, efficient=len(cores) - i <= small) for i, core in enumerate(cores))
    gpu_nodes = draw(st.lists(st.one_of(st.none(), st.integers(0, len(nodes) - 1)), max_size=8))
    gpus = tuple(Gpu(index, f"0000:{index:02x}:00.0", node) for index, node in enumerate(gpu_nodes))
    quota = draw(st.one_of(st.none(), st.floats(0.5, 16.0)))
    return HostTopology(cpus, kinds, placed, allowed, mem_nodes, cpus, cpu_quota=quota, gpus=gpus)


@settings(max_examples=300, deadline=None)
@given(topology=hosts(), nproc=st.integers(1, 12))
def test_properties_of_random_hosts(topology: HostTopology, nproc: int) -> None:
    allowed = [core for core in topology.cores if set(core.cpus) & set(topology.allowed_cpus)]
    fast = [core for core in allowed if not core.efficient]
    if len(fast) < len(allowed) and 0 < len(fast) < nproc:
        with pytest.raises(LaunchError, match=f"{nproc} ranks were asked for and {len(fast)} P-cores"):
            plan_ranks(topology, nproc)
        return
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


def test_p_cores_first(machine: Machine) -> None:
    topology = read_topology(machine(HYBRID))
    efficient = {cpu for core in topology.cores if core.efficient for cpu in core.cpus}
    assert not efficient & {cpu for rank in plan_ranks(topology, 3).ranks for cpu in rank.cpus}
    assert "8 E-cores are left out" in plan_ranks(topology, 3).warnings[0]
    assert unbound_threads(topology, 8) == 1, "ranks that are not bound are never refused"
    assert unbound_threads(topology, 3) == 2
    everything = plan_ranks(topology, 8, Options(use_e_cores=True))
    two = plan_ranks(topology, 2, Options(use_e_cores=True, smt=True))
    assert any("E-cores; those with most set the pace" in warning for warning in two.warnings)
    assert any("hardware threads, since not every core" in warning for warning in two.warnings)
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


def test_cpu_quota_between_cores_and_their_threads_is_said(tmp_path: Path) -> None:
    host = sysfs_writer.Host(cores_of_nodes=(8,), smt=2, cpu_max="1200000 100000")
    topology = read_topology(sysfs_writer.write(host, tmp_path))
    assert plan_ranks(topology, 1).warnings == ()
    plan = plan_ranks(topology, 1, Options(smt=True))
    assert plan.ranks[0].threads == 12
    assert "CPU quota is 12 CPUs, so the rank runs 12 threads and not 16" in plan.warnings[0]
    assert plan_ranks(topology, 1, Options(smt=True, threads=10)).warnings == ()


def test_cores_reserved_for_a_server(machine: Machine) -> None:
    topology = read_topology(machine("memorysidecaches"))
    plan = plan_ranks(topology, 2, Options(reserve_cores=2))
    assert [rank.cores for rank in plan.ranks] == [19, 19]
    few = plan_ranks(topology, 2, Options(reserve_cores=39))
    assert few.ranks[0].cpus == few.ranks[1].cpus
    assert few.warnings[0].startswith("--reserve-cores 39 leaves 1 of 40 usable cores for 2 ranks; reserve")
    assert "--reserve-cores 99 leaves 1 of" in plan_ranks(topology, 1, Options(reserve_cores=99)).warnings[0]
    with pytest.raises(LaunchError, match="--numa-strict: --reserve-cores 39 leaves 1 of 40 usable cores"):
        plan_ranks(topology, 2, Options(reserve_cores=39, strict=True))


def test_other_jobs_keep_their_cores(machine: Machine) -> None:
    topology = read_topology(machine("memorysidecaches"))
    socket0 = plan_ranks(topology, 2).ranks[0].cpus
    beside = plan_ranks(topology, 1, Options(busy_cpus=socket0))
    assert not set(beside.ranks[0].cpus) & set(socket0)
    assert "ranks of another job hold CPUs" in beside.warnings[0]
    siblings = [cpu for core in topology.cores if set(core.cpus) & set(socket0) for cpu in core.cpus[1:]]
    beside = plan_ranks(topology, 1, Options(busy_cpus=tuple(siblings)))
    assert not set(beside.ranks[0].cpus) & set(socket0), "the other thread of a busy core"
    unbound = plan_ranks(topology, 1, Options(unbound_ranks=2))
    assert unbound.warnings[0].startswith("2 ranks of another job run here on any core")
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


def test_cpus_of_an_offline_node_have_the_memory_of_their_socket(tmp_path: Path) -> None:
    """Two sockets of two nodes; node 0 is offline."""
    root = sysfs_writer.write(sysfs_writer.Host(packages=2, cores_of_nodes=(2, 2)), tmp_path)
    (root / "sys/devices/system/node/online").write_text("1-3\n")
    topology = read_topology(root)
    plan = plan_ranks(topology, 4)
    assert [(rank.nodes, rank.mem_nodes) for rank in plan.ranks] == [
        ((), (1,)),
        ((1,), (1,)),
        ((2,), (2,)),
        ((3,), (3,)),
    ]
    (warning,) = plan.warnings
    assert warning == "rank 0 computes on CPUs that no online node has; memory goes to node 1"
    check_plan(topology, 4, plan)
    (whole,) = plan_ranks(topology, 1).ranks
    assert (whole.nodes, whole.mem_nodes) == ((1, 2, 3), (1, 2, 3))
    assert "on CPUs that no online node has" in plan_ranks(topology, 1).warnings[0]


def test_nodes_without_memory_are_told_from_forbidden_ones(tmp_path: Path) -> None:
    """The kernel allows no node that holds no memory."""
    host = sysfs_writer.Host(cores_of_nodes=(2, 2, 2), memoryless=(0,), mem_nodes=(2,))
    plan = plan_ranks(read_topology(sysfs_writer.write(host, tmp_path)), 3)
    assert plan.warnings[0] == "node 0, where rank 0 computes, holds no memory; memory goes to node 2"
    assert plan.warnings[1].startswith("node 1, where rank 1 computes, may not be used for memory")


def test_a_kernel_without_nodes_has_no_policy(machine: Machine) -> None:
    topology = read_topology(machine("2arm-2c"))
    (rank,) = plan_ranks(topology, 1, Options(strict=True)).ranks
    assert (rank.mem_policy, rank.mem_nodes) == ("none", ())
    asked = plan_ranks(topology, 1, Options(mem_policy="bind"))
    assert asked.warnings == ("this kernel has no NUMA nodes, so --mem-policy bind does nothing",)


def test_placements_survive_their_json(machine: Machine) -> None:
    for rank in plan_ranks(read_topology(machine("memorysidecaches")), 3).ranks:
        assert RankPlacement.from_dict(rank.to_dict()) == rank
    with pytest.raises(LaunchError, match="placement cannot be read"):
        RankPlacement.from_dict({"rank": 0})
