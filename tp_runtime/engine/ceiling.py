"""What this host's memory gives to a plain reading loop: measured once a host in a child, then remembered.

A child, so that the buffers it reads do not count in a rank's peak memory; before loading, so that
nothing else reads. The figure belongs to the CPUs that read: it is kept by CPU model and CPU list.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from .. import env
from .. import mesh as meshes
from ..collectives import all_gather, broadcast_
from ..log import once

TIMEOUT_S = 120
_MOST_CPUS = 8192


def job_read_ceiling_gb_s(mesh: DeviceMesh, device: str = "cpu") -> float | None:
    """GB/s that all ranks of a one-host job read together; None where unknown. Every rank calls it.

    On CPUs rank 0 measures with everybody's CPUs and threads, while the others wait. GPUs each have memory
    of their own: each measures its own, and the sum counts.
    """
    group = meshes.tp_group(mesh)
    if device == "cuda":
        from ..kernels.cuda.read_ceiling import read_ceiling_gb_s as gpu_ceiling

        return float(all_gather(torch.tensor([gpu_ceiling()], dtype=torch.float64), group).sum())
    mine = torch.zeros(_MOST_CPUS + 1, dtype=torch.float32)
    mine[list(os.sched_getaffinity(0))] = 1
    mine[_MOST_CPUS] = torch.get_num_threads()
    everyone = all_gather(mine, group)
    cpus = everyone[:, :_MOST_CPUS].amax(0).nonzero().flatten().tolist()
    threads = min(int(everyone[:, _MOST_CPUS].sum()), len(cpus))
    figure = torch.full((1,), -1.0, dtype=torch.float32)
    if meshes.tp_rank(mesh) == 0:
        figure[0] = read_ceiling_gb_s(cpus, threads) or -1.0
    broadcast_(figure, group)
    return float(figure) if float(figure) > 0 else None


def _key(cpus: list[int], threads: int) -> str:
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ][:1]
    return hashlib.sha256(repr((model, cpus, threads, os.uname().nodename)).encode()).hexdigest()[:16]


def read_ceiling_gb_s(cpus: list[int], threads: int) -> float | None:
    """GB/s (10^9 bytes) that `threads` threads on `cpus` read from memory; None where it cannot be known.

    Measured where the cache folder ($TP_CACHE_DIR) holds no figure of these CPUs yet.
    """
    folder = env.get_path("TP_CACHE_DIR")
    assert folder is not None, "TP_CACHE_DIR has a default"
    path = folder / "ceilings" / f"{_key(cpus, threads)}.json"
    try:
        return float(json.loads(path.read_text())["gb_s"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or a file that a full disk cut short
    figure = _measure(cpus, threads)
    if figure is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"gb_s": figure, "cpus": cpus, "threads": threads}))
        partial.replace(path)
    except OSError as error:
        once(f"the read bandwidth cannot be kept in {path.parent} ({error.strerror}): set TP_CACHE_DIR")
    return figure


def _measure(cpus: list[int], threads: int) -> float | None:
    command = [sys.executable, "-m", "tp_runtime.kernels.cpu.read_ceiling", "--json"]
    command += ["--cpus", ",".join(map(str, cpus)), "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        return float(json.loads(done.stdout.splitlines()[-1])["gb_s"])
    except (subprocess.TimeoutExpired, ValueError, KeyError, IndexError):
        once("the host's read bandwidth could not be measured; its share is not reported")
        return None
