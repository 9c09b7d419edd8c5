"""Ranks started by srun and mpirun: their variables become torchrun's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tp_runtime.errors import LaunchError
from tp_runtime.launch import schedulers
from tp_runtime.launch.topology import read_topology

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "cpu[07-09],gpu1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


def test_srun_over_several_hosts() -> None:
    variables = schedulers.adopt(SLURM)
    port = variables.pop("MASTER_PORT")
    assert variables == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "cpu07",
    }
    assert 20000 <= int(port) < 32000
    assert schedulers.adopt({**SLURM, "SLURM_PROCID": "0"})["MASTER_PORT"] == port
    assert schedulers.adopt({**SLURM, "SLURM_STEP_ID": "4"})["MASTER_PORT"] != port
    assert schedulers.adopt({**SLURM, "SLURM_RESTART_COUNT": "1"})["MASTER_PORT"] != port, "requeued"
    assert schedulers.adopt({**SLURM, "SLURM_NODEID": "3"})["LOCAL_WORLD_SIZE"] == "1"
    told = schedulers.adopt({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.1", "4000")


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA])
def test_mpirun_on_one_host_meets_in_a_private_file(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    variables = schedulers.adopt(environ)
    assert (variables["WORLD_SIZE"], variables["LOCAL_WORLD_SIZE"]) == ("2", "2")
    assert "MASTER_PORT" not in variables
    folder = Path(variables["TP_STORE_FILE"]).parent
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(LaunchError, match="open to other users"):
        schedulers.adopt(environ)


def test_a_killed_jobs_file_is_removed_by_whoever_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environ = {**HYDRA, "PMI_JOBID": "7"}
    path = Path(schedulers.adopt(environ)["TP_STORE_FILE"])
    path.write_text("of this job: a rank was faster")
    assert schedulers.adopt(environ)["TP_STORE_FILE"] == str(path) and path.exists()
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert schedulers.adopt(environ)["TP_STORE_FILE"] == str(path) and not path.exists()


PLACED = """
import json, os, sys
sys.argv = ["x", "script.py"]
from tp_runtime.launch import neighbours, preload, rank_main
found = neighbours.Neighbours(cpus=(), pids=(), unbound_pids=(1, 2))
neighbours.find = lambda allowed: found
preload.find = lambda: preload.Preload((), (("KMP_BLOCKTIME", "1"),))
os.environ.update(TP_NUMA="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", RANK="0")
placement = rank_main._own_placement(["script.py"])
print(json.dumps(placement.to_dict()))
"""


def own_placement(setup: str = "") -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    words = [sys.executable, "-c", setup + PLACED]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environ, check=True)


def test_a_rank_of_mpirun_plans_as_tp_launch_would() -> None:
    done = own_placement()
    assert len(json.loads(done.stdout)["cpus"]) == max(1, len(read_topology().cores) // 2)
    assert "2 ranks of another job run here on any core" in done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU cannot be bound to fewer")
def test_only_a_rank_with_other_cpus_than_its_parent_was_bound_by_its_scheduler() -> None:
    """taskset mpirun: parent and ranks have the same few CPUs, which the ranks share out."""
    first = min(os.sched_getaffinity(0))
    bound = own_placement(f"import os; os.sched_setaffinity(0, {{{first}}})\n")
    assert json.loads(bound.stdout)["cpus"] == [first] and "share" not in bound.stderr
    both = f"import os, subprocess, sys; os.sched_setaffinity(0, {{{first}}})\n"
    both += f"done = subprocess.run([sys.executable, '-c', {PLACED!r}]); sys.exit(done.returncode)\n"
    shared = own_placement(both)
    assert json.loads(shared.stdout)["cpus"] == [first]
    assert "2 ranks share 1 usable core" in shared.stderr


def test_no_scheduler_and_torchrun_are_left_alone() -> None:
    assert schedulers.adopt({}) == {}
    assert schedulers.adopt({**SLURM, "RANK": "0"}) == {}


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({**HYDRA, "PMI_RANK": "2"}, "PMI_RANK=2 of PMI_SIZE=2, which is impossible"),
        ({**HYDRA, "PMI_RANK": "one"}, "PMI_RANK='one' is not a whole number"),
        ({**HYDRA, "MPI_LOCALNRANKS": "1"}, "does not name the first; set MASTER_ADDR"),
    ],
)
def test_what_cannot_be_is_one_sentence(environ: dict[str, str], says: str) -> None:
    with pytest.raises(LaunchError, match=says):
        schedulers.adopt(environ)


def test_two_ranks_of_mpirun_form_a_job(tmp_path: Path) -> None:
    """As mpirun starts them: one parent, its variables, no launcher; placed by TP_NUMA."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "from tp_runtime.mesh import init_mesh\n"
        "from tp_runtime.launch import affinity\n"
        "init_mesh()\n"
        "x = torch.ones(1)\n"
        "dist.all_reduce(x)\n"
        "policy, threads = affinity.policy_in_force()[0], os.environ['OMP_NUM_THREADS']\n"
        "print(int(x), len(os.sched_getaffinity(0)), policy, threads)\n"
        "dist.destroy_process_group()\n"
    )
    base = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tp_runtime.launch.rank_main", str(script)],
            env={
                **base,
                **HYDRA,
                "PMI_RANK": str(r),
                "MPI_LOCALRANKID": str(r),
                "TP_NUMA": "1",
                "TMPDIR": str(tmp_path),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [output[0] for output in outputs] == ["2", "2"]
    assert [output[2] for output in outputs] == ["bind", "bind"]
    assert {int(output[3]) for output in outputs} <= {cores, cores + 1}
    assert {int(output[1]) for output in outputs} <= {cores, cores + 1}
