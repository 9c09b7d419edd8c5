"""A rank's life in stages, for fault tests: stages.py FOLDER STAGE ACTION RANK [WORD ...].

Each rank writes its id and job to FOLDER when it reaches STAGE (import, load, decode); rank RANK then
does ACTION (wait, exit3, raise, refuse, deaf, hang), all others wait: asleep, or in collectives.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def arrived(folder: str) -> None:
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    facts = {"pid": os.getpid(), "job": os.environ["TP_JOB_ID"]}
    path = Path(folder) / f"rank{rank}.attempt{attempt}"
    path.with_suffix(".partial").write_text(json.dumps(facts))
    path.with_suffix(".partial").rename(path)


def act(action: str) -> None:
    if action == "exit3":
        sys.exit(3)
    if action == "raise":
        raise RuntimeError("the weights are upside down")
    if action == "refuse":
        from tp_runtime.errors import CheckpointError

        raise CheckpointError("model.safetensors ends after 12 of 30 bytes; fetch it again")
    if action == "hang":
        time.sleep(3600)
    if action == "deaf":
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)


def main(folder: str, stage: str, action: str, rank: str) -> None:
    mine = os.environ["RANK"] == rank or rank == "all"
    if stage != "import":
        import torch
        import torch.distributed as dist

        from tp_runtime.mesh import init_mesh

        init_mesh()
        weights = torch.ones(1 << 20)
    arrived(folder)
    if mine:
        act(action)
    while True:
        if stage == "decode":
            dist.all_reduce(weights)
        time.sleep(0.01)


if __name__ == "__main__":
    main(*sys.argv[1:5])
