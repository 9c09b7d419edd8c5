"""Attaching a process group to shared memory: one file in /dev/shm a rank, gone as soon as all have it.

The ranks agree over the process group itself (c10d). Each creates its own file under a name nobody can
guess, sized and paid for at once (so that a full /dev/shm is an answer, not a crash later); all map all of
those of their host; then each removes its own name. Whether ranks share a host is decided by whether they
can open each other's files. From then on nothing but mapped memory is left, which ends with the processes.

Where a rank has no file (a full /dev/shm, no compiler), or no two ranks share a host, all use c10d, and the
reason is said once.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from .. import env, native
from ..errors import KernelBuildError
from . import fakes

SLOT_BYTES = 1 << 20
_ROOT = Path("/dev/shm")
_PREFIX = "tp_runtime"
_RECORD_BYTES = 512
_STALE_S = 600.0
RanksByHost = tuple[tuple[int, ...], ...]  # the group's ranks by host, each ascending
_SOURCES = ("ops.cpp", "group.cpp", "reduce.cpp")


@dataclass(frozen=True)
class _Record:
    """What a rank tells the others: its pid, host and file, or why it cannot take part."""

    pid: int
    path: str
    trouble: str = ""
    host: str = ""

    def pack(self) -> torch.Tensor:
        text = f"{self.pid}\n{self.path}\n{self.host}\n{self.trouble}".encode()[:_RECORD_BYTES]
        return torch.frombuffer(bytearray(text.ljust(_RECORD_BYTES, b"\0")), dtype=torch.uint8)

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> _Record:
        pid, path, host, trouble = (
            bytes(packed.tolist()).rstrip(b"\0").decode(errors="replace").split("\n", 3)
        )
        return cls(int(pid), path, trouble, host)


@cache
def _load() -> None:
    folder = Path(__file__).parent / "src"
    sources = tuple(native.Source(folder / name) for name in _SOURCES)
    native.load(native.Library("tp_shm", sources, tuple(sorted(folder.glob("*.h")))))
    fakes.register()


def local_name(group: dist.ProcessGroup, hosts: RanksByHost) -> str:
    """What the group of this rank's host is called: as `group` where that is all of it."""
    return group.group_name if len(hosts) == 1 else f"{group.group_name}/host"


def attach(group: dist.ProcessGroup, timeout_s: float, host: str = "") -> tuple[RanksByHost, str]:
    """Connect the ranks of each host of `group` through shared memory. All ranks call it together.

    Returns the ranks by host; none, and why, where all will use c10d. timeout_s: how long an operation may
    wait for a peer. host: ranks that give different names never share memory (tests split one host).
    """
    own = replace(_create(), host=host)
    try:
        records = _exchange(own, group)
        trouble = _first(records)
        if trouble:
            return (), trouble
        hosts, trouble = _by_host(_all_visible(records, group))
        if not trouble:
            trouble = _map(records, hosts, group, timeout_s)
        return ((), trouble) if trouble else (hosts, "")
    finally:
        if own.path:
            os.unlink(own.path)


def _first(records: list[_Record]) -> str:
    troubles = [f"rank {rank}: {record.trouble}" for rank, record in enumerate(records) if record.trouble]
    return troubles[0] if troubles else ""


def _all_visible(records: list[_Record], group: dist.ProcessGroup) -> list[list[bool]]:
    """For every rank, whose files it can open."""
    host = records[group.rank()].host
    mine = [record.host == host and os.access(record.path, os.R_OK | os.W_OK) for record in records]
    rows = [torch.empty(group.size(), dtype=torch.uint8) for _ in records]
    dist.all_gather(rows, torch.tensor(mine, dtype=torch.uint8), group=group)
    return [[bool(sees) for sees in row.tolist()] for row in rows]


def _by_host(visible: list[list[bool]]) -> tuple[RanksByHost, str]:
    """Ranks that can open each other's files, by host; or why they form no hosts."""
    ranks = range(len(visible))
    mutual = [tuple(s for s in ranks if visible[r][s] and visible[s][r]) for r in ranks]
    for r in ranks:
        for s in mutual[r]:
            if mutual[s] != mutual[r]:
                return (), f"ranks {r} and {s} see each other's files in {_ROOT}, and not the same others"
    hosts = tuple(mutual[r] for r in ranks if mutual[r] and mutual[r][0] == r)
    if len(hosts) == len(visible):
        return (), f"no two of the {len(visible)} ranks share a {_ROOT}"
    return hosts, ""


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
        # Reserves the memory, on this rank's node. Who writes there, group.cpp says.
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


def _map(records: list[_Record], hosts: RanksByHost, group: dist.ProcessGroup, timeout_s: float) -> str:
    """Map the files of this rank's host; why some rank could not (empty: all could)."""
    ranks = next(ranks for ranks in hosts if group.rank() in ranks)
    trouble, name = "", local_name(group, hosts)
    try:
        if len(ranks) > 1:
            torch.ops.tp_shm.attach(
                name,
                ranks.index(group.rank()),
                [records[r].path for r in ranks],
                [records[r].pid for r in ranks],
                [f"rank {r} of {group.size()}" for r in ranks],
                timeout_s,
            )
    except RuntimeError as error:
        trouble = str(error).splitlines()[0]
    failed = _first(_exchange(_Record(os.getpid(), "", trouble), group))
    if failed and not trouble:
        torch.ops.tp_shm.detach(name)
    return failed
