"""A rank of the real engine is killed or stopped, loading or answering: the job ends in seconds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tp_testing.jobs import Launch

LIMIT_S = 10.0
WORDS = [
    "--nproc", "2", "--collective-timeout", "5", "generate.py", "--model", "smollm2-135m", "--quant", "int8",
    "--no-compile", "--prompt", "Once upon a time", "--ignore-eos", "--max-new-tokens", "4000",
]  # fmt: skip


def rank_pid(job: Launch, rank: int) -> int | None:
    """The process that runs this rank, if it is there."""
    for pid in job._pids():
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in words and b"rank_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def until(job: Launch, stage: str, rank: int = 1) -> int:
    """Wait for the stage; the pid of the rank."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and job.process.poll() is None:
        pid = rank_pid(job, rank)
        # torch's libraries are mapped once the rank has begun to load.
        loading = pid is not None and "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
        if pid is not None and loading and (stage == "load" or job.stdout_so_far()):
            return pid
        time.sleep(0.05)
    job.kill_everything()
    raise AssertionError(f"the job never came to {stage}: {(job.folder / 'stderr').read_text()}")


@pytest.mark.parametrize(
    ("stage", "signum", "rank"),
    [
        ("load", signal.SIGKILL, 1),
        ("decode", signal.SIGKILL, 0),
        ("decode", signal.SIGSTOP, 1),
        pytest.param("load", signal.SIGKILL, 0, marks=pytest.mark.full),
        pytest.param("decode", signal.SIGKILL, 1, marks=pytest.mark.full),
        pytest.param("load", signal.SIGSTOP, 1, marks=pytest.mark.full),
    ],
)
def test_a_rank_is_lost(
    stage: str, signum: signal.Signals, rank: int, tmp_path: Path, smollm2_gguf: Path
) -> None:
    job = Launch(WORDS, tmp_path)
    pid = until(job, stage, rank)
    os.kill(pid, signum)
    outcome = job.wait(LIMIT_S)
    assert outcome.code != 0
    assert "Traceback" not in outcome.stderr
    errors = [line for line in outcome.sentences if line.startswith("error: ")]
    assert errors and errors[0].startswith(f"error: rank {rank} of 2 on "), outcome.stderr
    assert signum.name in errors[0] or signum == signal.SIGSTOP, errors[0]
    assert job.leftovers([{"pid": pid, "job": "tp-none"}]) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path, smollm2_gguf: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    job = Launch(WORDS, tmp_path)
    pid = until(job, "decode")
    job.process.send_signal(signal.SIGINT)
    outcome = job.wait(LIMIT_S)
    assert outcome.code != 0
    assert "Traceback" not in outcome.stderr, outcome.stderr
    assert job.leftovers([{"pid": pid, "job": "tp-none"}]) == []
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("tp")}
