"""inductor's folder of compiled graphs: what a job that was ended left unfinished there is taken away.

inductor builds a library under its final name, and takes a file of that name for a finished one. So a job
that ends while the linker writes would leave something that no later job can load.
"""

from __future__ import annotations

import struct
from pathlib import Path

from filelock import FileLock, Timeout

from ..log import once

_HEADER_BYTES = 64  # of a 64-bit ELF file


def drop_unfinished(folder: Path) -> list[Path]:
    """Delete libraries below `folder` that are not whole and that nobody is building; the deleted ones."""
    dropped = []
    for library in folder.glob("*/*.so"):
        if _is_whole(library):
            continue
        lock = FileLock(folder / "locks" / f"{library.name.partition('.')[0]}.lock")
        try:
            with lock.acquire(timeout=0):
                if library.exists() and not _is_whole(library):
                    library.unlink()
                    dropped.append(library)
        except (Timeout, OSError):
            continue  # being built, or not ours to delete: whoever loads it will say
    if dropped:
        once(f"{len(dropped)} unfinished file(s) of an earlier job in {folder} are compiled again")
    return dropped


def _is_whole(library: Path) -> bool:
    """False for a file that is empty, begins with zeros, or is shorter than its ELF header says."""
    try:
        with library.open("rb") as file:
            head = file.read(_HEADER_BYTES)
        size = library.stat().st_size
    except OSError:
        return True  # gone meanwhile, or not readable
    if not head.strip(b"\0"):
        return False
    if not head.startswith(b"\x7fELF"):
        return True
    if len(head) < _HEADER_BYTES:
        return False
    (sections,) = struct.unpack_from("<Q", head, 40)
    entry, count = struct.unpack_from("<HH", head, 58)
    return bool(size >= sections + entry * count)
