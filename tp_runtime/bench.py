"""tp-bench, and what tp-launch bench.py runs: measure kernels, collectives, decoding, scaling, peers.

Outside a job it starts ranks (benchmark/launching.py) once for each N of --nproc; inside one, where a
launcher has set RANK, it measures. `check` refuses bad input without torch. With --json the last line of
stdout is one JSON document; several N give one document with a list of theirs.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from tp_runtime import env
from tp_runtime.benchmark import options
from tp_runtime.benchmark.launching import RunFailed, run_ranks
from tp_runtime.benchmark.options import Options
from tp_runtime.errors import ConfigError, TPError
from tp_runtime.log import complain

_IN_RANKS = ("kernels", "collectives", "decode")


def check(argv: Sequence[str], nproc: int) -> int | None:
    """Refuse bad input without torch; an exit code where there is nothing left to run (--help).

    argv: this script's arguments. nproc: ranks of the job. Raises TPError.
    """
    found = _parse(argv, in_job=True)
    if isinstance(found, int):
        return found
    if found.mode not in _IN_RANKS:
        ranks = "" if found.mode == "targets" else f" --nproc {nproc}"
        raise ConfigError(f"{found.mode} starts ranks of its own; run it as: tp-bench {found.mode}{ranks}")
    if found.mode == "collectives" and nproc == 1:
        raise ConfigError("collectives of one rank are no-ops; use --nproc 2 or more")
    if found.mode == "decode" and found.args.startup:
        raise ConfigError(
            "--startup times fresh jobs, which a job cannot start; run it as: tp-bench decode --startup"
        )
    options.check_engine(found, nproc)
    return None


def _parse(argv: Sequence[str], *, in_job: bool) -> Options | int:
    if list(argv[:1]) in (["-h"], ["--help"]):
        sys.stdout.write(options.OVERVIEW)
        return 0
    try:
        return options.parse(argv, in_job=in_job)
    except SystemExit as done:
        return int(done.code or 0)


def _measure(found: Options) -> None:
    """In a rank."""
    from tp_runtime.benchmark.card import card, card_lines, load_average

    load = load_average()
    document, speaks = _MEASURES[found.mode](found)
    if not speaks:
        return
    num_gpus = (env.get_int("LOCAL_WORLD_SIZE") or 1) if document["device"] == "cuda" else 0
    document = {**document, "card": card(load, num_gpus)}
    if "first_token_s" not in document:
        sys.stdout.write(card_lines(document["card"]) + "\n")
    if found.args.json:
        sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def _measure_decode(found: Options) -> tuple[dict[str, Any], bool]:
    from tp_runtime.benchmark import cuda, decode

    assert found.engine is not None, "decode has a model"
    document, speaks = decode.measure(found.args, found.engine)
    if speaks and not found.args.first_token:
        sys.stdout.write(decode.line(document) + "\n")
        if found.args.profile:
            sys.stdout.write(cuda.profile_lines(document))
    return document, speaks


def _measure_kernels(found: Options) -> tuple[dict[str, Any], bool]:
    import torch.distributed as dist

    from tp_runtime import mesh
    from tp_runtime.benchmark import kernels

    device = found.args.device
    group = mesh.tp_group(world := _mesh(device))
    if device == "cuda":
        group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
    speaks = mesh.tp_rank(world) == 0
    return {"device": device, "kernels": kernels.measure(found.args, group, speaks=speaks)}, speaks


def _measure_collectives(found: Options) -> tuple[dict[str, Any], bool]:
    from tp_runtime import mesh
    from tp_runtime.benchmark import collectives

    device, group = found.args.device, mesh.tp_group(world := _mesh(found.args.device))
    document = {"device": device, "world_size": mesh.tp_size(world)}
    if device == "cuda":
        from tp_runtime.benchmark import collectives_cuda

        document |= collectives_cuda.measure(found.args.bytes, found.args.soak, group)
    else:
        document["collectives"] = collectives.measure(found.args.bytes or collectives.SIZES, group)
    speaks = mesh.tp_rank(world) == 0
    if speaks:
        sys.stdout.write("".join(collectives.line(row) + "\n" for row in document["collectives"]))
        sys.stdout.write(collectives.soak_line(document))
    return document, speaks


def _mesh(device: str) -> Any:
    """The job's, once it is known that it has the GPUs it is to measure."""
    from tp_runtime import mesh

    if device == "cuda":
        from tp_runtime.benchmark import cuda

        cuda.require_gpus()
    return mesh.init_mesh(device=device)


_MEASURES = {"kernels": _measure_kernels, "collectives": _measure_collectives, "decode": _measure_decode}


def _start(found: Options, words: Sequence[str]) -> int:
    """Outside a job: run the command over each number of ranks."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the ranks first
    if found.mode == "scaling":
        from tp_runtime.benchmark import scaling

        document = scaling.run(found)
    elif found.mode == "peers":
        from tp_runtime.benchmark import peers

        document = peers.run(found)
    elif found.mode == "targets":
        from tp_runtime.benchmark import targets

        document = targets.run(found)
    else:
        document = _over_ranks(found, words)
    if found.args.json:
        sys.stdout.write(json.dumps(document) + "\n")
    return 0


def _over_ranks(found: Options, words: Sequence[str]) -> dict[str, Any]:
    args, inside = found.args, options.words_for_ranks(words)
    nproc = args.nproc or args.default_nproc
    for count in nproc:
        check(inside, count)
    runs = []
    for count in nproc:
        run = run_ranks(inside, count, numa=not args.no_numa, timeout_s=args.timeout)
        if found.mode == "decode" and args.startup:
            from tp_runtime.benchmark import startup

            run |= startup.measure(inside, count, numa=not args.no_numa, timeout_s=args.timeout)
            sys.stdout.write(startup.line(run) + "\n")
        runs.append(run)
    if len(runs) == 1:
        return runs[0]
    rows = [row for run in runs for row in run.get(found.mode, [run])]
    return {found.mode: rows, "card": runs[-1]["card"]}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script, and a rank's program; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    in_job = env.is_set("RANK")
    running = False
    try:
        if in_job and not env.get_flag("TP_CHECKED"):
            done = check(words, env.get_int("WORLD_SIZE") or 1)
            if done is not None:
                return done
        found = _parse(words, in_job=in_job)
        if isinstance(found, int):
            return found
        if not in_job:
            return _start(found, words)
        running = True
        _measure(found)
        from tp_runtime.mesh import leave_job

        leave_job()
    except RunFailed as failed:
        return failed.code
    except TPError as error:
        if env.get_int("TP_LAUNCHER_PID") is not None:
            raise  # the launcher says it, once
        complain(error, of_input=not running)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
