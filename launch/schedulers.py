"""Ranks that srun or mpirun started: their variables in torchrun's names.

A rank on one host meets the others through a file in a private temporary folder, so that no port is
needed; over several hosts through a port made from the job's id (or MASTER_ADDR and MASTER_PORT where
they are set). No torch.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LaunchError
from . import process

# Below Linux's default range of ephemeral ports (32768 up), above the registered ones in wide use.
_FIRST_PORT, _NUM_PORTS = 20000, 12000
# The ranks of one job start within minutes of each other.
_LEFTOVER_S = 600.0


@dataclass(frozen=True)
class Scheduler:
    """The variables in which a scheduler says rank, ranks, local rank and local ranks."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


# Open MPI sets PMI variables too in some builds: it stands first. MPICH and Intel MPI start with hydra.
SCHEDULERS = (
    Scheduler(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Scheduler("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    Scheduler("mpirun (hydra)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def adopt(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a rank that a scheduler started; none where it is no such rank.

    Raises LaunchError where the scheduler says too little to form a job.
    """
    if "RANK" in environ:
        return {}
    for scheduler in SCHEDULERS:
        if scheduler.rank in environ and scheduler.world_size in environ:
            return _adopt(scheduler, environ)
    return {}


def _adopt(scheduler: Scheduler, environ: Mapping[str, str]) -> dict[str, str]:
    rank, world = _number(environ, scheduler.rank), _number(environ, scheduler.world_size)
    if not 0 <= rank < world:
        raise LaunchError(
            f"{scheduler.name} says {scheduler.rank}={rank} of {scheduler.world_size}={world}, which is "
            "impossible; unset these variables if no scheduler started this process"
        )
    local_rank = _number(environ, scheduler.local_rank, rank)
    local_world = _local_world_size(scheduler, environ, world)
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world),
    }
    if world == local_world and world > 1:
        variables["TP_STORE_FILE"] = str(_store_file(environ))
        variables["GLOO_SOCKET_IFNAME"] = environ.get("GLOO_SOCKET_IFNAME", "lo")
    elif world > 1:
        variables["MASTER_ADDR"] = environ.get("MASTER_ADDR") or _first_host(scheduler, environ)
        variables["MASTER_PORT"] = environ.get("MASTER_PORT") or str(_port(environ))
    return variables


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r} is not a whole number; it is set by the scheduler") from None


def _local_world_size(scheduler: Scheduler, environ: Mapping[str, str], world: int) -> int:
    text = environ.get(scheduler.local_world_size) or environ.get("SLURM_TASKS_PER_NODE", "")
    if text.isdigit():
        return int(text)
    # Slurm: "2(x3),1" is two tasks on each of three nodes and one on a fourth.
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found:
            counts += [int(found[1])] * int(found[2] or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    if counts and node < len(counts):
        return counts[node]
    return world


def job_name(environ: Mapping[str, str]) -> str | None:
    """The job's name in the scheduler's own words, alike for all its ranks; None where it gives none."""
    if "SLURM_JOB_ID" in environ:
        words = (environ["SLURM_JOB_ID"], environ.get("SLURM_STEP_ID", "0"))
        # A job that was requeued keeps its id.
        return "-".join(("slurm", *words, environ.get("SLURM_RESTART_COUNT", "0")))
    for name in ("OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE", "PMI_JOBID"):
        if name in environ:
            return f"mpi-{environ[name]}"
    return None


def _job_key(environ: Mapping[str, str]) -> str:
    """A name for the job that all its ranks derive alike and no other job of the host has."""
    name = job_name(environ)
    if name is not None:
        return name
    # One parent starts all ranks of a host; its start time tells it from an earlier one of that id.
    parent = os.getppid()
    return f"parent-{parent}-{process.start_time(parent)}"


def _store_file(environ: Mapping[str, str]) -> Path:
    folder = Path(tempfile.gettempdir()) / f"tp_runtime-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise LaunchError(
            f"{folder} is open to other users; remove it, or set TMPDIR to a folder of your own"
        )
    path = folder / re.sub(r"[^\w.-]", "_", _job_key(environ))
    _remove_leftover(path)
    return path


def _remove_leftover(path: Path) -> None:
    """A killed job leaves its file, and ids come round again: what nobody wrote to lately is no meeting.

    Whichever rank comes first removes it; the lock keeps a second from removing what the first has begun.
    """
    with path.with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and time.time() - path.stat().st_mtime > _LEFTOVER_S:
            path.unlink()


def _first_host(scheduler: Scheduler, environ: Mapping[str, str]) -> str:
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not listed:
        raise LaunchError(
            f"{scheduler.name} started ranks on several hosts and does not name the first; set MASTER_ADDR"
        )
    # "gpu[03-05,09],login1": the first number in brackets, with its zeros, after the name before them.
    found = re.match(r"([^\[,]+)(?:\[(\d+))?", listed)
    return f"{found[1]}{found[2] or ''}" if found else listed


def _port(environ: Mapping[str, str]) -> int:
    return _FIRST_PORT + zlib.crc32(_job_key(environ).encode()) % _NUM_PORTS
