"""Which CPUs, memory and GPU each rank gets: a pure function of a topology, a rank count and options.

Decoding a model streams each rank's weights once a token, so a rank wants its cores and its memory
on one NUMA node, or on as few and as near ones as its share of the cores needs; and since all ranks
wait for the slowest, shares are equal. Giving a rank a core of one more node or socket, to use up a
remainder, makes that rank's memory remote: such cores stay idle, and the plan says so.

The same arguments give the same plan on any machine: nothing here reads the host. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile

from ..errors import LaunchError
from . import packing
from .memory import MemoryChoice, choose_memory, tell_remote
from .pci import Gpu
from .plan import Plan, RankPlacement
from .preload import Preload
from .sysfs import format_list
from .topology import Core, HostTopology


@dataclass(frozen=True)
class Options:
    """What the user asked for beside the number of ranks."""

    smt: bool = False  # all hardware threads of a core instead of one
    use_e_cores: bool = False
    reserve_cores: int = 0  # left idle, for the server process
    cpus: tuple[int, ...] | None = None  # only these
    busy_cpus: tuple[int, ...] = ()  # bound by other jobs' ranks; left to them where enough others are free
    unbound_ranks: int = 0  # other jobs' ranks that run on any core
    threads: int | None = None  # at most so many a rank
    mem_policy: str = "auto"
    use_gpus: bool = True  # ranks next to GPUs where there are enough of them
    visible_gpus: tuple[int, ...] | None = None  # CUDA_VISIBLE_DEVICES: rank N drives the N-th of these
    gpu_note: str | None = None  # why these are not what the user may expect
    pin_threads: bool = False  # OMP_PLACES: one thread a place
    preload: Preload = Preload()  # what was found on the host the ranks will run on
    already_preloaded: str | None = None  # the user's own LD_PRELOAD
    strict: bool = False  # refuse whatever the host cannot give, instead of doing less


def plan_ranks(topology: HostTopology, nproc: int, options: Options = Options()) -> Plan:
    """Place `nproc` ranks on the host.

    Raises LaunchError where nproc is below 1, where ranks outnumber P-cores and E-cores are not
    allowed, and, with options.strict, for everything that would otherwise be a warning.
    """
    if nproc < 1:
        raise LaunchError(f"{nproc} ranks were asked for; a job needs at least one, use --nproc 1 or more")
    warnings: list[str] = list(topology.notes)  # what --numa-strict refuses
    remarks: list[str] = []  # what was decided for the ranks' good
    cores = _usable_cores(topology, nproc, options, warnings, remarks)
    cores = _beside_others(topology, cores, nproc, options, warnings, remarks)
    cores = _without_reserved(cores, nproc, options, warnings)
    gpus = _gpus(topology, nproc, options, warnings)
    if nproc > len(cores):
        warnings.append(
            f"{nproc} ranks share {len(cores)} usable core{'s' if len(cores) > 1 else ''}, one thread each; "
            f"every rank waits for the others, so --nproc {len(cores)} or fewer is faster"
        )
        shares: list[tuple[Core, ...]] = [(cores[rank * len(cores) // nproc],) for rank in range(nproc)]
        threads = [1] * nproc
    else:
        gpu_nodes = None if gpus is None else [gpu.node for gpu in gpus]
        shares = packing.split_cores(topology, cores, nproc, gpu_nodes)
        threads = [sum(len(core.cpus) for core in share) for share in shares]
        _tell_uneven(shares, cores, gpus is not None, warnings, remarks)
        _tell_kinds(shares, threads, topology.smt, remarks)
    nodes = [tuple(sorted({core.node for core in share if core.node is not None})) for share in shares]
    if gpus is not None:
        _tell_far(gpus, nodes, warnings)
    threads = [min(count, options.threads or count) for count in threads]
    quota_threads = _quota_threads(topology, nproc, min(threads), warnings)
    memory = [choose_memory(topology, share, options.mem_policy) for share in shares]
    warnings += tell_remote(topology, memory, options.mem_policy)
    ranks = []
    for rank, share in enumerate(shares):
        count = max(1, min(threads[rank], quota_threads or threads[rank]))
        gpu = None if gpus is None else gpus[rank].index
        ranks.append(_place(rank, share, nodes[rank], memory[rank], count, gpu, options))
    if options.strict and warnings:
        raise LaunchError(f"--numa-strict: {warnings[0]}; drop --numa-strict to run all the same")
    return Plan(tuple(ranks), (*warnings, *remarks))


def unbound_threads(topology: HostTopology, nproc: int, options: Options = Options()) -> int:
    """Threads of each rank where ranks are not bound: those of the smallest share, and nothing is refused."""
    fast = sum(not core.efficient for core in _allowed_cores(topology, options, []))
    use_e_cores = options.use_e_cores or nproc > fast
    relaxed = replace(options, strict=False, use_gpus=False, use_e_cores=use_e_cores)
    return min(rank.threads for rank in plan_ranks(topology, nproc, relaxed).ranks)


def _allowed_cores(topology: HostTopology, options: Options, warnings: list[str]) -> list[Core]:
    allowed = set(topology.allowed_cpus)
    if options.cpus is not None:
        if not allowed & set(options.cpus):
            raise LaunchError(
                f"--cpus {format_list(options.cpus)}: none of them is online and allowed here; "
                f"choose from {format_list(allowed)}"
            )
        if set(options.cpus) - allowed:
            missing = format_list(set(options.cpus) - allowed)
            warnings.append(f"--cpus: {missing} are not online and allowed here and were left out")
        allowed &= set(options.cpus)
    cores = []
    for core in topology.cores:
        cpus = tuple(cpu for cpu in core.cpus if cpu in allowed)
        if cpus:
            cores.append(replace(core, cpus=cpus if options.smt else cpus[:1]))
    return cores


def _usable_cores(
    topology: HostTopology, nproc: int, options: Options, warnings: list[str], remarks: list[str]
) -> list[Core]:
    cores = _allowed_cores(topology, options, warnings)
    fast = [core for core in cores if not core.efficient]
    slow = len(cores) - len(fast)
    if not fast or not slow or options.use_e_cores:
        return cores
    if nproc > len(fast):
        raise LaunchError(
            f"{nproc} ranks were asked for and {len(fast)} P-cores are usable "
            f"({slow} E-cores are left out); use --nproc {len(fast)} or fewer, or --use-e-cores"
        )
    remarks.append(
        f"{slow} E-core{'s are' if slow > 1 else ' is'} left out, since all ranks would wait for the slowest "
        "core; --use-e-cores uses all"
    )
    return fast


def _without_reserved(cores: list[Core], nproc: int, options: Options, warnings: list[str]) -> list[Core]:
    count = min(options.reserve_cores, len(cores) - 1)
    left = len(cores) - count
    if left < nproc and count or count < options.reserve_cores:
        warnings.append(
            f"--reserve-cores {options.reserve_cores} leaves {left} of {len(cores)} usable cores for "
            f"{nproc} rank{'s' if nproc > 1 else ''}; reserve fewer or start fewer ranks"
        )
    return packing.without_reserved(cores, count)


def _beside_others(
    topology: HostTopology,
    cores: list[Core],
    nproc: int,
    options: Options,
    warnings: list[str],
    remarks: list[str],
) -> list[Core]:
    if options.unbound_ranks:
        warnings.append(
            f"{options.unbound_ranks} rank{'s' if options.unbound_ranks > 1 else ''} of another job run here "
            "on any core: both jobs slow each other down; start that job with --numa as well"
        )
    # Threads of one core share it: a core is busy where any of its CPUs is.
    bound = {core.cpus for core in topology.cores if set(core.cpus) & set(options.busy_cpus)}
    taken = {cpu for cpus in bound for cpu in cpus}
    busy = [core for core in cores if set(core.cpus) & taken]
    if not busy:
        return cores
    cpus = format_list(cpu for core in busy for cpu in core.cpus)
    free = [core for core in cores if core not in busy]
    if len(free) >= nproc:
        remarks.append(f"ranks of another job hold CPUs {cpus}, which are left to them")
        return free
    warnings.append(
        f"ranks of another job hold CPUs {cpus} and {len(free)} usable cores are free, too few for {nproc} "
        "ranks: both jobs share cores and slow each other down"
    )
    return cores


def _gpus(topology: HostTopology, nproc: int, options: Options, warnings: list[str]) -> list[Gpu] | None:
    """Each rank's GPU where every rank can have one, else None."""
    if not options.use_gpus or not topology.gpus:
        return None
    if options.gpu_note is not None:
        warnings.append(options.gpu_note)
    gpus = list(topology.gpus)
    if options.visible_gpus is not None:
        known = {gpu.index: gpu for gpu in gpus}
        # As CUDA reads the list: what comes after a number that is no GPU is not seen.
        gpus = [known[index] for index in takewhile(known.__contains__, options.visible_gpus)]
    if not gpus:
        return None
    if nproc > len(gpus):
        warnings.append(
            f"{nproc} ranks and {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}: ranks were placed without "
            "regard to GPUs"
        )
        return None
    unknown = [gpu.index for gpu in gpus[:nproc] if gpu.node is None]
    if unknown and len({core.node for core in topology.cores}) > 1:
        warnings.append(
            f"the firmware does not say which node GPU{'s' if len(unknown) > 1 else ''} "
            f"{format_list(unknown)} {'are' if len(unknown) > 1 else 'is'} on; ranks may be far from them"
        )
    return gpus[:nproc]


def _tell_far(gpus: list[Gpu], nodes: list[tuple[int, ...]], warnings: list[str]) -> None:
    far: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for rank, (gpu, own) in enumerate(zip(gpus, nodes, strict=True)):
        if gpu.node is not None and gpu.node not in own:
            far.setdefault((gpu.node, own), []).append(rank)
    for (gpu_node, own), ranks in far.items():
        several = len(ranks) > 1
        where = f"node{'s' if len(own) > 1 else ''} {format_list(own)}" if own else "CPUs without a node"
        warnings.append(
            f"rank{'s' if several else ''} {format_list(ranks)} drive{'' if several else 's'} "
            f"GPU{'s' if several else ''} {format_list(gpus[rank].index for rank in ranks)} of node "
            f"{gpu_node} from {where}: no usable core of that node is left for {'them' if several else 'it'}"
        )


def _tell_uneven(
    shares: list[tuple[Core, ...]],
    cores: list[Core],
    with_gpus: bool,
    warnings: list[str],
    remarks: list[str],
) -> None:
    used = sum(len(share) for share in shares)
    sizes = sorted({len(share) for share in shares})
    if sizes[-1] - sizes[0] > 1:
        warnings.append(f"ranks have between {sizes[0]} and {sizes[-1]} cores; the smallest sets the pace")
    if used < len(cores):
        why = "ranks keep to the nodes of their GPUs (--no-gpus: placed without regard to them)"
        if not with_gpus:
            why = (
                f"more than {sizes[0]} for every rank would spread one of them over one more node, or over "
                "sockets that other ranks use"
            )
        remarks.append(f"{len(cores) - used} of {len(cores)} usable cores stay idle: {why}")


def _tell_kinds(shares: list[tuple[Core, ...]], threads: list[int], smt: int, remarks: list[str]) -> None:
    """What equal numbers of cores hide where cores are of two kinds."""
    slow = [sum(core.efficient for core in share) for share in shares]
    if max(slow) > min(slow):
        remarks.append(
            f"ranks have between {min(slow)} and {max(slow)} E-cores; those with most set the pace"
        )
    if max(threads) - min(threads) > smt:
        remarks.append(
            f"ranks have between {min(threads)} and {max(threads)} hardware threads, since not every core "
            "has several"
        )


def _quota_threads(topology: HostTopology, nproc: int, wanted: int, warnings: list[str]) -> int | None:
    """Threads a rank by the cgroup's CPU quota, where there is one; `wanted` is what it would run without."""
    if topology.cpu_quota is None:
        return None
    threads = max(1, int(topology.cpu_quota / nproc))
    if threads < wanted:
        warnings.append(
            f"the cgroup's CPU quota is {topology.cpu_quota:g} CPUs, so "
            f"{f'each of {nproc} ranks' if nproc > 1 else 'the rank'} runs "
            f"{threads} thread{'s' if threads > 1 else ''} and not {wanted}; raise the quota to use them all"
        )
    elif topology.cpu_quota < nproc:
        warnings.append(
            f"the cgroup's CPU quota is {topology.cpu_quota:g} CPUs for {nproc} ranks; they will be throttled"
        )
    return threads


def _place(
    rank: int,
    share: tuple[Core, ...],
    nodes: tuple[int, ...],
    memory: MemoryChoice,
    threads: int,
    gpu: int | None,
    options: Options,
) -> RankPlacement:
    cpus = tuple(sorted(cpu for core in share for cpu in core.cpus))
    env = {"OMP_NUM_THREADS": str(threads), **options.preload.environment(options.already_preloaded)}
    if options.pin_threads:
        # Not by default: libgomp then binds the main thread to one CPU, and what it starts inherits that.
        env["OMP_PLACES"] = ",".join(f"{{{cpu}}}" for cpu in cpus)
        env["OMP_PROC_BIND"] = "close"
    if gpu is not None:
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return RankPlacement(
        rank=rank,
        cpus=cpus,
        cores=len(share),
        threads=threads,
        nodes=nodes,
        packages=tuple(sorted({core.package for core in share})),
        mem_policy=memory.policy,
        mem_nodes=memory.nodes,
        gpu=gpu,
        env=env,
    )
