"""Other jobs of this launcher on the same host: which CPUs their ranks hold.

Ranks are found by their command line among all processes, so that nothing has to be registered and
nothing stale can be met. Ranks that are not bound hold no CPUs. No torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .sysfs import parse_list

_RANK_MODULE = b"tp_runtime.launch.rank_main"


@dataclass(frozen=True)
class Neighbours:
    """CPUs bound by other jobs' ranks, and the ranks' process ids."""

    cpus: tuple[int, ...] = ()
    pids: tuple[int, ...] = ()


def find(allowed_cpus: tuple[int, ...]) -> Neighbours:
    """Ranks of other jobs that are bound to some, not all, of the allowed CPUs."""
    cpus: set[int] = set()
    pids: list[int] = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            if _RANK_MODULE not in words[:4]:
                continue
            status = Path(f"/proc/{entry}/status").read_text()
        except OSError:
            continue  # it ended meanwhile
        listed = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.MULTILINE)
        bound = set(parse_list(listed[1])) if listed else set()
        if bound and bound != set(allowed_cpus):
            cpus |= bound
            pids.append(int(entry))
    return Neighbours(tuple(sorted(cpus)), tuple(sorted(pids)))
