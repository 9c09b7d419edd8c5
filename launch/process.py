"""Processes as Linux sees them: tied lives, states, start times. Standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> bool:
    """Have this process killed when `parent` ends. False where the parent is already another one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    return os.getppid() == parent


def state(pid: int) -> str | None:
    """The one-letter state of a process (R, S, D, T, Z ...); None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may itself contain spaces and parentheses.
    return text.rpartition(")")[2].split()[0]


def kill_group(pid: int, signum: int) -> None:
    """Send a signal to the process group led by `pid`; gone is fine."""
    try:
        os.killpg(pid, signum)
    except (ProcessLookupError, PermissionError):
        pass


def num_oom_kills() -> int:
    """How many processes the kernel has killed since boot because memory ran out; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is none. Tells reused ids apart."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])
