"""The end of a job: its groups are closed, and a peer that is gone or late by then is no fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time
import torch.distributed as dist
from tp_runtime.mesh import init_mesh, leave_job
init_mesh()
if os.environ["RANK"] == "1":
    what = sys.argv[1]
    if what == "gone":
        os._exit(0)
    time.sleep(4.0 if what == "late" else 0.0)
leave_job()
print("left", "open" if dist.is_initialized() else "closed")
"""


@pytest.mark.parametrize("peer", ["there", "late", "gone"])
def test_a_rank_leaves(peer: str, tmp_path: Path) -> None:
    env = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TP_STORE_FILE": str(tmp_path / "store"),
        "TP_COLLECTIVE_TIMEOUT": "1" if peer == "late" else "60",
    }  # fmt: skip
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, peer], env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [job.communicate(timeout=100) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert said[0][0] == ("left closed\n" if peer == "there" else "left open\n")
    assert "Traceback" not in said[0][1] + said[1][1]
