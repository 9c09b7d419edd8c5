"""tp-launch without starting anything: help, plans, topologies, captures, doctor, and every refusal."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tp_testing import sysfs_writer, trees

from tp_runtime.launch import capture, cli, doctor, pci, preload, residency
from tp_runtime.launch.placement import plan_ranks
from tp_runtime.launch.sysfs import SysRoot
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
        (["--cpus", "5-1", "x.py"], "'5-1' is no list of CPUs such as 0-15,32"),
        (["--nproc", "99999", "--dry-run"], "--nproc 99999: at most 4096 ranks run on one host; use fewer"),
        (["--node-rank", "1", "x.py"], "--node-rank 1 is for jobs over several hosts; add --nnodes N"),
        (["-m", "no_such_package.run"], "-m no_such_package.run: no module is called so here"),
        (["--mem-policy", "striped", "--dry-run"], "--mem-policy 'striped' is unknown"),
        (["--numa-strict", "x.py"], "add --numa"),
        (["doctor", "--foo"], "unrecognized arguments: --foo; see tp-launch doctor --help"),
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


def test_capture_holds_what_doctor_and_plans_read_and_no_serial_number(tmp_path: Path) -> None:
    root = sysfs_writer.write(sysfs_writer.Host(packages=2, gpu_nodes=(1, 0)), tmp_path / "there")
    for name, text in {
        "proc/driver/nvidia/gpus/0000:10:00.0/information": "Model: \t X\nGPU UUID: \t GPU-1-2\n"
        "Device Minor: \t 0\n",
        "proc/driver/nvidia/gpus/0000:20:00.0/information": "GPU UUID: \t GPU-3-4\nDevice Minor: \t 1\n",
        "dev/nvidia1": "",  # the container was given the second GPU alone
        "proc/cpuinfo": "processor: 0\nflags\t\t: fpu avx2 avx512_bf16\nSerial\t: 1234cafe",
        "proc/sys/kernel/numa_balancing": "1",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "12",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    capture.write(tmp_path / "host.tar", SysRoot(root))
    with tarfile.open(tmp_path / "host.tar") as tar:
        tar.extractall(tmp_path, filter="tar")
    there, here = read_topology(tmp_path / "host"), read_topology(root)
    assert there == here and [gpu.node for gpu in there.gpus] == [0]
    subjects = ("CPU governor", "transparent huge pages", "CPU features", "automatic NUMA balancing")
    lines = [
        [f.line() for f in doctor.examine(r) if f.subject in subjects] for r in (tmp_path / "host", root)
    ]
    assert len(lines[0]) == 4 and lines[0] == lines[1]
    assert (tmp_path / "host/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages").read_text() == "12\n"
    archive = (tmp_path / "host.tar").read_bytes()
    assert b"GPU-" not in archive and b"1234cafe" not in archive


@pytest.mark.parametrize("name", trees.CAPTURED)
def test_a_captured_gpu_host_plans_as_it_did_there(
    name: str, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--sysroot", str(machine(name)), "--nproc", "4", "--numa", "--dry-run", "generate.py"]
    assert cli.main([*words, "--model", "llama-70b", "--random-weights", "--prompt", "hi"]) == 0
    assert capsys.readouterr().out == (trees.CAPTURES / f"{name}.plan").read_text()


def test_a_gpu_host_survives_capture(machine: Machine, tmp_path: Path) -> None:
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


def test_a_card_without_its_driver_is_no_gpu_here(tmp_path: Path) -> None:
    """A container without --gpus sees all cards on the bus; another host's tree may lack the driver's files."""
    tree = sysfs_writer.write(sysfs_writer.Host(gpu_nodes=(0, 0)), tmp_path)
    assert len(pci.read_gpus(SysRoot(tree))) == 2

    class Live(SysRoot):
        """The tree as if it were the running host's."""

        def __init__(self) -> None:
            super().__init__(tree)
            self.is_live = True

    root = Live()
    assert pci.read_gpus(root) == ()
    (tree / "dev").mkdir()
    for name in ("nvidiactl", "nvidia1"):
        (tree / "dev" / name).touch()
    assert len(pci.read_gpus(root)) == 2, "a sandbox that hides the driver's files"
    information = tree / "proc/driver/nvidia/gpus/0000:20:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Device Minor: \t 1\n")
    assert [gpu.address for gpu in pci.read_gpus(root)] == ["0000:20:00.0"]


def test_a_dry_run_takes_less_than_half_a_second() -> None:
    """The whole process, the best of three, in processor seconds: it waits for nothing but other work here."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-c", TORCHLESS, "--nproc", "2", "--dry-run", "--json"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert len(json.loads(done.stdout)["ranks"]) == 2
    assert 0 < min(seconds) < 0.5, seconds


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
    assert residency.describe("loaded", 1, found, (0,)) == (
        "placement of rank 1, loaded: 75.0% of 12 MiB on node 0 (node 0 9 MiB, node 1 3 MiB; resident pages "
        "of mappings of 1 MiB and more, libraries left out)"
    )
    assert "not seen" in residency.describe("at the end", 1, None, (0,))


def test_residency_is_news_once_it_stays_and_when_it_doubles() -> None:
    """This process as a rank that holds 32 MiB, then 512 MiB more."""
    held = [bytearray(os.urandom(1 << 20) * 32)]
    sampler = residency.Sampler(os.getpid())
    news = []
    for size in (0, 512):
        held.append(bytearray(b"x" * (size << 20)))
        for _ in range(12):
            sampler.sample()
            news.append(sampler.news())
    seen = [found.total for found in news if found is not None]
    assert [i for i, found in enumerate(news) if found is not None][0] >= 7
    assert seen[0] >= 32 << 20 and seen == sorted(set(seen)) and seen[-1] >= 512 << 20
    assert len(seen) == 2 or seen[0] > 256 << 20
