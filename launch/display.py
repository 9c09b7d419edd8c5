"""A plan as people read it: a table of ranks and a drawing of the sockets; a topology as text.

In the drawing each core is one character: the rank that owns it (0-9, a-z, then +), "." for a core left
idle, "x" for one that may not be used, "*" for one that ranks share; "|" stands between L3 domains.
"""

from __future__ import annotations

from collections import defaultdict

from .plan import Plan, RankPlacement
from .sysfs import format_list
from .topology import Core, HostTopology

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_MAX_WIDTH = 110
_GIB = 1 << 30


def plan_text(topology: HostTopology, plan: Plan) -> str:
    """The table, the drawing and the warnings of a plan."""
    parts = [_table(plan), "", drawing(topology, plan)]
    preloads = {rank.env["LD_PRELOAD"] for rank in plan.ranks if "LD_PRELOAD" in rank.env}
    parts += [f"preloaded: {preload}" for preload in sorted(preloads)]
    parts += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(parts) + "\n"


def topology_text(topology: HostTopology) -> str:
    """The host as it was read."""
    quota = "none" if topology.cpu_quota is None else f"{topology.cpu_quota:g} CPUs"
    limit = "none" if topology.memory_limit_bytes is None else _gib(topology.memory_limit_bytes)
    lines = [
        f"packages: {len(topology.packages)}   nodes: {format_list(n.number for n in topology.nodes)}   "
        f"cores: {len(topology.cores)}   CPUs: {len(topology.cpus)} ({format_list(topology.cpus)})   "
        f"threads a core: {topology.smt}",
        f"allowed CPUs: {format_list(topology.allowed_cpus)}   allowed memory nodes: "
        f"{format_list(topology.allowed_mem_nodes)}   CPU quota: {quota}   memory limit: {limit}",
    ]
    efficient = [cpu for core in topology.cores if core.efficient for cpu in core.cpus]
    if efficient:
        lines.append(f"E-core CPUs: {format_list(efficient)}")
    for node in topology.nodes:
        pages = ", ".join(
            f"{count} huge pages of {size >> 20} MiB" for size, count in node.huge_pages if count
        )
        lines.append(
            f"node {node.number}: CPUs {format_list(node.cpus) or 'none'}, memory {_gib(node.memory_bytes)}, "
            f"distances {' '.join(map(str, node.distances))}" + (f", {pages}" if pages else "")
        )
    for gpu in topology.gpus:
        where = "unknown node" if gpu.node is None else f"node {gpu.node}"
        lines.append(f"GPU {gpu.index}: {gpu.address}, {where}, links {' '.join(gpu.links)}")
    lines += [f"note: {note}" for note in topology.notes]
    return "\n".join([*lines, "", drawing(topology, Plan((), ()))]) + "\n"


def drawing(topology: HostTopology, plan: Plan) -> str:
    """The sockets, side by side where the width allows, with the owner of each core."""
    owners = _owners(plan)
    sockets: dict[int, list[Core]] = defaultdict(list)
    for core in topology.cores:
        sockets[core.package].append(core)
    groups: dict[tuple[int, ...], list[Core]] = defaultdict(list)
    for packages in _joined(sockets):
        groups[packages] = [core for package in packages for core in sockets[package]]
    boxes = [
        _box(_title(packages), _socket_lines(topology, plan, cores, owners))
        for packages, cores in groups.items()
    ]
    loose = [n for n in topology.nodes if not n.cpus and n.memory_bytes]
    if loose:
        boxes.append(
            _box("memory without CPUs", [f"node {n.number:<3} {_gib(n.memory_bytes)}" for n in loose])
        )
    return "\n".join(_side_by_side(boxes))


def _joined(sockets: dict[int, list[Core]]) -> list[tuple[int, ...]]:
    """Packages that share a node (each core one, on some virtual machines) are drawn as one."""
    by_node: dict[int | None, set[int]] = defaultdict(set)
    for package, cores in sockets.items():
        for core in cores:
            if core.node is not None:
                by_node[core.node].add(package)
    joined: list[set[int]] = []
    for package in sorted(sockets):
        linked = {package}.union(*(packages for packages in by_node.values() if package in packages))
        touching = [group for group in joined if group & linked]
        joined = [group for group in joined if not group & linked] + [linked.union(*touching)]
    return [tuple(sorted(group)) for group in sorted(joined, key=min)]


def _title(packages: tuple[int, ...]) -> str:
    return f"socket{'s' if len(packages) > 1 else ''} {format_list(packages)}"


def _socket_lines(topology: HostTopology, plan: Plan, cores: list[Core], owners: dict[int, str]) -> list[str]:
    allowed = set(topology.allowed_cpus)
    lines = []
    for number in sorted({core.node for core in cores}, key=lambda n: (n is None, n or 0)):
        domains: dict[int, str] = defaultdict(str)
        for core in (core for core in cores if core.node == number):
            mark = next((owners[cpu] for cpu in core.cpus if cpu in owners), None)
            domains[core.l3] += mark or ("." if allowed & set(core.cpus) else "x")
        name = "no node " if number is None else f"node {number:<3}"
        memory = "" if number is None else f" {_gib(topology.node(number).memory_bytes)}"
        for count, part in enumerate(_wrapped("|".join(domains.values()))):
            lines.append(f"{name if not count else ' ' * len(name)} [{part}]{memory if not count else ''}")
    nodes = {core.node for core in cores}
    for gpu in topology.gpus:
        if gpu.node in nodes:
            rank = next((r.rank for r in plan.ranks if r.gpu == gpu.index), None)
            lines.append(f"GPU {gpu.index}" + ("" if rank is None else f" rank {rank}"))
    return lines


def _owners(plan: Plan) -> dict[int, str]:
    owners: dict[int, str] = {}
    for rank in plan.ranks:
        digit = _DIGITS[rank.rank] if rank.rank < len(_DIGITS) else "+"
        for cpu in rank.cpus:
            owners[cpu] = "*" if cpu in owners else digit
    return owners


def _wrapped(text: str) -> list[str]:
    width = 64
    return [text[start : start + width] for start in range(0, len(text), width)]


def _box(title: str, lines: list[str]) -> list[str]:
    width = max(len(title) + 2, *(len(line) for line in lines))
    top = f"+- {title} " + "-" * (width - len(title) - 1) + "+"
    return [top, *(f"| {line:<{width}} |" for line in lines), "+" + "-" * (width + 2) + "+"]


def _side_by_side(boxes: list[list[str]]) -> list[str]:
    lines: list[str] = []
    row: list[list[str]] = []
    for box in [*boxes, None]:
        if box is not None and (not row or sum(len(b[0]) + 2 for b in row) + len(box[0]) <= _MAX_WIDTH):
            row.append(box)
            continue
        height = max(len(b) for b in row)
        for line in range(height):
            lines.append("  ".join(b[line] if line < len(b) else " " * len(b[0]) for b in row).rstrip())
        row = [box] if box is not None else []
    return lines


def _table(plan: Plan) -> str:
    rows = [("rank", "cores", "threads", "CPUs", "nodes", "sockets", "memory", "GPU"), *map(_row, plan.ranks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(rank: RankPlacement) -> tuple[str, ...]:
    cpus = format_list(rank.cpus)
    if len(cpus) > 40:
        cpus = cpus[:34].rpartition(",")[0] + f",... ({len(rank.cpus)})"
    return (
        str(rank.rank),
        str(rank.cores),
        str(rank.threads),
        cpus,
        format_list(rank.nodes) or "-",
        format_list(rank.packages),
        f"{rank.mem_policy} {format_list(rank.mem_nodes)}".strip(),
        "-" if rank.gpu is None else str(rank.gpu),
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.0f} GiB"
