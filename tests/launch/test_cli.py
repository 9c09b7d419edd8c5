"""tp-launch without starting anything: help, plans, topologies, captures, doctor, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tp_testing import sysfs_writer

from tp_runtime.launch import cli, doctor, preload, residency
from tp_runtime.launch.placement import plan_ranks
from tp_runtime.launch.topology import read_topology

Machine = Callable[[str], Path]
RANK_KEYS = ["rank", "cpus", "cores", "threads", "nodes", "packages", "mem_policy", "mem_nodes", "gpu", "env"]
HOST_KEYS = ["packages", "nodes", "cores", "cpus", "allowed_cpus", "allowed_mem_nodes", "smt", "gpus"]
TORCHLESS = """
import sys
from tp_runtime.launch.cli import main
try:
    code = main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
sys.exit(code)
"""


def test_json_of_a_plan(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--nproc", "8", "--dry-run", "--json", "--sysroot", str(machine("8 GPUs"))]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan) == ["host", "ranks", "warnings"]
    assert list(plan["host"]) == HOST_KEYS
    assert plan["host"]["gpus"][5] == {"index": 5, "node": 1}
    assert [list(rank) for rank in plan["ranks"]] == [RANK_KEYS] * 8
    assert plan["ranks"][7]["gpu"] == 7


def test_counts_are_of_the_whole_host(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--dry-run", "--json", "--sysroot", str(machine("32amd64-4s2n4c-cgroup2"))])
    host = json.loads(capsys.readouterr().out)["host"]
    assert (host["packages"], host["cores"], host["cpus"], host["nodes"]) == (4, 32, 32, list(range(8)))
    assert (host["allowed_cpus"], host["allowed_mem_nodes"]) == (list(range(6)), list(range(6)))


def test_drawing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--nproc", "2", "--dry-run", "--sysroot", str(machine("memorysidecaches"))])
    text = capsys.readouterr().out
    assert "| node 0   [0000000000] 370 GiB |  | node 1   [1111111111] 372 GiB |" in text
    assert "interleave 0,2" in text


@pytest.mark.parametrize(
    "name", ["256ppc-8n8s4t", "16amd64-4n4c-cgroup-distance-merge", "2048 CPUs", "8 GPUs"]
)
def test_print_topology(name: str, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--print-topology", "--sysroot", str(machine(name))]) == 0
    text = capsys.readouterr().out
    assert f"CPUs: {len(read_topology(machine(name)).cpus)} " in text
    assert max(map(len, text.splitlines()[4:])) < 200


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--nproc", "2", "--dry-run"],
        ["--print-topology"],
        ["doctor"],
        ["doctor", "--help"],
        ["nowhere.py"],
    ],
)
def test_no_torch(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TORCHLESS, *words], capture_output=True, text=True, timeout=60
    )
    assert "AssertionError" not in done.stderr
    assert done.returncode == (2 if words == ["nowhere.py"] else 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nproc", "0", "x.py"], "--nproc 0: at least 1 is needed; use --nproc 1 or more"),
        (["--nproc", "two", "x.py"], "argument --nproc/--nproc-per-node: invalid int value: 'two'"),
        (["--frobnicate", "x.py"], "unrecognized arguments: --frobnicate; see tp-launch --help"),
        ([], "no script was given; use tp-launch [options] SCRIPT [args]"),
        (["nowhere.py"], "script 'nowhere.py' is no file here"),
        (["--json", "x.py"], "use it with --dry-run"),
        (["--grace-period", "-1", "x.py"], "--grace-period -1: give a number of seconds above 0"),
        (
            ["--collective-timeout", "nan", "x.py"],
            "--collective-timeout nan: give a number of seconds above 0",
        ),
        (["--max-restarts", "-1", "x.py"], "--max-restarts -1: at least 0 is needed"),
        (["--cpus", "a-b", "x.py"], "'a-b' is no list of CPUs such as 0-15,32"),
        (["--mem-policy", "striped", "--dry-run"], "--mem-policy 'striped' is unknown"),
        (["--numa-strict", "x.py"], "add --numa"),
        (["--sysroot", "/nowhere", "--dry-run"], "describes no CPU; --sysroot wants"),
        (["--rdzv-endpoint", "a:1", "x.py"], "add --nnodes N and --node-rank"),
        (["--nnodes", "2", "SCRIPT"], "every host needs the same HOST:PORT of node 0"),
        (["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:1", "SCRIPT"], "--node-rank None with --nnodes 2"),
        (["--capture", "/nowhere/host.tar"], "--capture /nowhere/host.tar: No such file or directory"),
    ],
)
def test_refusals_are_one_sentence(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("")
    assert cli.main([str(script) if word == "SCRIPT" else word for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and says in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def test_a_captured_host_plans_the_same(tmp_path: Path) -> None:
    archive = tmp_path / "host.tar"
    assert cli.main(["--capture", str(archive)]) == 0
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="tar")
    there, here = read_topology(tmp_path / "host"), read_topology()
    assert there == here
    assert plan_ranks(there, 2) == plan_ranks(here, 2)


def test_capture_names_no_user_or_program(tmp_path: Path) -> None:
    cli.main(["--capture", str(tmp_path / "host.tar")])
    text = (tmp_path / "host.tar").read_bytes()
    assert b"environ" not in text and b"cmdline" not in text


def test_a_gpu_host_survives_capture(machine: Machine, tmp_path: Path) -> None:
    from tp_runtime.launch import capture
    from tp_runtime.launch.sysfs import SysRoot

    capture.write(tmp_path / "gpus.tar", SysRoot(machine("8 GPUs")))
    with tarfile.open(tmp_path / "gpus.tar") as tar:
        tar.extractall(tmp_path, filter="tar")
    assert read_topology(tmp_path / "gpus") == read_topology(machine("8 GPUs"))


def test_doctor_says_what_costs_speed_and_how_to_mend_it(tmp_path: Path) -> None:
    host = sysfs_writer.Host(packages=2, cores_of_nodes=(8,), cpu_max="400000 100000")
    root = sysfs_writer.write(host, tmp_path)
    for name, text in {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
        "proc/cpuinfo": "processor: 0\nflags\t\t: fpu avx2 avx512f",
        "proc/meminfo": "SwapTotal: 8388608 kB\nSwapFree: 4194304 kB",
        "proc/sys/kernel/numa_balancing": "1",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    lines = {finding.subject: finding.line() for finding in doctor.examine(root)}
    assert lines["CPU governor"].startswith("slow  CPU governor: powersave; cpupower")
    assert lines["transparent huge pages"].startswith("slow  transparent huge pages: never; echo madvise")
    assert lines["CPU features"].startswith("slow  CPU features: AVX2 AVX512; no bf16")
    assert lines["control group"].startswith("slow  control group: 16 of 16 CPUs allowed, CPU quota 4")
    assert lines["swap"].startswith("slow  swap: 8 GiB, 4096 MiB in use; ")
    assert lines["/dev/shm"].startswith("slow  /dev/shm: not there; mount a tmpfs")
    assert lines["automatic NUMA balancing"].startswith("slow  automatic NUMA balancing: on; sysctl")


def test_doctor_of_this_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(line.startswith(("ok    ", "slow  ")) for line in lines)


def test_preloads_are_found_by_path(tmp_path: Path) -> None:
    assert preload.find((str(tmp_path),)) == preload.Preload()
    for name in ("libjemalloc.so.2", "libtcmalloc.so.4", "libiomp5.so"):
        (tmp_path / name).write_text("")
    found = preload.find((str(tmp_path),))
    assert found.libraries == (str(tmp_path / "libtcmalloc.so.4"), str(tmp_path / "libiomp5.so"))
    assert found.environment(None)["KMP_BLOCKTIME"] == "1"


def test_share_of_pages_on_own_nodes() -> None:
    found = residency.parse_numa_maps(
        [
            "7f00 bind:0 anon=1024 dirty=1024 N0=768 N1=256 kernelpagesize_kB=4",
            "7f01 bind:0 anon=4 N0=3 N1=1 kernelpagesize_kB=2048",
            "7f02 bind:0 file=/usr/lib/libtorch.so mapped=9999 N1=9999 kernelpagesize_kB=4",
            "7f03 bind:0 stack anon=3 N1=3 kernelpagesize_kB=4",
        ]
    )
    assert found.total == (1024 << 12) + (4 << 21)
    assert found.share_on((0,)) == 0.75
    assert residency.describe(1, found, (0,)) == (
        "placement of rank 1: 75.0% of 12 MiB on node 0 (node 0 9 MiB, node 1 3 MiB)"
    )
    assert "not seen" in residency.describe(1, None, (0,))
