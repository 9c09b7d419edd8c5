"""The fault table: whatever happens to a rank or the launcher, the job ends, says why, leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from tp_testing.jobs import REPOSITORY, SCRIPTS, Launch, Outcome

LIMIT_S = 10.0
HOST = socket.gethostname()


def launch(folder: Path, stage: str, action: str, rank: str = "1", options: tuple[str, ...] = ()) -> Launch:
    words = ["--nproc", "2", *options, str(SCRIPTS / "stages.py"), str(folder), stage, action, rank]
    return Launch(words, folder)


def first_sentence(outcome: Outcome) -> str:
    assert outcome.sentences, "nothing was said"
    return outcome.sentences[0]


@pytest.mark.parametrize("stage", ["import", "load", "decode"])
def test_a_rank_is_killed(stage: str, tmp_path: Path) -> None:
    job = launch(tmp_path, stage, "wait")
    facts = job.facts(2)
    os.kill(facts[1]["pid"], signal.SIGKILL)
    outcome = job.wait(LIMIT_S)
    assert outcome.code == 128 + signal.SIGKILL
    assert (
        first_sentence(outcome)
        == f"error: rank 1 of 2 on {HOST} (pid {facts[1]['pid']}) was killed by SIGKILL"
    )
    assert job.leftovers(facts) == []


def test_a_rank_is_killed_and_the_watch_is_late(tmp_path: Path) -> None:
    """The agent must not collect the rank first: the watch would know the end of the other one alone."""
    words = ["--nproc", "2", str(SCRIPTS / "stages.py"), str(tmp_path), "import", "wait", "1"]
    job = Launch(words, tmp_path, wrapper=[sys.executable, str(SCRIPTS / "late_watch.py")])
    facts = job.facts(2)
    os.kill(facts[1]["pid"], signal.SIGKILL)
    outcome = job.wait(LIMIT_S)
    assert outcome.code == 128 + signal.SIGKILL
    assert outcome.sentences == [
        f"error: rank 1 of 2 on {HOST} (pid {facts[1]['pid']}) was killed by SIGKILL"
    ]
    assert job.leftovers(facts) == []


ENDS = {
    "exit3": (3, f"error: rank 1 of 2 on {HOST} exited with code 3"),
    "raise": (1, f"error: rank 1 of 2 on {HOST} raised RuntimeError: the weights are upside down"),
    "refuse": (2, "error: model.safetensors ends after 12 of 30 bytes; fetch it again"),
}


def end_after_arrival(job: Launch, folder: Path, attempt: int = 0) -> Outcome:
    """The end, within the limit from the moment rank 1 reached its stage and did what it does."""
    deadline = time.monotonic() + 60.0
    while not (folder / f"rank1.attempt{attempt}").exists():
        assert job.process.poll() is None and time.monotonic() < deadline, "rank 1 did not get there"
        time.sleep(0.02)
    return job.wait(LIMIT_S)


@pytest.mark.parametrize(
    ("action", "stage"),
    [
        ("exit3", "import"),
        ("raise", "decode"),
        ("refuse", "import"),
        pytest.param("exit3", "decode", marks=pytest.mark.full),
        pytest.param("raise", "import", marks=pytest.mark.full),
        pytest.param("refuse", "decode", marks=pytest.mark.full),
    ],
)
def test_a_rank_ends_by_itself(action: str, stage: str, tmp_path: Path) -> None:
    code, sentence = ENDS[action]
    job = launch(tmp_path, stage, action)
    outcome = end_after_arrival(job, tmp_path)
    assert (outcome.code, first_sentence(outcome)) == (code, sentence)
    assert ("Traceback" in outcome.stderr) == (
        action == "raise" or stage == "decode" and "peer" in outcome.stderr
    )
    assert job.leftovers(job_facts(tmp_path)) == []


def job_facts(folder: Path) -> list[dict[str, object]]:
    """Facts of ranks that may have ended meanwhile."""
    return [
        json.loads(path.read_text()) for path in folder.glob("rank*.attempt*") if path.suffix != ".partial"
    ]


def test_a_rank_is_stopped(tmp_path: Path) -> None:
    job = launch(tmp_path, "decode", "wait")
    facts = job.facts(2)
    os.kill(facts[1]["pid"], signal.SIGSTOP)
    outcome = job.wait(LIMIT_S)
    assert outcome.code == 128 + signal.SIGSTOP
    assert re.fullmatch(
        rf"error: rank 1 of 2 on {HOST} \(pid {facts[1]['pid']}\) has been stopped \(SIGSTOP\) for [\d.]+ s",
        first_sentence(outcome),
    )
    assert job.leftovers(facts) == []


def test_a_rank_hangs(tmp_path: Path) -> None:
    """Alive and not stopped: found by the others, who wait for it in a collective."""
    job = launch(tmp_path, "decode", "hang", options=("--collective-timeout", "5"))
    facts = job.facts(2)
    outcome = job.wait(LIMIT_S)
    assert outcome.code == 1
    assert first_sentence(outcome).startswith(f"error: rank 0 of 2 on {HOST} raised ")
    assert "5000ms" in first_sentence(outcome)
    assert job.leftovers(facts) == []


def test_the_launcher_is_killed(tmp_path: Path) -> None:
    job = launch(tmp_path, "decode", "deaf", "all")
    facts = job.facts(2)
    job.process.kill()
    job.wait(LIMIT_S)
    assert job.leftovers(facts) == []


def test_the_launcher_is_killed_while_ranks_start(tmp_path: Path) -> None:
    """Before a rank can tie its life to the launcher's."""
    job = launch(tmp_path, "import", "deaf", "all")
    deadline = time.monotonic() + 30.0
    while not job._pids():
        assert time.monotonic() < deadline, "no rank was started"
    job.process.kill()
    job.wait(LIMIT_S)
    assert job.leftovers(job_facts(tmp_path)) == []


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)]
)
def test_the_launcher_is_told_to_end(signum: int, code: int, tmp_path: Path) -> None:
    job = launch(tmp_path, "import", "wait")
    facts = job.facts(2)
    os.kill(job.process.pid, signum)
    outcome = job.wait(LIMIT_S)
    assert outcome.code == code
    assert outcome.sentences == [f"ended by {signal.Signals(signum).name}; all ranks were stopped"]
    assert job.leftovers(facts) == []


@pytest.mark.parametrize("moment", ["torch loads", "hosts are awaited"])
def test_ctrl_c_before_there_are_ranks(moment: str, tmp_path: Path) -> None:
    words = ["--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    variables = {}
    if moment == "torch loads":
        words = []
        (tmp_path / "modules" / "torch").mkdir(parents=True)
        (tmp_path / "modules" / "torch" / "__init__.py").write_text(
            f"import time\nopen({str(tmp_path / 'loading')!r}, 'w').close()\ntime.sleep(60)\n"
        )
        variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "modules"), str(REPOSITORY)])
    job = Launch([*words, str(SCRIPTS / "stages.py"), str(tmp_path)], tmp_path, **variables)
    deadline = time.monotonic() + 60.0
    while not ((tmp_path / "loading").exists() if moment == "torch loads" else listens(words[-1])):
        assert job.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    job.process.send_signal(signal.SIGINT)
    outcome = job.wait(LIMIT_S)
    assert outcome.code == 130
    assert "Traceback" not in outcome.stderr, outcome.stderr
    assert job.leftovers([]) == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(endpoint: str) -> bool:
    host, _, port = endpoint.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    """Ranks that ignore SIGINT and SIGTERM are given the grace period, unless asked twice."""
    job = launch(tmp_path, "import", "deaf", "all", ("--grace-period", "60"))
    facts = job.facts(2)
    os.kill(job.process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert job.process.poll() is None
    os.kill(job.process.pid, signal.SIGINT)
    assert job.wait(LIMIT_S).code == 130
    assert job.leftovers(facts) == []


def test_deaf_ranks_are_killed_after_the_grace_period(tmp_path: Path) -> None:
    job = launch(tmp_path, "import", "deaf", "all", ("--grace-period", "0.5"))
    facts = job.facts(2)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait(LIMIT_S).code == 143
    assert job.leftovers(facts) == []


def test_the_restart_budget_is_used_up(tmp_path: Path) -> None:
    job = launch(tmp_path, "import", "exit3", options=("--max-restarts", "1"))
    outcome = end_after_arrival(job, tmp_path, attempt=1)
    assert outcome.code == 3
    assert outcome.sentences == [
        f"error: rank 1 of 2 on {HOST} exited with code 3; restart 1 of 1",
        f"error: rank 1 of 2 on {HOST} exited with code 3; all 1 restarts of --max-restarts are used up",
    ]
    assert {path.name for path in tmp_path.glob("rank1.*")} == {"rank1.attempt0", "rank1.attempt1"}
    assert job.leftovers(job_facts(tmp_path)) == []


def test_the_script_is_missing(tmp_path: Path) -> None:
    job = Launch(["--nproc", "2", "nowhere.py"], tmp_path)
    outcome = job.wait(LIMIT_S)
    assert outcome.code == 2
    assert job.leftovers([]) == []
    assert re.fullmatch(
        r"error: script 'nowhere.py' is no file here \(.*give the path of a Python file\n", outcome.stderr
    )


def test_the_port_is_busy(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ["--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", endpoint]
        job = Launch([*words, str(SCRIPTS / "stages.py")], tmp_path)
        outcome = job.wait(LIMIT_S + 10.0)  # torch is loaded first
    assert outcome.code == 2
    assert job.leftovers([]) == []
    assert f"--rdzv-endpoint {endpoint}: port {endpoint.partition(':')[2]} is taken" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_something_else_listens_where_node_0_should(tmp_path: Path) -> None:
    with socket.socket() as other:  # accepts, and never answers
        other.bind(("127.0.0.1", 0))
        other.listen()
        endpoint = f"127.0.0.1:{other.getsockname()[1]}"
        words = ["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", endpoint, "--rdzv-timeout", "2"]
        job = Launch([*words, str(SCRIPTS / "stages.py")], tmp_path)
        outcome = job.wait(LIMIT_S + 10.0)  # torch is loaded first
    assert outcome.code == 2
    assert job.leftovers([]) == []
    assert outcome.stderr.startswith(
        f"error: --rdzv-endpoint {endpoint}: no launcher answers there within 2 s"
    )
    assert len(outcome.stderr.splitlines()) == 1


def test_the_other_host_does_not_come(tmp_path: Path) -> None:
    words = ["--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "127.0.0.1:29417", "--rdzv-timeout", "1"]
    outcome = Launch([*words, str(SCRIPTS / "stages.py")], tmp_path).wait(LIMIT_S + 10.0)
    assert outcome.code == 2
    assert "of 2 nodes these did not join within 1 s: 1; start tp-launch there" in outcome.stderr
