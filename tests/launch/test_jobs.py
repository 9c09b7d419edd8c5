"""Whole jobs on this host: what ranks get equals the plan, what they say arrives, jobs do not collide."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tp_testing.jobs import COMMAND, REPOSITORY, SCRIPTS, Launch

from tp_runtime.launch import neighbours
from tp_runtime.launch.topology import read_topology

START_S = 60.0


def plan_of_this_host(nproc: int) -> list[dict[str, Any]]:
    words = [*COMMAND, "--nproc", str(nproc), "--dry-run", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=START_S, check=True)
    return json.loads(done.stdout)["ranks"]


def facts_of(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_two_ranks_are_placed_as_planned(tmp_path: Path) -> None:
    """Affinity, threads and memory policy read back, after torch has loaded as well."""
    words = [
        "--nproc",
        "2",
        "--numa",
        "--verify-placement",
        str(SCRIPTS / "placed.py"),
        str(tmp_path),
        "all-reduce",
        "hold",
    ]
    outcome = Launch(words, tmp_path).wait(START_S)
    assert outcome.code == 0, outcome.stderr
    for planned, found in zip(plan_of_this_host(2), facts_of(tmp_path, 2), strict=True):
        assert found["cpus"] == found["cpus_after"] == planned["cpus"]
        assert found["in_maps"] == found["by_call"] == [planned["mem_policy"], planned["mem_nodes"]]
        assert found["threads"] == planned["threads"] == int(found["environ"]["OMP_NUM_THREADS"])
        assert json.loads(found["environ"]["TP_PLACEMENT"]) == planned
        assert found["sum"] == 2
    for rank in range(2):
        reports = re.findall(
            rf"^placement of rank {rank}, at the end: 100\.0% of (\d+) MiB on node", outcome.stderr, re.M
        )
        assert len(reports) == 1 and int(reports[0]) >= 64, outcome.stderr


def test_without_numa_only_threads_are_set_and_words_arrive_unchanged(tmp_path: Path) -> None:
    words = [str(tmp_path), "$$5", "${local_rank}", "a b", "--nproc", "", "ü\n"]
    outcome = Launch(["--nproc", "2", str(SCRIPTS / "placed.py"), *words], tmp_path).wait(START_S)
    assert outcome.code == 0, outcome.stderr
    for rank, found in enumerate(facts_of(tmp_path, 2)):
        assert found["words"] == words
        assert found["cpus"] == sorted(os.sched_getaffinity(0))
        assert found["in_maps"] == ["default", []]
        assert int(found["environ"]["OMP_NUM_THREADS"]) >= 1
        assert "TP_PLACEMENT" not in found["environ"]
        assert found["environ"]["RANK"] == found["environ"]["LOCAL_RANK"] == str(rank)
        assert found["environ"]["MASTER_ADDR"] == "127.0.0.1"


def test_an_answer_streams_through_unchanged(tmp_path: Path) -> None:
    """Rank 0's stdout byte for byte and as it comes; the other rank's not; stderr of both."""
    job = Launch(["--nproc", "2", str(SCRIPTS / "talk.py")], tmp_path)
    seen = set()
    while job.process.poll() is None:
        seen.add(job.stdout_so_far().rpartition("\n")[2])
        time.sleep(0.02)
    outcome = job.wait(START_S)
    assert {"The", "The capital", "The capital of"} <= seen, seen
    stdout = (tmp_path / "stdout").read_bytes()
    assert stdout == b"raw \xff\x00 bytes\nThe capital of France\nlast line of 0\n"
    lines = outcome.stderr.splitlines()
    assert "a word of 0" in lines and "[rank 1] a word of 1" in lines
    assert not list(job.temporary.iterdir())


def test_every_rank_is_shown_and_logged_on_request(tmp_path: Path) -> None:
    words = ["--nproc", "2", "--show-all", "--log-dir", str(tmp_path / "logs"), str(SCRIPTS / "talk.py")]
    outcome = Launch(words, tmp_path).wait(START_S)
    lines = outcome.stdout.splitlines()
    for rank in range(2):
        assert f"[rank {rank}] last line of {rank}" in lines
        log = tmp_path / "logs" / "attempt_0" / f"rank_{rank}"
        assert (log / "stdout.log").read_bytes().startswith(b"raw \xff\x00 bytes\nThe capital of France\n")
        assert (log / "stderr.log").read_text() == f"a word of {rank}\nunfinished line\n"


def test_two_jobs_do_not_collide_and_listen_on_loopback_only(tmp_path: Path) -> None:
    jobs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        words = ["--nproc", "2", str(SCRIPTS / "stages.py"), str(tmp_path / name), "load", "wait", "0"]
        jobs.append(Launch(words, tmp_path / name))
    facts = [job.facts(2, timeout=2 * START_S) for job in jobs]
    assert facts[0][0]["job"] == facts[0][1]["job"] != facts[1][0]["job"]
    pids = [fact["pid"] for pair in facts for fact in pair] + [job.process.pid for job in jobs]
    listening = {address for pid in pids for address in listening_addresses(pid)}
    assert listening and all(address in ("127.0.0.1", "::1") for address in listening), listening
    for job, pair in zip(jobs, facts, strict=True):
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(10.0).code == 143
        assert job.leftovers(pair) == []


def test_two_jobs_with_numa_are_told_of_each_other(tmp_path: Path) -> None:
    """The first holds all cores of this host, or as many as ranks may have; the second says so."""
    ranks = len(read_topology().allowed_cpus)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    words = ["--nproc", str(ranks), "--numa", str(SCRIPTS / "stages.py")]
    first = Launch([*words, str(tmp_path / "first"), "import", "wait", "0"], tmp_path / "first")
    facts = first.facts(ranks, timeout=2 * START_S)
    found = neighbours.find(read_topology().allowed_cpus)
    assert {fact["pid"] for fact in facts} <= set(found.pids)
    assert set(found.cpus) == set(read_topology().allowed_cpus)
    second = Launch([*words, str(tmp_path / "second"), "import", "exit3", "all"], tmp_path / "second")
    outcome = second.wait(2 * START_S)
    assert "warning: ranks of another job hold CPUs" in outcome.stderr
    assert "both jobs share cores and slow each other down" in outcome.stderr
    first.process.send_signal(signal.SIGTERM)
    assert first.wait(10.0).code == 143


def test_unbound_ranks_are_neighbours_as_well(tmp_path: Path) -> None:
    """A rank alone, as its launcher starts it without --numa."""
    (tmp_path / "sleep.py").write_text(
        "import time\nfrom pathlib import Path\nPath('here').touch()\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-u", "-m", "tp_runtime.launch.rank_main", "sleep.py"]
    with subprocess.Popen(command, cwd=tmp_path) as rank:
        deadline = time.monotonic() + START_S
        while not (tmp_path / "here").exists():
            assert rank.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        found = neighbours.find(read_topology().allowed_cpus)
        words = [*COMMAND, "--dry-run"]
        plan = subprocess.run(words, capture_output=True, text=True, timeout=START_S, check=True).stdout
        rank.kill()
    assert rank.pid in found.unbound_pids and rank.pid not in found.pids
    assert "of another job run here on any core" in plan


def listening_addresses(pid: int) -> list[str]:
    """Addresses a process accepts connections on."""
    import psutil

    connections = psutil.Process(pid).net_connections(kind="inet")
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]


def test_signals_are_passed_on_and_a_good_end_is_one(tmp_path: Path) -> None:
    """A server that ends well after SIGTERM makes the launcher end well."""
    script = tmp_path / "server.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGUSR1, lambda *_: Path(f'usr1.{os.environ[\"RANK\"]}').touch())\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "Path('ready.' + os.environ['RANK']).touch()\n"
        "while True: time.sleep(0.01)\n"
    )
    job = Launch(["--nproc", "2", str(script)], tmp_path)
    wait_for(tmp_path, "ready", job)
    job.process.send_signal(signal.SIGUSR1)
    wait_for(tmp_path, "usr1", job)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(10.0).code == 0


def wait_for(folder: Path, stem: str, job: Launch) -> None:
    deadline = time.monotonic() + START_S
    while not all((folder / f"{stem}.{rank}").exists() for rank in range(2)):
        assert job.process.poll() is None and time.monotonic() < deadline, stem
        time.sleep(0.02)


@pytest.mark.parametrize("starter", ["torchrun", "python"])
def test_the_same_script_without_tp_launch(starter: str, tmp_path: Path) -> None:
    ranks = 2 if starter == "torchrun" else 1
    script = [str(SCRIPTS / "placed.py"), str(tmp_path), "all-reduce"]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks == 2 else []
    environ = {**os.environ, "TMPDIR": str(tmp_path), **({} if ranks == 2 else {"RANK": "0"})}
    done = subprocess.run(
        [sys.executable, *run, *script],
        env=environ,
        capture_output=True,
        text=True,
        timeout=START_S,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert [found["sum"] for found in facts_of(tmp_path, ranks)] == [ranks] * ranks


def test_a_module_runs_by_name(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text("import sys; print(__name__, sys.argv[1:])\n")
    outcome = Launch(["-m", "my_module", "--flag"], tmp_path).wait(START_S)
    assert (outcome.code, outcome.stdout) == (0, "__main__ ['--flag']\n"), outcome.stderr


def test_an_installed_module_runs_by_name(tmp_path: Path) -> None:
    outcome = Launch(["-m", "tp_runtime.env"], tmp_path).wait(START_S)
    assert outcome.code == 0 and "TP_CACHE_DIR" in outcome.stdout, outcome.stderr
