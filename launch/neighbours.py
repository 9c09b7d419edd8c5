"""Other jobs of this launcher on the same host: which CPUs their ranks hold, which ranks hold none.

Ranks are found by their command line among all processes, so that nothing has to be registered and
nothing stale can be met. A rank is bound where its launcher gave it a placement, or where its CPUs are
not all that are allowed here. No torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .. import env
from . import schedulers
from .sysfs import parse_list

_RANK_MODULE = b"tp_runtime.launch.rank_main"


@dataclass(frozen=True)
class Neighbours:
    """CPUs bound by other jobs' ranks, the process ids of these ranks and of those that are not bound."""

    cpus: tuple[int, ...] = ()
    pids: tuple[int, ...] = ()
    unbound_pids: tuple[int, ...] = ()


def find(allowed_cpus: tuple[int, ...]) -> Neighbours:
    """Ranks of other jobs that may run on some of the allowed CPUs.

    Not those of this process's own job, where it is a rank that a scheduler started: they have the same
    parent, or the same job in their environment.
    """
    cpus: set[int] = set()
    bound: list[int] = []
    unbound: list[int] = []
    own_job = schedulers.job_name(os.environ)
    own_parent = os.getppid() if env.is_set("RANK") else 0
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
        environ = _environ(entry)
        parent = re.search(r"^PPid:\s*(\d+)", status, re.MULTILINE)
        if own_parent and parent is not None and int(parent[1]) == own_parent:
            continue
        if own_job is not None and schedulers.job_name(environ) == own_job:
            continue
        listed = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.MULTILINE)
        held = set(parse_list(listed[1])) & set(allowed_cpus) if listed else set()
        if not held:
            continue
        if "TP_PLACEMENT" in environ or held != set(allowed_cpus):
            cpus |= held
            bound.append(int(entry))
        else:
            unbound.append(int(entry))
    return Neighbours(tuple(sorted(cpus)), tuple(sorted(bound)), tuple(sorted(unbound)))


def _environ(entry: str) -> dict[str, str]:
    """The variables a process started with; none where they may not be read (another user's)."""
    try:
        text = Path(f"/proc/{entry}/environ").read_bytes().decode("utf-8", "replace")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in text.split("\0") if "=" in word)
