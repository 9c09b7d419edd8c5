"""Attaching a process group to shared memory: one file in /dev/shm a rank, gone as soon as all have it.

The ranks agree over the process group itself (c10d). Each creates its own file under a name nobody can
guess, sized and paid for at once (so that a full /dev/shm is an answer, not a crash later); all map all of
them; then each removes its own name. Whether ranks share a host is decided by whether they can open each
other's files. From then on nothing but mapped memory is left, which ends with the processes.

Where one rank cannot, all use c10d, and the reason is said once.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from .. import env, native
from ..errors import ConfigError, KernelBuildError
from ..log import once
from . import fakes

SLOT_BYTES = 1 << 20
_ROOT = Path("/dev/shm")
_PREFIX = "tp_runtime"
_RECORD_BYTES = 512
_STALE_S = 600.0
_SOURCES = ("ops.cpp", "group.cpp", "reduce.cpp")


@dataclass(frozen=True)
class _Record:
    """What a rank tells the others: its pid and file, or why it cannot take part."""

    pid: int
    path: str
    trouble: str = ""

    def pack(self) -> torch.Tensor:
        text = f"{self.pid}\n{self.path}\n{self.trouble}".encode()[:_RECORD_BYTES]
        return torch.frombuffer(bytearray(text.ljust(_RECORD_BYTES, b"\0")), dtype=torch.uint8)

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> _Record:
        pid, path, trouble = bytes(packed.tolist()).rstrip(b"\0").decode(errors="replace").split("\n", 2)
        return cls(int(pid), path, trouble)


@cache
def _load() -> None:
    folder = Path(__file__).parent / "src"
    sources = tuple(native.Source(folder / name) for name in _SOURCES)
    native.load(native.Library("tp_shm", sources, tuple(sorted(folder.glob("*.h")))))
    fakes.register()


def wanted() -> bool:
    """False where TP_COLLECTIVES=c10d. Raises ConfigError for an unknown value."""
    choice = env.get("TP_COLLECTIVES")
    if choice not in (None, "shm", "c10d"):
        raise ConfigError(f"TP_COLLECTIVES={choice!r} is not known; use shm or c10d")
    return choice != "c10d"


def attach(group: dist.ProcessGroup, timeout_s: float) -> bool:
    """Connect `group` to shared memory; False where its ranks will use c10d. All ranks call it together.

    timeout_s: how long an operation may wait for a peer.
    """
    own = _create()
    try:
        records = _exchange(own, group)
        troubles = [f"rank {rank}: {record.trouble}" for rank, record in enumerate(records) if record.trouble]
        if not troubles:
            troubles = _map(records, group, timeout_s)
        if troubles:
            once(f"collectives go through c10d, not shared memory ({troubles[0]})")
            return False
        return True
    finally:
        if own.path:
            os.unlink(own.path)


def _create() -> _Record:
    """This rank's file, or the reason why there is none."""
    try:
        _load()
    except KernelBuildError as error:
        return _Record(os.getpid(), "", str(error))
    _remove_stale()
    job = (env.get("TP_JOB_ID") or "job").replace("/", "_")[:64]
    path = _ROOT / f"{_PREFIX}.{job}.{os.getpid()}.{secrets.token_hex(8)}"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return _Record(os.getpid(), "", f"{path.parent} cannot be written: {error.strerror}")
    size = torch.ops.tp_shm.file_bytes(SLOT_BYTES)
    try:
        # Reserves the memory, on this rank's node: it is the one that writes there.
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        os.unlink(path)
        reason = "is full" if error.errno == errno.ENOSPC else f"fails: {error.strerror}"
        free = os.statvfs(_ROOT).f_bavail * os.statvfs(_ROOT).f_frsize
        text = f"{_ROOT} {reason}: {size >> 10} KiB a rank are needed, {free >> 10} KiB are free; enlarge it"
        return _Record(os.getpid(), "", text)
    finally:
        os.close(file)
    return _Record(os.getpid(), str(path))


def _remove_stale() -> None:
    """Files of processes that were killed in the moment between creating and removing one."""
    for path in _ROOT.glob(f"{_PREFIX}.*"):
        try:
            pid, age_s = int(path.name.split(".")[-2]), time.time() - path.stat().st_mtime
            if age_s > _STALE_S and not Path(f"/proc/{pid}").exists():
                path.unlink()
        except (OSError, ValueError, IndexError):
            continue  # gone already, or not ours


def _exchange(own: _Record, group: dist.ProcessGroup) -> list[_Record]:
    packed = [torch.empty(_RECORD_BYTES, dtype=torch.uint8) for _ in range(group.size())]
    dist.all_gather(packed, own.pack(), group=group)
    return [_Record.unpack(tensor) for tensor in packed]


def _map(records: list[_Record], group: dist.ProcessGroup, timeout_s: float) -> list[str]:
    """Map every rank's file; why some rank could not (empty: all could)."""
    trouble, name = "", group.group_name
    try:
        paths, pids = [record.path for record in records], [record.pid for record in records]
        torch.ops.tp_shm.attach(name, group.rank(), paths, pids, timeout_s)
    except RuntimeError as error:
        trouble = str(error).splitlines()[0]
    answers = _exchange(_Record(os.getpid(), "", trouble), group)
    troubles = [f"rank {rank}: {answer.trouble}" for rank, answer in enumerate(answers) if answer.trouble]
    if troubles and not trouble:
        torch.ops.tp_shm.detach(name)
    return troubles
