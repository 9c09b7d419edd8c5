"""What an ended job leaves in the folder of compiled graphs."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from filelock import FileLock

from tp_runtime.engine.graph_cache import drop_unfinished


def library() -> bytes:
    """A whole shared library: numpy's smallest."""
    found = Path(numpy.__file__).parent.rglob("*.so")
    return min(found, key=lambda path: path.stat().st_size).read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    whole = library()
    for place, (name, data) in enumerate(
        {"whole": whole, "empty": b"", "zeros": bytes(5000), "cut": whole[:-100], "begun": whole[:40]}.items()
    ):
        path = tmp_path / f"{place:02}" / f"{name}.main.so"
        path.parent.mkdir()
        path.write_bytes(data)
    (tmp_path / "locks").mkdir()
    return tmp_path


def left(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in folder.glob("*/*.so")}


def test_what_is_not_whole_is_dropped(folder: Path) -> None:
    assert len(drop_unfinished(folder)) == 4
    assert left(folder) == {"whole"}
    assert drop_unfinished(folder) == []


def test_what_is_being_built_stays(folder: Path) -> None:
    with FileLock(folder / "locks" / "empty.lock"):
        drop_unfinished(folder)
    assert left(folder) == {"whole", "empty"}


def test_a_folder_that_does_not_exist_is_no_error(tmp_path: Path) -> None:
    assert drop_unfinished(tmp_path / "none") == []
