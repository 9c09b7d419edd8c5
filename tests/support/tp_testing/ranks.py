"""run_ranks: one function in every rank of a small gloo job, and what each returned.

Ranks are forked from a server that has torch loaded, so that a job of four starts in well under a
second. A rank that raises fails the test with that rank's traceback; a job past its timeout is killed.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "tp_runtime.engine.llm"])


def _load(path: str) -> ModuleType:
    """The test module at `path`, under a name of its own (test modules have no importable name)."""
    name = "tp_ranks_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _rank_main(
    pipe: Connection,
    where: tuple[str, str],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    store: str,
    limit: float,
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=limit),
        )
        path, name = where
        result = getattr(_load(path), name)(*args)
        pipe.send_bytes(pickle.dumps((True, result)))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  (whatever it was, the parent must hear of it)
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """fn(*args) in each of `world` ranks (gloo initialised, 1 thread each); the results in rank order.

    fn is a module-level function of a test file; args and results must pickle.
    """
    where = (inspect.getfile(inspect.unwrap(fn)), fn.__qualname__)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank_main, args=(theirs, where, args, rank, world, store, timeout), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < world and not failures:
                ready = wait(
                    [p for r, p in enumerate(pipes) if r not in results], deadline - time.monotonic()
                )
                if not ready:
                    failures[-1] = (
                        f"no answer within {timeout} s from ranks {sorted(set(range(world)) - set(results))}"
                    )
                for pipe in ready:
                    rank = pipes.index(pipe)  # type: ignore[arg-type]
                    try:
                        # By value: a Connection would share tensors' memory, which ends with the rank.
                        good, value = pickle.loads(pipes[rank].recv_bytes())
                    except EOFError:
                        good, value = False, "died without a word"
                    (results if good else failures)[rank] = value
        finally:
            for process in processes:
                process.join(0.1 if failures else 10.0)
                if process.is_alive():
                    process.kill()
                    process.join()
        for rank, text in failures.items():
            raise AssertionError(f"rank {rank} of {world}:\n{text}")
    return [results[rank] for rank in range(world)]
