"""Starting ranks on torchrun's elastic agent, and what becomes of them as one exit code.

torch is imported inside start() alone: everything a user can get wrong has been said before.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import output
from .endpoint import Endpoint, interface_towards, new_job_id
from .plan import RankPlacement
from .scripts import Script

if TYPE_CHECKING:
    from .rendezvous import LoopbackRendezvous


# A launcher may itself run in a rank of another one.
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_NOT_INHERITED = ("TP_PLACEMENT", "TP_NUMA_STRICT", "TP_STORE_FILE", "TP_CHECKED")


@dataclass(frozen=True)
class Job:
    """One tp-launch call, checked."""

    script: Script
    arguments: tuple[str, ...]
    nproc: int
    placements: tuple[RankPlacement, ...] = ()  # empty: ranks are not bound
    threads: int | None = None  # OMP_NUM_THREADS of unbound ranks; None leaves the user's
    max_restarts: int = 0
    grace_period_s: float = 5.0
    collective_timeout_s: float | None = None
    log_dir: Path | None = None
    show_all: bool = False
    verify_placement: bool = False
    strict: bool = False
    endpoint: Endpoint | None = None  # None: this host alone


def rank_environment(job: Job, job_id: str, local_rank: int) -> dict[str, str]:
    """The variables a rank gets beside those of torchrun."""
    variables = {"TP_JOB_ID": job_id, "TP_LAUNCHER_PID": str(os.getpid())}
    if job.script.is_bundled:
        variables["TP_CHECKED"] = "1"
    if job.threads is not None:
        variables["OMP_NUM_THREADS"] = str(job.threads)
    if job.placements:
        placement = job.placements[local_rank]
        variables |= placement.env
        variables["TP_PLACEMENT"] = json.dumps(placement.to_dict())
    if job.collective_timeout_s is not None:
        variables["TP_COLLECTIVE_TIMEOUT"] = f"{job.collective_timeout_s:g}"
    if job.strict:
        variables["TP_NUMA_STRICT"] = "1"
    return variables


def start(job: Job) -> int:
    """Run the job to its end and return tp-launch's exit code.

    0 where all ranks ended well, the first failing rank's code (128 + N for signal N) where one did
    not, 128 + N where the launcher itself was told to end by signal N (0 if all ranks then ended well).
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import SignalException

    from .agent import Agent, RankStreams

    for name in _NOT_INHERITED:
        os.environ.pop(name, None)
    rendezvous = _rendezvous(job)
    command = ["-u", "-m", "tp_runtime.launch.rank_main", *job.script.command, *job.arguments]
    spec = WorkerSpec(
        role="tp",
        local_world_size=job.nproc,
        entrypoint=sys.executable,
        # The agent replaces ${local_rank} and the like in arguments; a user's "$" stays one.
        args=tuple(word.replace("$", "$$") for word in command),
        rdzv_handler=rendezvous,
        max_restarts=job.max_restarts,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    streams = RankStreams(
        lambda local_rank: rank_environment(job, rendezvous.job_id, local_rank), job.log_dir, job.show_all
    )
    own_nodes = [placement.mem_nodes for placement in job.placements] if job.verify_placement else None
    agent = Agent(spec, rendezvous, streams, job.grace_period_s, own_nodes)
    try:
        result = agent.run()
    except KeyboardInterrupt:  # before there were ranks
        return 128 + signal.SIGINT
    except SignalException as error:
        if agent.all_ended_well():
            return 0
        output.say(f"ended by {error.sigval.name}; all ranks were stopped")
        return 128 + error.sigval
    finally:
        _remove_shared_memory(rendezvous.job_id)
    if not result.is_failed():
        return 0
    if agent.failure is not None:
        return agent.failure.exit_code
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def _remove_shared_memory(job_id: str) -> None:
    """What killed ranks left: by this project's convention its names contain the job's id."""
    for path in Path("/dev/shm").glob(f"*{job_id}*"):
        try:
            path.unlink()
        except OSError:
            pass  # another rank's owner, or gone meanwhile


def _rendezvous(job: Job) -> LoopbackRendezvous:
    """Where the ranks will meet, and the network interface gloo and NCCL are to use for it."""
    from .rendezvous import EndpointRendezvous, LoopbackRendezvous

    if job.endpoint is None:
        for name in _INTERFACE_VARIABLES:
            os.environ.setdefault(name, "lo")
        return LoopbackRendezvous(new_job_id())
    interface = interface_towards(job.endpoint.address())
    if interface is not None:
        for name in _INTERFACE_VARIABLES:
            os.environ.setdefault(name, interface)
    return EndpointRendezvous(new_job_id(), job.endpoint)
