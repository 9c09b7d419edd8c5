"""Machines for the launcher's tests: real trees unpacked, synthetic ones written, once a session."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tp_testing import sysfs_writer, trees


@pytest.fixture(scope="session")
def machine() -> Iterator[Callable[[str], Path]]:
    """The root folder of a machine by its name, in trees.NAMES, trees.CAPTURED or sysfs_writer.SYNTHETIC."""
    # In memory where there is room: some trees are 16,000 files.
    in_memory = Path("/dev/shm") if shutil.disk_usage("/dev/shm").free > 1 << 30 else None
    folder = Path(tempfile.mkdtemp(prefix="machines-", dir=in_memory))

    def find(name: str) -> Path:
        if name in (*trees.NAMES, *trees.CAPTURED):
            return trees.extract(name, folder)
        root = folder / name.replace(" ", "_")
        return root if root.exists() else sysfs_writer.write(sysfs_writer.SYNTHETIC[name], root)

    yield find
    shutil.rmtree(folder)
