"""Which memory nodes a rank's pages go to, and by which policy.

Local nodes where they are allowed and hold memory, else the nearest that do. One node is bound,
several are interleaved: the rank's cores read all of them at once, so pages are spread over all.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LaunchError
from .sysfs import format_list
from .topology import Core, HostTopology

POLICIES = ("auto", "bind", "preferred", "interleave", "weighted_interleave", "none")


@dataclass(frozen=True)
class MemoryChoice:
    """A rank's policy and memory nodes, and where its memory cannot be local: node (None: none) -> nodes."""

    policy: str
    nodes: tuple[int, ...]
    remote: tuple[tuple[int | None, tuple[int, ...]], ...] = ()


def choose_memory(topology: HostTopology, share: tuple[Core, ...], policy: str) -> MemoryChoice:
    """Memory for a rank that has these cores.

    Cores that no online node has take the nodes of their sockets, else all that are usable. Raises
    LaunchError for an unknown policy.
    """
    if policy not in POLICIES:
        raise LaunchError(f"--mem-policy {policy!r} is unknown; choose from {', '.join(POLICIES)}")
    usable = usable_nodes(topology)
    if policy == "none" or not usable or not topology.has_nodes:
        return MemoryChoice("none", ())
    chosen: set[int] = set()
    remote: list[tuple[int | None, tuple[int, ...]]] = []
    for node in sorted({core.node for core in share if core.node is not None}):
        if node in usable:
            chosen.add(node)
            continue
        nearest = min(topology.distance(node, other) for other in usable)
        near = tuple(other for other in usable if topology.distance(node, other) == nearest)
        chosen.update(near)
        remote.append((node, near))
    homeless = {core.package for core in share if core.node is None}
    if homeless:
        beside = {core.node for core in topology.cores if core.package in homeless}
        near = tuple(node for node in usable if node in beside) or usable
        chosen.update(near)
        remote.append((None, near))
    mem_nodes = tuple(sorted(chosen))
    if policy == "auto":
        policy = "bind" if len(mem_nodes) == 1 else "interleave"
    return MemoryChoice(policy, mem_nodes, tuple(remote))


def usable_nodes(topology: HostTopology) -> tuple[int, ...]:
    """Allowed nodes that hold memory; where no size is known, all allowed ones."""
    sized = tuple(
        node.number
        for node in topology.nodes
        if node.number in topology.allowed_mem_nodes and node.memory_bytes > 0
    )
    return sized or topology.allowed_mem_nodes


def tell_remote(topology: HostTopology, choices: list[MemoryChoice], policy: str) -> list[str]:
    """One sentence for each node whose ranks' memory is elsewhere, where `policy` was asked for."""
    if policy == "none":
        return []
    if not topology.has_nodes:
        asked = f"this kernel has no NUMA nodes, so --mem-policy {policy} does nothing"
        return [] if policy == "auto" else [asked]
    if not usable_nodes(topology):
        return ["no memory node is allowed that holds memory; memory is left to the kernel"]
    sized = any(node.memory_bytes for node in topology.nodes)
    ranks: dict[tuple[int | None, tuple[int, ...]], list[int]] = {}
    for rank, choice in enumerate(choices):
        for where in choice.remote:
            ranks.setdefault(where, []).append(rank)
    sentences = []
    for (node, near), members in ranks.items():
        who = f"rank {members[0]}" if len(members) == 1 else f"ranks {format_list(members)}"
        computes = "computes" if len(members) == 1 else "compute"
        goes = f"memory goes to node{'s' if len(near) > 1 else ''} {format_list(near)}"
        if node is None:
            sentences.append(f"{who} {computes} on CPUs that no online node has; {goes}")
        else:
            # The kernel leaves nodes without memory out of the allowed ones.
            empty = sized and not topology.node(node).memory_bytes
            why = "holds no memory" if empty else "may not be used for memory"
            sentences.append(f"node {node}, where {who} {computes}, {why}; {goes}")
    return sentences
