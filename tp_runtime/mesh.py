"""Ranks as a torch DeviceMesh with a tensor-parallel axis, read from torchrun's environment.

A job of one rank needs no launcher, port or store. On one host nothing listens beyond loopback.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from . import env
from .errors import ConfigError
from .log import get_logger

TP_AXIS = "tp"
DEFAULT_TIMEOUT_S = 600.0


def init_mesh(*, device: str = "cpu", timeout_s: float | None = None) -> DeviceMesh:
    """Join this process's job and return its one-dimensional mesh with axis "tp".

    device: "cpu" or "cuda" (the rank's GPU is LOCAL_RANK). timeout_s: deadline of c10d collectives; None is
    TP_COLLECTIVE_TIMEOUT (tp-launch --collective-timeout), else 600.
    The process group is created where there is none yet. Raises ConfigError for a broken environment.
    """
    rank, world = env.get_int("RANK") or 0, env.get_int("WORLD_SIZE") or 1
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={rank} with WORLD_SIZE={world} is impossible; start ranks with tp-launch")
    if device == "cuda":
        # Weights are joined while little is free: freed pieces have to become one.
        if not env.is_set("PYTORCH_CUDA_ALLOC_CONF"):
            env.set_default("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(env.get_int("LOCAL_RANK") or 0)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        one_host = (env.get_int("LOCAL_WORLD_SIZE") or 1) == world
        if one_host:
            env.set_default("GLOO_SOCKET_IFNAME", "lo")
        store = _rank_store(world)
        if timeout_s is None:
            timeout_s = env.get_seconds("TP_COLLECTIVE_TIMEOUT") or DEFAULT_TIMEOUT_S
        dist.init_process_group(
            backend,
            init_method="env://" if store is None else None,
            store=store,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
    return init_device_mesh(device, (world,), mesh_dim_names=(TP_AXIS,))


def _rank_store(world: int) -> dist.Store | None:
    """The store in which the ranks meet; None for the one that torchrun's variables name."""
    if world == 1:
        return dist.HashStore()
    path = env.get("TP_STORE_FILE")
    return None if path is None else dist.FileStore(path, world)


def tp_rank(mesh: DeviceMesh) -> int:
    """This process's coordinate on the "tp" axis."""
    return mesh.get_local_rank(TP_AXIS)


def tp_size(mesh: DeviceMesh) -> int:
    """Number of ranks on the "tp" axis. Raises ConfigError where the mesh has none."""
    if not isinstance(mesh, DeviceMesh):
        raise ConfigError(f"{mesh!r} is no DeviceMesh; make one with tp_runtime.init_mesh()")
    names = mesh.mesh_dim_names or ()
    if TP_AXIS not in names:
        raise ConfigError(f"the mesh has axes {list(names)} and none is called {TP_AXIS!r}; name one so")
    return mesh.size(names.index(TP_AXIS))


def tp_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of the "tp" axis."""
    return mesh.get_group(TP_AXIS)


def leave_job() -> None:
    """Close this process's groups; all ranks together, as the last thing they do.

    One that ends while a peer's threads still serve it may abort, and NCCL complains of groups left open.
    Graphs that hold sums of NCCL must be gone: it waits for them. A peer that is gone, or later than the
    groups' timeout, is no fault any more.
    """
    if not dist.is_initialized():
        return
    try:
        dist.barrier()
    except RuntimeError as error:
        get_logger().debug("left without the other ranks (%s)", str(error).splitlines()[0])
        return
    dist.destroy_process_group()
