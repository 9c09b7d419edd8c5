"""The first code of a rank: `python -m tp_runtime.launch.rank_main [-m] SCRIPT ARGS`.

Before torch is imported it ties the rank's life to the launcher's and applies the placement; then the
script runs as __main__. Started by srun or mpirun it takes the rank from their variables. No torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import sys
from typing import TYPE_CHECKING

from .. import env
from ..errors import TPError
from . import affinity, process, schedulers, scripts
from .plan import RankPlacement
from .reports import report

if TYPE_CHECKING:
    from .topology import HostTopology


def main(argv: list[str]) -> None:
    """Run SCRIPT in this rank. Exits with 2 after one line for errors a user can mend."""
    _end_with_launcher()
    try:
        os.environ.update(schedulers.adopt(os.environ))
        script, arguments = scripts.split(argv)
        placement = affinity.given_placement() or _own_placement(argv)
        if placement is not None:
            affinity.apply(placement, strict=env.get_flag("TP_NUMA_STRICT"))
    except TPError as error:
        _refuse(error)
    try:
        _run(script, arguments)
    except TPError as error:
        _refuse(error)
    except KeyboardInterrupt:
        # Ctrl-C reaches every rank: end by that signal, as the shell expects, without a traceback each.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except SystemExit as error:
        if error.code:
            report("exits", code=error.code if isinstance(error.code, int) else 1)
        raise
    except Exception as error:
        report("raised", type=type(error).__name__, text=str(error).strip())
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass


def _own_placement(argv: list[str]) -> RankPlacement | None:
    """This rank's part of the plan where no launcher made one: srun, mpirun or torchrun with TP_NUMA=1.

    A scheduler that bound each rank to CPUs of its own, not those of the scheduler's process here, has
    placed it; the rank then plans alone on these.
    """
    if not env.get_flag("TP_NUMA"):
        return None
    from .placement import Options, plan_ranks
    from .surroundings import with_surroundings
    from .topology import read_topology

    local_rank, ranks = env.get_int("LOCAL_RANK") or 0, env.get_int("LOCAL_WORLD_SIZE") or 1
    topology = read_topology()
    bound = _is_bound(topology)
    options = with_surroundings(topology, Options(strict=env.get_flag("TP_NUMA_STRICT")))
    plan = plan_ranks(topology, 1 if bound else ranks, options)
    placement = dataclasses.replace(plan.ranks[0 if bound else local_rank], rank=local_rank)
    if local_rank == 0:
        for warning in plan.warnings:
            affinity.tell(warning)
    preload = placement.env.get("LD_PRELOAD")
    if preload and env.get("LD_PRELOAD") != preload:
        # The dynamic loader reads it when a program starts: start again, with the placement decided.
        os.environ.update(LD_PRELOAD=preload, TP_PLACEMENT=json.dumps(placement.to_dict()))
        os.execv(sys.executable, [sys.executable, "-u", "-m", "tp_runtime.launch.rank_main", *argv])
    return placement


def _is_bound(topology: HostTopology) -> bool:
    """Whether this rank has other CPUs than its parent; one in another PID namespace has none to compare."""
    parent = os.getppid()
    try:
        if parent:
            return os.sched_getaffinity(0) != os.sched_getaffinity(parent)
    except OSError:
        pass  # it has just ended
    return len(topology.allowed_cpus) < len(topology.cgroup_cpus)


def _end_with_launcher() -> None:
    launcher = env.get_int("TP_LAUNCHER_PID")
    if launcher is not None and not process.die_with_parent(launcher):
        # It died before the tie was made.
        os.kill(os.getpid(), signal.SIGKILL)


def _refuse(error: TPError) -> None:
    report("refused", text=str(error))
    if env.get_int("TP_LAUNCHER_PID") is None:
        sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2)


def _run(script: scripts.Script, arguments: list[str]) -> None:
    sys.argv = [script.name, *arguments]
    if script.module is not None:
        sys.path[0] = os.getcwd()
        runpy.run_module(script.module, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(script.name))
        runpy.run_path(script.name, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
