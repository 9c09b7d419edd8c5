"""Real launches where this host looks like others: each tree in a mount namespace, and two hosts in one.

A small library preloaded into the ranks records the placement calls they make, since this machine
lacks most of the CPUs and nodes they name. Namespaces need root, or a kernel that lets users make them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tp_testing import trees
from tp_testing.jobs import COMMAND, SCRIPTS, Launch

Machine = Callable[[str], Path]
START_S = 90.0
UNSHARE = ["unshare"] if os.geteuid() == 0 else ["unshare", "-r"]
_MODES = {"preferred": 1, "bind": 2, "interleave": 3}
IN_DEFAULT_RUN = ("memorysidecaches", "offline-cpu0-node0")


@pytest.fixture(autouse=True)
def namespaces() -> None:
    probe = subprocess.run([*UNSHARE, "-m", "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"this machine lets nobody make mount namespaces: {probe.stderr.strip()}")


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("recorder") / "recorder.so"
    compiler = next(found for name in ("cc", "gcc", "clang", "c++") if (found := shutil.which(name)))
    source = str(SCRIPTS / "recorder.c")
    subprocess.run(
        [compiler, "-x", "c", "-shared", "-fPIC", "-O1", source, "-o", str(library), "-ldl"], check=True
    )
    return library


def seeing(tree: Path) -> list[str]:
    """A wrapper in whose mount namespace the machine looks like `tree`."""
    mounts = f'mount --bind "{tree}/sys/devices/system" /sys/devices/system && exec "$@"'
    return [*UNSHARE, "-m", "sh", "-c", mounts, "sh"]


def check_calls(planned: list[dict[str, Any]], lines: list[str], environments: list[dict[str, str]]) -> None:
    """Each rank made the planned calls. (Others are libnuma's, which tries policies out as it loads.)"""
    for rank in planned:
        mine = [line.split()[1:] for line in lines if line.split()[0] == str(rank["rank"])]
        assert ["sched_setaffinity", "0", *map(str, rank["cpus"])] in mine
        if rank["mem_policy"] != "none":  # a kernel without nodes
            assert ["set_mempolicy", str(_MODES[rank["mem_policy"]]), *map(str, rank["mem_nodes"])] in mine
        environ = environments[rank["rank"]]
        assert {k: v for k, v in environ.items() if k in rank["env"]} == {
            k: v for k, v in rank["env"].items() if k != "LD_PRELOAD"
        }
        assert json.loads(environ["TP_PLACEMENT"]) == rank


@pytest.mark.parametrize(
    "name",
    [n if n in IN_DEFAULT_RUN else pytest.param(n, marks=pytest.mark.full) for n in trees.NAMES],
)
@pytest.mark.parametrize("view", ["namespace", "sysroot"])
def test_ranks_make_the_planned_calls(
    name: str, view: str, machine: Machine, recorder: Path, tmp_path: Path
) -> None:
    """namespace: with this machine's allowed CPUs. sysroot: with all of the other machine's."""
    tree = machine(name)
    wrapper = seeing(tree) if view == "namespace" else []
    options = ["--nproc", "2", "--numa", *(["--sysroot", str(tree)] if view == "sysroot" else [])]
    calls = tmp_path / "calls"
    preload = {"LD_PRELOAD": str(recorder), "RECORDER_FILE": str(calls)}
    dry = subprocess.run(
        [*wrapper, *COMMAND, *options, "--dry-run", "--json"],
        capture_output=True,
        text=True,
        timeout=START_S,
        env={**os.environ, "LD_PRELOAD": str(recorder)},
    )
    planned = json.loads(dry.stdout)["ranks"]
    words = [*options, str(SCRIPTS / "placed.py"), str(tmp_path)]
    outcome = Launch(words, tmp_path, wrapper, **preload).wait(START_S)
    assert outcome.code == 0, outcome.stderr
    environments = [json.loads((tmp_path / f"{rank}.json").read_text())["environ"] for rank in range(2)]
    check_calls(planned, calls.read_text().splitlines(), environments)


def test_two_hosts_with_one_loopback_form_one_job(tmp_path: Path) -> None:
    """Two host names, two /dev/shm, one network: four ranks meet, and memory is shared inside each host."""
    launches = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    for node in range(2):
        setup = f'hostname tp-host{node} && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        wrapper = [*UNSHARE, "-m", "-u", "-i", "sh", "-c", setup, "sh"]
        words = ["--nproc", "2", "--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", endpoint]
        (tmp_path / f"host{node}").mkdir()
        script = [str(SCRIPTS / "placed.py"), str(tmp_path), "all-reduce"]
        launches.append(Launch([*words, *script], tmp_path / f"host{node}", wrapper))
    outcomes = [job.wait(START_S) for job in launches]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [found["sum"] for found in facts] == [4] * 4
    assert [(found["whole_job"], found["sum_over_all"]) for found in facts] == [("shm+c10d", 4)] * 4
    assert [(found["this_host"], found["sum_here"]) for found in facts] == [("shm", 2)] * 4
    assert len({found["environ"]["TP_JOB_ID"] for found in facts}) == 1
    assert [found["environ"]["LOCAL_RANK"] for found in facts] == ["0", "1", "0", "1"]


def in_dev_shm(size: str) -> list[str]:
    """A wrapper with a /dev/shm of that size."""
    return [*UNSHARE, "-m", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]


@pytest.mark.parametrize("words", [[], ["--collectives", "auto"]])
def test_a_tiny_dev_shm_is_one_sentence_before_ranks_start(words: list[str], tmp_path: Path) -> None:
    job = ["--nproc", "2", str(SCRIPTS / "placed.py"), str(tmp_path), *words]
    outcome = Launch(job, tmp_path, in_dev_shm("1m")).wait(START_S)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.sentences == [
        "error: --nproc 2: ranks need 4104 KiB in /dev/shm to communicate, and 1024 KiB of its 1024 KiB are "
        "free; enlarge it (docker run --shm-size, mount -o remount,size=), or set TP_COLLECTIVES=c10d"
    ]
    assert not (tmp_path / "0.json").exists()


@pytest.mark.parametrize(
    ("size", "words", "variables"),
    [
        ("8m", [], {}),
        ("1m", [], {"TP_COLLECTIVES": "c10d"}),
        pytest.param("1m", ["--collectives=c10d"], {}, marks=pytest.mark.full),
    ],
)
def test_ranks_start_where_it_is_large_enough_or_not_needed(
    size: str, words: list[str], variables: dict[str, str], tmp_path: Path
) -> None:
    job = ["--nproc", "2", str(SCRIPTS / "placed.py"), str(tmp_path), *words]
    assert Launch(job, tmp_path, in_dev_shm(size), **variables).wait(START_S).code == 0
    assert (tmp_path / "1.json").exists()


@pytest.mark.full
def test_a_fault_on_one_host_ends_the_other(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    launches = []
    for node in range(2):
        wrapper = [*UNSHARE, "-u", "sh", "-c", f'hostname tp-host{node} && exec "$@"', "sh"]
        words = ["--nproc", "1", "--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", endpoint]
        script = [str(SCRIPTS / "stages.py"), str(tmp_path), "decode", "exit3", "1"]
        launches.append(Launch([*words, *script], tmp_path / f"host{node}", wrapper))
    outcomes = [job.wait(START_S) for job in launches]
    assert [outcome.code for outcome in outcomes] == [3, 3], outcomes
    for outcome in outcomes:
        assert outcome.sentences[0] == "error: rank 1 of 2 on tp-host1 exited with code 3"
