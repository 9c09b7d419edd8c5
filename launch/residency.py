"""Where ranks' memory really lies: pages by node from /proc/PID/numa_maps, for --verify-placement.

The launcher samples each rank from outside, whatever the rank runs: when its resident size has stopped
growing (weights are loaded) the maps are read once, since reading them walks all page tables. Counted
are resident pages of mappings of 1 MiB and more, libraries and programs left out: weights, cache, arenas.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .sysfs import format_list

_PAGE_BYTES = 4096
# Mappings below this size are code, stacks and small heaps, not weights.
_MIN_MAPPING_BYTES = 1 << 20
_SETTLED_RATIO, _WORTH_RATIO, _NEWS_RATIO = 1.02, 1.1, 2.0
# Loaded is what has not grown for so many looks (a rank may wait a moment for a disk).
_LOADED_LOOKS = 8
_MIN_LOADED_BYTES = 16 << 20


@dataclass(frozen=True)
class Residency:
    """Bytes by node, of one process's large mappings."""

    bytes_by_node: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(size for _, size in self.bytes_by_node)

    def share_on(self, nodes: Iterable[int]) -> float:
        """The share that lies on `nodes`, 0 to 1; 1 where there is nothing."""
        own = set(nodes)
        return (
            sum(size for node, size in self.bytes_by_node if node in own) / self.total if self.total else 1.0
        )


def parse_numa_maps(lines: Iterable[str]) -> Residency:
    """The large mappings in a numa_maps file; libraries and programs are left out."""
    sizes: Counter[int] = Counter()
    for line in lines:
        if re.search(r"file=\S*(\.so|/bin/)", line):
            continue
        page = re.search(r"kernelpagesize_kB=(\d+)", line)
        page_bytes = int(page[1]) * 1024 if page else _PAGE_BYTES
        here = {int(node): int(pages) * page_bytes for node, pages in re.findall(r"\bN(\d+)=(\d+)", line)}
        if sum(here.values()) >= _MIN_MAPPING_BYTES:
            sizes.update(here)
    return Residency(tuple(sorted(sizes.items())))


class Sampler:
    """One rank's residency at its largest settled size."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._previous = 0
        self._sampled_at = 0
        self._settled_looks = 0
        self._told_bytes = 0
        self.residency: Residency | None = None

    def news(self) -> Residency | None:
        """The residency when it is first seen loaded, and again each time it has doubled; else None."""
        found = self.residency
        if found is None or self._settled_looks < _LOADED_LOOKS:
            return None
        if found.total < max(_MIN_LOADED_BYTES, _NEWS_RATIO * self._told_bytes):
            return None
        self._told_bytes = found.total
        return found

    def sample(self) -> None:
        """Look at the resident size, and read the maps if it is settled and larger than when last read."""
        try:
            resident = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
            settled = resident <= self._previous * _SETTLED_RATIO
            self._settled_looks = self._settled_looks + 1 if settled else 0
            if settled and resident > self._sampled_at * _WORTH_RATIO:
                with Path(f"/proc/{self._pid}/numa_maps").open() as maps:
                    found = parse_numa_maps(maps)
                if self.residency is None or found.total > self.residency.total:
                    self.residency = found
                self._sampled_at = resident
        except (OSError, IndexError):
            return  # it has ended, or numa_maps may not be read here
        self._previous = resident


def describe(when: str, rank: int, residency: Residency | None, nodes: tuple[int, ...]) -> str:
    """One line for the user; `when` it was seen: loaded, at the end."""
    if residency is None:
        return (
            f"placement of rank {rank}: not seen (it ended too soon, or /proc/PID/numa_maps cannot be read)"
        )
    spread = ", ".join(f"node {node} {size / 2**20:.0f} MiB" for node, size in residency.bytes_by_node)
    share = residency.share_on(nodes)
    where = f"node{'s' if len(nodes) != 1 else ''} {format_list(nodes)}" if nodes else "no node of its own"
    total = f"{residency.total / 2**20:.0f} MiB"
    return (
        f"placement of rank {rank}, {when}: {share:.1%} of {total} on {where} ({spread or 'none'}; resident "
        "pages of mappings of 1 MiB and more, libraries left out)"
    )
