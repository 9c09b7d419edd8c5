"""Dividing cores among ranks: equal shares, each on the fewest and nearest NUMA nodes that hold it.

A share of k cores needs m(k) nodes, the fewest whose cores number k, and s(k) sockets. The largest k is
sought for which all ranks find m(k) nodes in s(k) sockets with free cores, where a rank over several
sockets has these to itself; shares then grow by one core where their nodes have some left. Two ranks that
each take a whole socket and a half of a third would both read half their weights through the link
between sockets, which has a fraction of a socket's memory bandwidth: the third stays idle instead.
Ranks are dealt to the socket, then the node, with most cores left a rank. Inside a node whole L3 domains
go first. Exact search is exponential; nodes are taken greedily around each candidate, nearest first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from .topology import Core, HostTopology

# CPUs that no online node claims are kept together under this number.
_NO_NODE = -1
Distance = Callable[[int, int], int]


def split_cores(
    topology: HostTopology, cores: list[Core], nproc: int, gpu_nodes: list[int | None] | None = None
) -> list[tuple[Core, ...]]:
    """Disjoint shares of `cores`, one a rank (len(cores) >= nproc), in rank order.

    gpu_nodes: for ranks with a GPU the node it is on (None: unknown, then the node with most cores left
    a rank); such a rank's cores come from that node or the nearest with cores.
    """
    assert 1 <= nproc <= len(cores), (nproc, len(cores))
    by_node: dict[int, list[Core]] = defaultdict(list)
    for core in cores:
        by_node[_NO_NODE if core.node is None else core.node].append(core)
    capacity = {node: len(by_node[node]) for node in sorted(by_node)}
    distance = _distances(topology, cores)
    if gpu_nodes is not None and any(node is not None for node in gpu_nodes):
        amounts = _beside_gpus(capacity, gpu_nodes, distance)
    else:
        amounts = _spread(capacity, nproc, distance, _sockets(by_node))
        amounts.sort(key=lambda amount: _position(amount, by_node))
    return _take_cores(by_node, amounts)


def without_reserved(cores: list[Core], count: int) -> list[Core]:
    """`cores` without `count` of them, taken one by one from the end of the fullest node."""
    left = list(cores)
    for _ in range(count):
        sizes = Counter(core.node for core in left)
        fullest = max(sizes.values())
        victim = max((core for core in left if sizes[core.node] == fullest), key=lambda core: core.cpus)
        left.remove(victim)
    return left


def _distances(topology: HostTopology, cores: list[Core]) -> Distance:
    """Distance between nodes; another package counts for more than any distance within one."""
    packages: dict[int, set[int]] = defaultdict(set)
    for core in cores:
        packages[_NO_NODE if core.node is None else core.node].add(core.package)
    online = {node.number for node in topology.nodes}

    def distance(a: int, b: int) -> int:
        if a == b:
            return 0
        known = topology.distance(a, b) if a in online and b in online else 255
        return known + (0 if packages[a] & packages[b] else 1000)

    return distance


def _position(amount: dict[int, int], by_node: dict[int, list[Core]]) -> tuple[int, int]:
    """Where a share stands in the order of ranks: by package, then by its first CPU."""
    main = max(amount, key=lambda node: (amount[node], -node))
    first = min(by_node[main], key=lambda core: core.cpus)
    return first.package, first.cpus[0]


def _sockets(by_node: dict[int, list[Core]]) -> dict[int, int]:
    """The socket of each node, by the lowest number of its packages.

    Packages that share a node (each core one, on some virtual machines) count as one socket.
    """
    socket_of: dict[int, int] = {}
    members: list[tuple[set[int], list[int]]] = []
    for node, cores in by_node.items():
        packages, nodes = {core.package for core in cores}, [node]
        for known in [known for known in members if known[0] & packages]:
            members.remove(known)
            packages |= known[0]
            nodes += known[1]
        members.append((packages, nodes))
    for packages, nodes in members:
        socket_of |= dict.fromkeys(nodes, min(packages))
    return socket_of


def _spread(
    capacity: dict[int, int], nproc: int, distance: Distance, socket_of: dict[int, int]
) -> list[dict[int, int]]:
    """How many cores of which nodes each rank gets."""
    for size in range(sum(capacity.values()) // nproc, 0, -1):
        amounts = _fit(capacity, nproc, size, distance, socket_of)
        if amounts is not None:
            _grow(capacity, amounts, size + 1)
            return amounts
    raise AssertionError("shares of one core always fit")


def _fewest(sizes: Iterable[int], size: int) -> int:
    """The fewest nodes (or sockets) of these sizes that hold `size` cores together."""
    total = 0
    for count, cores in enumerate(sorted(sizes, reverse=True), 1):
        total += cores
        if total >= size:
            return count
    raise AssertionError(f"{size} cores of {total}")


def _fit(
    capacity: dict[int, int], nproc: int, size: int, distance: Distance, socket_of: dict[int, int]
) -> list[dict[int, int]] | None:
    """Shares of `size` cores, each on the fewest nodes and sockets that hold it; None: they do not fit."""
    sockets: Counter[int] = Counter()
    for node, cores in capacity.items():
        sockets[socket_of[node]] += cores
    fewest_nodes, fewest_sockets = _fewest(capacity.values(), size), _fewest(sockets.values(), size)
    room = sum(cores // size for cores in sockets.values())
    if (room if fewest_sockets == 1 else len(sockets) // fewest_sockets) < nproc:
        return None
    free, ranks = dict(capacity), dict.fromkeys(capacity, 0)
    socket_ranks: Counter[int] = Counter()
    amounts = []
    for _ in range(nproc):
        best: tuple[tuple[float, ...], dict[int, int]] | None = None
        for anchor in free:
            home = socket_of[anchor]
            if fewest_sockets == 1:
                reachable = {node: cores for node, cores in free.items() if socket_of[node] == home}
            else:
                reachable = {n: cores for n, cores in free.items() if not socket_ranks[socket_of[n]]}
            amount = None
            if anchor in reachable:
                amount = _around(anchor, reachable, size, fewest_nodes, distance)
            if amount is None or len({socket_of[node] for node in amount}) > fewest_sockets:
                continue
            left = -sockets[home] / (socket_ranks[home] + 1)
            key = (left, *_badness(amount, free, capacity, ranks, distance))
            if best is None or key < best[0]:
                best = (key, amount)
        if best is None:
            return None
        for node, cores in best[1].items():
            free[node] -= cores
            ranks[node] += 1
        socket_ranks.update({socket_of[node] for node in best[1]})
        amounts.append(best[1])
    return amounts


def _around(
    anchor: int, free: dict[int, int], size: int, fewest: int, distance: Distance
) -> dict[int, int] | None:
    """`size` free cores on `fewest` nodes, from the anchor outwards; None where these do not suffice."""
    if not free[anchor]:
        return None
    others = sorted(
        (n for n in free if n != anchor and free[n]), key=lambda n: (distance(anchor, n), -free[n], n)
    )
    chosen = [anchor]
    for left in range(fewest - 1, 0, -1):
        missing = size - sum(free[node] for node in chosen)
        # The last node may be one that others have begun: the fullest free ones are for whole shares.
        if left == 1:
            fitting = [n for n in others if free[n] >= missing]
            if not fitting:
                return None
            nearest = distance(anchor, fitting[0])
            chosen.append(
                min((n for n in fitting if distance(anchor, n) == nearest), key=lambda n: (free[n], n))
            )
        else:
            chosen.append(others.pop(0) if others else anchor)
            if chosen[-1] == anchor:
                return None
    amount: dict[int, int] = {}
    for node in sorted(chosen, key=lambda n: (-free[n], chosen.index(n))):
        amount[node] = min(free[node], size - sum(amount.values()))
    return amount if sum(amount.values()) == size and len(amount) == fewest and all(amount.values()) else None


def _badness(
    amount: dict[int, int],
    free: dict[int, int],
    capacity: dict[int, int],
    ranks: dict[int, int],
    distance: Distance,
) -> tuple[float, ...]:
    """What makes a share worse than another in its socket: far apart, nodes crowded or broken, then order."""
    nodes = sorted(amount)
    apart = sum(distance(a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :])
    if len(nodes) == 1:
        (node,) = nodes
        return (apart, -capacity[node] / (ranks[node] + 1), ranks[node], node)
    broken = sum(free[node] == capacity[node] and amount[node] < free[node] for node in nodes)
    return (apart, broken, *nodes)


def _grow(capacity: dict[int, int], amounts: list[dict[int, int]], size: int) -> None:
    """One core more for shares whose nodes have one left, where that asks for no further node."""
    free = dict(capacity)
    for amount in amounts:
        for node, cores in amount.items():
            free[node] -= cores
    for amount in amounts:
        for node in sorted(amount):
            if free[node] and sum(amount.values()) < size:
                amount[node] += 1
                free[node] -= 1


def _beside_gpus(
    capacity: dict[int, int], gpu_nodes: list[int | None], distance: Distance
) -> list[dict[int, int]]:
    """Shares on the node of each rank's GPU, or on the nearest one where cores are left for it."""
    ranks = dict.fromkeys(capacity, 0)
    homes: dict[int, int] = {}
    for rank in sorted(range(len(gpu_nodes)), key=lambda rank: gpu_nodes[rank] is None):
        gpu_node = gpu_nodes[rank]
        room = [node for node in capacity if ranks[node] < capacity[node]]
        if gpu_node is None:
            home = max(room, key=lambda node: (capacity[node] / (ranks[node] + 1), -node))
        else:
            home = min(room, key=lambda node: (distance(gpu_node, node), ranks[node], node))
        ranks[home] += 1
        homes[rank] = home
    size = min(capacity[node] // count for node, count in ranks.items() if count)
    amounts = [{homes[rank]: size} for rank in range(len(gpu_nodes))]
    _grow(capacity, amounts, size + 1)
    return amounts


def _take_cores(by_node: dict[int, list[Core]], amounts: list[dict[int, int]]) -> list[tuple[Core, ...]]:
    """The cores themselves: in each node whole L3 domains first, remainders from begun ones."""
    free: dict[int, dict[int, list[Core]]] = {}
    for node, cores in by_node.items():
        domains: dict[int, list[Core]] = defaultdict(list)
        for core in sorted(cores, key=lambda core: core.cpus):
            domains[core.l3].append(core)
        free[node] = domains
    whole = {(node, l3): len(cores) for node, domains in free.items() for l3, cores in domains.items()}
    shares = []
    for amount in amounts:
        share: list[Core] = []
        for node in sorted(amount):
            missing = amount[node]
            while missing:
                domains = {l3: cores for l3, cores in free[node].items() if cores}
                full = [l3 for l3 in domains if len(domains[l3]) == whole[node, l3] <= missing]
                enough = [l3 for l3 in domains if len(domains[l3]) >= missing]
                if full:
                    l3 = max(full, key=lambda l3: (len(domains[l3]), -l3))
                elif enough:
                    l3 = min(enough, key=lambda l3: (len(domains[l3]), l3))
                else:
                    l3 = max(domains, key=lambda l3: (len(domains[l3]), -l3))
                taken = domains[l3][:missing]
                free[node][l3] = domains[l3][len(taken) :]
                share += taken
                missing -= len(taken)
        shares.append(tuple(share))
    return shares
