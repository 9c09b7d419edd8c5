"""A placement applied to a process, read back from the kernel; refusals fall back and are said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tp_runtime.errors import LaunchError
from tp_runtime.launch import affinity, mempolicy
from tp_runtime.launch.placement import plan_ranks
from tp_runtime.launch.plan import RankPlacement
from tp_runtime.launch.topology import read_topology

TIMEOUT_S = 60


def in_child(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own: placements cannot be undone."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, **variables},
    )


APPLY = """
import json, os, sys
from tp_runtime.launch import affinity, mempolicy
affinity.apply(affinity.given_placement(), strict="strict" in sys.argv)
print(json.dumps([sorted(os.sched_getaffinity(0)), affinity.policy_in_force(), mempolicy.get_policy(),
                  os.environ.get("OMP_NUM_THREADS")]))
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("policy", ["bind", "preferred", "interleave"])
def test_plan_is_read_back(policy: str) -> None:
    (rank,) = plan_ranks(read_topology(), 1).ranks
    wanted = {**rank.to_dict(), "mem_policy": policy, "cpus": list(rank.cpus[:1])}
    done = in_child(APPLY, TP_PLACEMENT=json.dumps(wanted))
    assert done.stderr == ""
    cpus, in_maps, by_call, threads = json.loads(done.stdout)
    assert cpus == wanted["cpus"]
    assert in_maps == by_call == [policy, list(rank.mem_nodes)]
    assert threads == str(rank.threads)


def test_a_refused_policy_falls_back_step_by_step() -> None:
    """A node this host does not have: the kernel refuses it as it refuses any policy in some containers."""
    (rank,) = plan_ranks(read_topology(), 1).ranks
    done = in_child(APPLY, TP_PLACEMENT=json.dumps({**rank.to_dict(), "mem_nodes": [777]}))
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert "memory policy bind on nodes 777 is refused here" in lines[0] and lines[0].endswith(
        "trying preferred"
    )
    assert "preferred on nodes 777 is refused here" in lines[1] and lines[1].endswith("only CPUs are bound")
    assert json.loads(done.stdout)[1] == ["default", []]


# A seccomp filter as container runtimes install it without SYS_NICE: set_mempolicy and mbind give EPERM.
FORBID = """
import ctypes, struct
from tp_runtime.launch import mempolicy
number = mempolicy._CALLS.get(mempolicy.platform.machine(), mempolicy._GENERIC_CALLS)[0]
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)]
text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(text)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
"""


def test_a_container_that_forbids_memory_policies() -> None:
    """bind, then preferred, then CPUs alone; with --numa-strict one sentence."""
    (rank,) = plan_ranks(read_topology(), 1).ranks
    wanted = json.dumps({**rank.to_dict(), "mem_policy": "bind"})
    done = in_child(FORBID + APPLY, TP_PLACEMENT=wanted)
    nodes = ",".join(map(str, rank.mem_nodes))
    lines = done.stderr.splitlines()
    assert [line.partition("memory policy ")[2] for line in lines] == [
        f"bind on nodes {nodes} is refused here (Operation not permitted); trying preferred",
        f"preferred on nodes {nodes} is refused here (Operation not permitted); only CPUs are bound",
    ]
    cpus, in_maps, _, _ = json.loads(done.stdout)
    assert (cpus, in_maps) == (list(rank.cpus), ["default", []])
    strict = in_child(FORBID + APPLY.replace('"strict" in sys.argv', "True"), TP_PLACEMENT=wanted)
    assert "LaunchError: --numa-strict: memory policy bind on nodes" in strict.stderr


def test_weighted_interleave_falls_back_where_the_kernel_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse_weights(policy: str, nodes: tuple[int, ...]) -> str:
        tried.append(policy)
        if policy == "weighted_interleave":
            raise OSError(22, "Invalid argument")
        return "set_mempolicy"

    monkeypatch.setattr(mempolicy, "set_policy", refuse_weights)
    monkeypatch.setattr(affinity, "policy_in_force", lambda: ("interleave", (0, 1)))
    placement = RankPlacement(0, (0,), 1, 1, (0,), (0,), "weighted_interleave", (0, 1), None, {})
    problems = affinity._bind_memory(placement)
    assert tried == ["weighted_interleave", "interleave"]
    assert [problem.rpartition("; ")[2] for problem in problems] == ["trying interleave"]


def test_cpus_that_cannot_be_had_are_said_and_strict_refuses() -> None:
    (rank,) = plan_ranks(read_topology(), 1).ranks
    wanted = json.dumps({**rank.to_dict(), "cpus": [100_000]})
    done = in_child(APPLY, TP_PLACEMENT=wanted)
    assert "rank 0 cannot have CPUs 100000" in done.stderr
    strict = in_child(APPLY.replace('"strict" in sys.argv', "True"), TP_PLACEMENT=wanted)
    assert "LaunchError: --numa-strict: rank 0 cannot have CPUs 100000" in strict.stderr


def test_a_policy_that_did_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mempolicy, "set_policy", lambda policy, nodes: "libnuma")
    monkeypatch.setattr(affinity, "policy_in_force", lambda: ("default", ()))
    placement = RankPlacement(0, (0,), 1, 1, (0,), (0,), "bind", (0,), None, {})
    assert "was set and the kernel shows default" in affinity._bind_memory(placement)[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rank": 0}'])
def test_a_broken_placement_is_one_sentence(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_PLACEMENT", text)
    with pytest.raises(LaunchError, match="cannot be read.*start ranks with tp-launch"):
        affinity.given_placement()


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("default", ("default", ())),
        ("bind:0-1,4", ("bind", (0, 1, 4))),
        ("interleave:0,2", ("interleave", (0, 2))),
        ("prefer:3", ("preferred", (3,))),
        ("prefer (many):3", ("preferred", (3,))),
        ("bind=static:1", ("bind", (1,))),
        ("weighted interleave:0-1", ("weighted_interleave", (0, 1))),
    ],
)
def test_policies_as_numa_maps_writes_them(text: str, policy: tuple[str, tuple[int, ...]]) -> None:
    assert affinity.parse_policy(text) == policy


def test_libnuma_is_probed_in_a_child_that_may_die(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that libnuma rejects is a null pointer, and the process that passes it on dies by a signal."""
    monkeypatch.setattr(mempolicy, "_libnuma_set", lambda policy, nodes: os.kill(os.getpid(), signal.SIGKILL))
    assert mempolicy._probe("bind", (0,)) is False
    monkeypatch.setattr(mempolicy, "_libnuma_set", lambda policy, nodes: None)
    assert mempolicy._probe("bind", (0,)) is False, "a policy that did not take"


def test_without_libnuma_system_calls_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import ctypes
from tp_runtime.launch import mempolicy
real = ctypes.CDLL
def without_libnuma(name, *args, **kwargs):
    if name and "numa" in name:
        raise OSError("no such library")
    return real(name, *args, **kwargs)
mempolicy.ctypes.CDLL = without_libnuma
print(mempolicy.set_policy("bind", [0]), mempolicy.get_policy())
"""
    assert in_child(code).stdout.strip() == "set_mempolicy ('bind', (0,))"


def test_no_top_level_tests_package_of_py_libnuma_is_imported() -> None:
    """py-libnuma installs one; it would shadow a user's."""
    code = (
        "import sys; from tp_runtime.launch import affinity, mempolicy; mempolicy.set_policy('bind', [0]); "
    )
    assert (
        in_child(code + "print([m for m in sys.modules if m.split('.')[0] == 'tests'])").stdout.strip()
        == "[]"
    )


def test_environment_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"OMP_NUM_THREADS": "3", "OMP_PLACES": "{0},{1}", "LD_PRELOAD": "/lib/libtcmalloc.so"}
    cpus = tuple(os.sched_getaffinity(0))
    placement = RankPlacement(0, cpus, 1, 3, (0,), (0,), "none", (), None, variables)
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    affinity.apply(placement)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_PLACES"]) == ("3", "{0},{1}")
    assert "LD_PRELOAD" not in os.environ, "read when a program starts: the launcher's to set, not the rank's"
    for name in ("OMP_NUM_THREADS", "OMP_PLACES"):
        del os.environ[name]


def test_launcher_modules_import_no_torch() -> None:
    """All but the two that spawn imports when ranks start."""
    folder = Path(affinity.__file__).parent
    names = sorted(
        path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "agent", "rendezvous")
    )
    code = "import sys, importlib\n"
    code += f"for name in {names!r}: importlib.import_module('tp_runtime.launch.' + name)\n"
    code += "print([m for m in sys.modules if m in ('torch', 'psutil', 'numa', 'numpy')])"
    assert in_child(code).stdout.strip() == "[]"
