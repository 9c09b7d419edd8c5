"""Reading sysfs, procfs and cgroup files under a root folder, as old and odd kernels write them.

What naive readers trip over, all seen on real machines: contents that end in NUL bytes, hex masks
with commas where newer kernels have lists, and files that are simply not there. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=4096)  # thousands of CPUs repeat the lists of their few packages
def parse_list(text: str) -> tuple[int, ...]:
    """The numbers of a kernel list such as "0-2,33,45-46", ascending. Raises ValueError for other text."""
    numbers: set[int] = set()
    for part in text.replace("\0", "").strip().split(","):
        part = part.strip()
        if not part:
            continue
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


@lru_cache(maxsize=4096)
def parse_mask(text: str) -> tuple[int, ...]:
    """The numbers of the bits set in a kernel mask such as "000000ff,00000000", ascending."""
    digits = re.sub(r"[\s,\0]", "", text)
    value = int(digits, 16) if digits else 0
    return tuple(bit for bit in range(value.bit_length()) if value >> bit & 1)


def format_list(numbers: Iterable[int]) -> str:
    """Numbers as a kernel list: (0, 1, 2, 33) is "0-2,33", none is ""."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


class SysRoot:
    """Files below `root` by their absolute names on the machine they describe."""

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self.root = Path(root)
        self.is_live = self.root == Path("/")  # the running host, not another one's files
        self._prefix = str(self.root).rstrip("/")

    def path(self, name: str) -> Path:
        """Where the file `name` ("/sys/...") lies."""
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return self.path(name).exists()

    def read(self, name: str) -> str | None:
        """The text without NUL bytes and outer white space; None where it cannot be read."""
        try:
            # Not through pathlib: a host of 2048 CPUs has 15,000 of these files.
            with open(self._prefix + name, "rb") as file:
                return file.read().replace(b"\0", b"").decode("utf-8", "replace").strip()
        except OSError:
            return None

    def read_int(self, name: str, base: int = 10) -> int | None:
        """The number in the file; None where there is none."""
        try:
            return int(self.read(name) or "", base)
        except ValueError:
            return None

    def read_list(self, name: str) -> tuple[int, ...] | None:
        """The numbers of a list file; None where it cannot be read or understood."""
        text = self.read(name)
        try:
            return None if text is None else parse_list(text)
        except ValueError:
            return None

    def read_set(self, *names: str) -> tuple[int, ...] | None:
        """The first of `names` that can be read: a list where the name ends in "list", else a mask."""
        for name in names:
            text = self.read(name)
            if text is None:
                continue
            try:
                return parse_list(text) if name.endswith("list") else parse_mask(text)
            except ValueError:
                continue
        return None

    def numbered(self, folder: str, prefix: str) -> tuple[int, ...]:
        """The numbers N of the entries prefixN of a folder, ascending."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\Z")
        return tuple(sorted(int(m[1]) for m in map(pattern.match, self.listdir(folder)) if m))

    def listdir(self, folder: str) -> tuple[str, ...]:
        """The names in a folder, sorted; none where it cannot be read."""
        try:
            return tuple(sorted(os.listdir(self.path(folder))))
        except OSError:
            return ()
