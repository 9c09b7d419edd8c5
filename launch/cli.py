"""tp-launch: start the ranks of a job on this host, each in its place.

Options before SCRIPT are tp-launch's, all after it are the script's. No torch before ranks start.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from .. import env
from ..errors import LaunchError, TPError
from . import scripts
from .placement import Options, plan_ranks, unbound_threads
from .plan import Plan, RankPlacement
from .sysfs import parse_list
from .topology import HostTopology, read_topology

_USAGE_ERROR = 2
_DOCTOR = "doctor"
MOST_RANKS = 4096  # on one host
_EXAMPLES = """\
examples:
  tp-launch --nproc 2 --numa generate.py --model smollm2-135m --prompt "Hello"
  tp-launch --nproc 8 --dry-run              who would run where; starts nothing
  tp-launch --nproc 8 --dry-run --json       the same for programs
  tp-launch --nproc 4 --numa --log-dir logs my_script.py --my-flag 3
  tp-launch --nproc 2 --numa --nnodes 2 --node-rank 0 --rdzv-endpoint 10.0.0.1:29400 generate.py
  tp-launch --capture host.tar               this host's topology, for a bug report
  tp-launch doctor                           what costs speed here, and how to mend it
"""


def main(argv: list[str] | None = None) -> int:
    """The console script. Returns the exit code; a user's errors are one line and code 2."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return _doctor(words[1:]) if words[:1] == [_DOCTOR] else _run(words)
    except TPError as error:
        sys.stderr.write(f"error: {error}\n")
        return _USAGE_ERROR
    except KeyboardInterrupt:  # before there were ranks
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # `tp-launch --dry-run | head`: whoever read has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    arguments = _parser().parse_args(words)
    _validate(arguments)
    if arguments.capture is not None:
        from . import capture

        count = capture.write(arguments.capture)
        sys.stdout.write(f"wrote {count} files to {arguments.capture}\n")
        return 0
    if arguments.print_topology:
        from . import display

        sys.stdout.write(display.topology_text(read_topology(arguments.sysroot)))
        return 0
    if arguments.dry_run:
        topology, options = _planned(arguments)
        plan = plan_ranks(topology, arguments.nproc, options)
        sys.stdout.write(_shown(topology, plan, arguments.json))
        return 0
    if arguments.script is None:
        raise LaunchError("no script was given; use tp-launch [options] SCRIPT [args], or tp-launch --help")
    script = scripts.resolve(arguments.script, arguments.module)
    code = _check(script, arguments.args, arguments.nproc * arguments.nnodes)
    return _start(arguments, script) if code is None else code


def _validate(arguments: argparse.Namespace) -> None:
    for name, value, least in (
        ("--nproc", arguments.nproc, 1),
        ("--nnodes", arguments.nnodes, 1),
        ("--threads", arguments.threads, 1),
        ("--reserve-cores", arguments.reserve_cores, 0),
        ("--max-restarts", arguments.max_restarts, 0),
    ):
        if value is not None and value < least:
            raise LaunchError(f"{name} {value}: at least {least} is needed; use {name} {least} or more")
    if arguments.nproc > MOST_RANKS:
        raise LaunchError(f"--nproc {arguments.nproc}: at most {MOST_RANKS} ranks run on one host; use fewer")
    for name, value in (
        ("--grace-period", arguments.grace_period),
        ("--collective-timeout", arguments.collective_timeout),
        ("--rdzv-timeout", arguments.rdzv_timeout),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise LaunchError(f"{name} {value:g}: give a number of seconds above 0")
    if arguments.json and not arguments.dry_run:
        raise LaunchError("--json shows a plan without starting anything; use it with --dry-run")
    if arguments.nnodes == 1 and arguments.rdzv_endpoint is not None:
        raise LaunchError(
            "--rdzv-endpoint is for jobs over several hosts; add --nnodes N and --node-rank, or drop it"
        )
    if arguments.nnodes == 1 and arguments.node_rank not in (None, 0):
        raise LaunchError(
            f"--node-rank {arguments.node_rank} is for jobs over several hosts; add --nnodes N and "
            "--rdzv-endpoint, or drop it"
        )
    if (arguments.numa_strict or arguments.verify_placement) and not (arguments.numa or arguments.dry_run):
        raise LaunchError("--numa-strict and --verify-placement are about a placement; add --numa")


def _start(arguments: argparse.Namespace, script: scripts.Script) -> int:
    from . import shared_memory, spawn
    from .endpoint import Endpoint

    shared_memory.check(arguments.nproc, arguments.args)
    topology, options = _planned(arguments)
    endpoint = None
    if arguments.nnodes > 1:
        endpoint = Endpoint.parse(
            arguments.rdzv_endpoint, arguments.nnodes, arguments.node_rank, arguments.rdzv_timeout
        )
    threads = None
    placements: tuple[RankPlacement, ...] = ()
    if arguments.numa:
        plan = plan_ranks(topology, arguments.nproc, options)
        placements = plan.ranks
        for warning in plan.warnings:
            sys.stderr.write(f"warning: {warning}\n")
        preload = placements[0].env.get("LD_PRELOAD")
        if preload:
            sys.stderr.write(f"preloaded: {preload}\n")
    elif env.get("OMP_NUM_THREADS") is None:
        threads = unbound_threads(topology, arguments.nproc, options)
    return spawn.start(
        spawn.Job(
            script=script,
            arguments=tuple(arguments.args),
            nproc=arguments.nproc,
            placements=placements,
            threads=threads,
            max_restarts=arguments.max_restarts,
            grace_period_s=arguments.grace_period,
            collective_timeout_s=arguments.collective_timeout,
            log_dir=arguments.log_dir,
            show_all=arguments.show_all,
            verify_placement=arguments.verify_placement,
            strict=arguments.numa_strict,
            endpoint=endpoint,
        )
    )


def _check(script: scripts.Script, words: list[str], world_size: int) -> int | None:
    """A bundled script's own check of its arguments, before any rank exists; an int ends the launch."""
    if not script.is_bundled or script.module is None:
        return None
    check = getattr(importlib.import_module(script.module), "check", None)
    return None if check is None else check(list(words), world_size)


def _planned(arguments: argparse.Namespace) -> tuple[HostTopology, Options]:
    """The host to plan for, and what was asked for there."""
    topology = read_topology(arguments.sysroot)
    options = Options(
        smt=arguments.smt,
        use_e_cores=arguments.use_e_cores,
        reserve_cores=arguments.reserve_cores,
        cpus=arguments.cpus,
        threads=arguments.threads,
        mem_policy=arguments.mem_policy,
        use_gpus=not arguments.no_gpus,
        pin_threads=arguments.pin_threads,
        strict=arguments.numa_strict,
    )
    if Path(arguments.sysroot) == Path("/"):
        from .surroundings import with_surroundings

        options = with_surroundings(topology, options, preload=arguments.preload == "auto")
    return topology, options


def _shown(topology: HostTopology, plan: Plan, as_json: bool) -> str:
    from . import display

    return json.dumps(document(topology, plan)) + "\n" if as_json else display.plan_text(topology, plan)


def document(topology: HostTopology, plan: Plan) -> dict[str, Any]:
    """The JSON of --dry-run; docs/launch.md describes it."""
    return {
        "host": {
            "packages": len(topology.packages),
            "nodes": [node.number for node in topology.nodes],
            "cores": len(topology.cores),
            "cpus": len(topology.cpus),
            "allowed_cpus": list(topology.allowed_cpus),
            "allowed_mem_nodes": list(topology.allowed_mem_nodes),
            "smt": topology.smt,
            "gpus": [{"index": gpu.index, "node": gpu.node} for gpu in topology.gpus],
        },
        "ranks": [rank.to_dict() for rank in plan.ranks],
        "warnings": list(plan.warnings),
    }


def _doctor(words: list[str]) -> int:
    from . import doctor

    parser = _Parser(prog="tp-launch doctor", description=doctor.__doc__)
    parser.add_argument(
        "--sysroot", default="/", metavar="DIR", help="examine the host whose files lie in DIR"
    )
    for finding in doctor.examine(parser.parse_args(words).sysroot):
        sys.stdout.write(finding.line() + "\n")
    return 0


def _cpu_list(text: str) -> tuple[int, ...]:
    try:
        found = parse_list(text)
    except ValueError:
        found = ()
    if not found:  # also of an empty text, and of a range that runs backwards
        raise argparse.ArgumentTypeError(f"{text!r} is no list of CPUs such as 0-15,32")
    return found


class _Parser(argparse.ArgumentParser):
    """Errors as everywhere in this project: one line."""

    def error(self, message: str) -> Any:
        raise LaunchError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tp-launch",
        description="Start the ranks of a job on this host, each in its place.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--nproc", "--nproc-per-node", type=int, default=1, metavar="N", help="ranks on this host (1)"
    )
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module name")
    _add_placement(parser.add_argument_group("placement"))
    _add_views(parser.add_argument_group("looking without starting anything"))
    _add_job(parser.add_argument_group("the job"))
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="a Python file, or generate.py, bench.py")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="the script's own arguments")
    return parser


def _add_placement(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--numa",
        action="store_true",
        help="bind each rank to its cores and memory; without it only OMP_NUM_THREADS",
    )
    add("--numa-strict", action="store_true", help="refuse where the host cannot give all that was asked for")
    add("--smt", action="store_true", help="use all hardware threads of a core, not one")
    add("--use-e-cores", action="store_true", help="use efficient cores as well")
    add("--reserve-cores", type=int, default=0, metavar="N", help="cores left idle for a server process")
    add("--cpus", type=_cpu_list, metavar="LIST", help="use only these CPUs, such as 0-15,32")
    add("--threads", type=int, metavar="N", help="at most N threads a rank")
    add(
        "--mem-policy",
        default="auto",
        metavar="POLICY",
        help="auto, bind, preferred, interleave, ... or none (auto)",
    )
    add(
        "--preload",
        choices=("auto", "none"),
        default="auto",
        help="tcmalloc or jemalloc, libiomp5 if installed",
    )
    add("--pin-threads", action="store_true", help="bind each OpenMP thread to one CPU (OMP_PLACES)")
    add("--no-gpus", action="store_true", help="place ranks without regard to GPUs")
    add("--verify-placement", action="store_true", help="report where ranks' memory lay once it was loaded")


def _add_views(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dry-run", action="store_true", help="show the placement that --numa would apply")
    add("--json", action="store_true", help="with --dry-run: as JSON")
    add("--print-topology", action="store_true", help="show the host as it was read")
    add("--sysroot", default="/", metavar="DIR", help="plan for the host whose sysfs tree lies in DIR")
    add("--capture", type=Path, metavar="FILE.tar", help="write this host's tree, for --sysroot elsewhere")


def _add_job(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="restart all ranks up to N times after failures (0)",
    )
    add("--grace-period", type=float, default=5.0, metavar="S", help="seconds from SIGTERM to SIGKILL (5)")
    add("--collective-timeout", type=float, metavar="S", help="seconds a rank may wait for its peers")
    add("--log-dir", type=Path, metavar="DIR", help="write every rank's stdout and stderr to files")
    add("--show-all", action="store_true", help="show every rank's output, each line with its rank")
    add("--nnodes", type=int, default=1, metavar="N", help="hosts of the job (1)")
    add("--node-rank", type=int, metavar="I", help="this host's number, from 0")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where node 0's launcher listens")
    add("--rdzv-timeout", type=float, default=300.0, metavar="S", help="seconds to wait for all hosts (300)")


if __name__ == "__main__":
    sys.exit(main())
