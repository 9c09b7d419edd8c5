"""Applying one rank's placement to the running process, before torch is imported, and checking it.

CPUs are exact. A memory policy that the kernel or a container refuses falls back (weighted interleave
to interleave, anything to preferred, then to CPUs alone), and each step is said once a job.

The policy is the process's own (set_mempolicy), not one of ranges (mbind): it is set before the process
has threads or weights, every thread inherits it, and it holds for whatever is touched first afterwards,
wherever torch, the allocator or shared memory maps it. mbind would have to know each range and could do
more only for pages touched before, of which there are none but files' in the page cache. No torch.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from .. import env, log
from ..errors import LaunchError
from . import mempolicy
from .plan import RankPlacement
from .reports import report
from .sysfs import format_list, parse_list

_WEAKER = {"weighted_interleave": "interleave", "bind": "preferred", "interleave": "preferred"}
# Read by the dynamic loader or by OpenMP when a process starts, not later.
_START_VARIABLES = ("LD_PRELOAD",)


def given_placement() -> RankPlacement | None:
    """The placement the launcher gave this rank; None where ranks are not bound."""
    text = env.get("TP_PLACEMENT")
    if text is None:
        return None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise LaunchError(f"TP_PLACEMENT cannot be read ({error}); start ranks with tp-launch") from None
    return RankPlacement.from_dict(data)


def apply(placement: RankPlacement, strict: bool = False) -> None:
    """Bind this process to the placement's CPUs and memory, set its environment, and read both back.

    Raises LaunchError, with strict, where the host does not do as planned; else that is said.
    """
    os.environ.update({k: v for k, v in placement.env.items() if k not in _START_VARIABLES})
    problems = _bind_cpus(placement) + _bind_memory(placement)
    if strict and problems:
        raise LaunchError(f"--numa-strict: {problems[0]}; drop --numa-strict to run all the same")
    for problem in problems:
        tell(problem)


def tell(text: str) -> None:
    """A warning, said once a job where a launcher listens, else once by the first rank of the host."""
    if env.get("TP_LAUNCHER_PID") is not None:
        report("warning", text=text)
    else:
        log.once(text)


def _bind_cpus(placement: RankPlacement) -> list[str]:
    wanted = set(placement.cpus)
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:
        return [
            f"rank {placement.rank} cannot have CPUs {format_list(wanted)} ({error.strerror}) and runs "
            "wherever the kernel puts it"
        ]
    got = os.sched_getaffinity(0)
    if got != wanted:
        return [f"rank {placement.rank} asked for CPUs {format_list(wanted)} and got {format_list(got)}"]
    return []


def _bind_memory(placement: RankPlacement) -> list[str]:
    problems: list[str] = []
    policy: str | None = placement.mem_policy
    if policy == "none" or not placement.mem_nodes:
        return problems
    nodes = format_list(placement.mem_nodes)
    while policy is not None:
        try:
            mempolicy.set_policy(policy, placement.mem_nodes)
        except OSError as error:
            weaker = _WEAKER.get(policy)
            instead = f"trying {weaker}" if weaker else "only CPUs are bound"
            problems.append(
                f"memory policy {policy} on nodes {nodes} is refused here ({error.strerror}); {instead}"
            )
            policy = weaker
            continue
        in_force = policy_in_force()
        if in_force is not None and not _is(in_force, policy, placement.mem_nodes):
            problems.append(
                f"memory policy {policy} on nodes {nodes} was set and the kernel shows {in_force[0]}"
            )
        return problems
    return problems


def policy_in_force() -> tuple[str, tuple[int, ...]] | None:
    """The policy new pages of this process follow, as /proc/self/numa_maps shows it; None if unreadable.

    Names are those of the plan; no policy is ("default", ()).
    """
    try:
        with Path("/proc/self/numa_maps").open() as maps:
            words = maps.readline().split()
    except OSError:
        return mempolicy.get_policy()
    return parse_policy(words[1]) if len(words) > 1 else mempolicy.get_policy()


def parse_policy(text: str) -> tuple[str, tuple[int, ...]]:
    """A policy as numa_maps writes it: "bind:0-1", "weighted interleave:0,2", "prefer=relative:1"."""
    found = re.fullmatch(r"([a-z ]+)(?:=[a-z|]+)?(?: \(many\))?(?::([\d,-]+))?", text)
    if found is None:
        return text, ()
    name = {"prefer": "preferred", "weighted interleave": "weighted_interleave"}.get(found[1], found[1])
    return name, parse_list(found[2] or "")


def _is(in_force: tuple[str, tuple[int, ...]], policy: str, nodes: tuple[int, ...]) -> bool:
    # The line splits at the space of "weighted interleave:0-1".
    if policy == "weighted_interleave":
        return in_force[0] in ("weighted", "weighted_interleave")
    return in_force == (policy, tuple(sorted(nodes))[:1] if policy == "preferred" else tuple(sorted(nodes)))
