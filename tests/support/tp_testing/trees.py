"""Real machines' sysfs trees (tests/data/topologies) and what hwloc makes of them; and captured hosts.

hwloc's text output nests by indentation: the CPUs of a NUMANode are those below its parent (memory-side
caches between the two are looked through). Its XML has each node's CPU set as an attribute.
"""

from __future__ import annotations

import bz2
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

DATA = Path(__file__).parents[2] / "data" / "topologies"
CAPTURES = DATA.parent / "captures"


def _archives(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name.removesuffix(".tar.bz2") for path in folder.glob("*.tar.bz2")))


NAMES, CAPTURED = _archives(DATA), _archives(CAPTURES)
# hwloc was run inside their control groups and shows only what is allowed there.
CGROUP_NAMES = ("16amd64-4n4c-cgroup-distance-merge", "32amd64-4s2n4c-cgroup2")


@dataclass
class HwlocView:
    """Counts, and the CPUs of each NUMA node by its number."""

    packages: int = 0
    cores: int = 0
    cpus: set[int] = field(default_factory=set)
    node_cpus: dict[int, set[int]] = field(default_factory=dict)
    node_cores: dict[int, int] = field(default_factory=dict)


def extract(name: str, folder: Path) -> Path:
    """The tree's root below `folder`, unpacked on first use."""
    target = folder / name
    if not target.exists():
        target.mkdir(parents=True)
        # The tar command takes a second where Python's module takes ten (16,000 files).
        command = ["tar", "xf", "-", "-C", str(target), "--exclude=cpuidle", "--exclude=node/node*/memory*"]
        archive = (CAPTURES if name in CAPTURED else DATA) / f"{name}.tar.bz2"
        subprocess.run(command, input=bz2.decompress(archive.read_bytes()), check=True)
    (root,) = (path for path in target.iterdir() if path.is_dir())
    return root


def hwloc_view(name: str) -> HwlocView:
    """What hwloc says of a tree."""
    console = DATA / f"{name}.console"
    return _from_console(console.read_text()) if console.exists() else _from_xml(DATA / f"{name}.xml")


@dataclass
class _Object:
    kind: str
    number: int
    indent: int
    parent: _Object | None
    cpus: set[int] = field(default_factory=set)
    cores: int = 0


def _from_console(text: str) -> HwlocView:
    stack: list[_Object] = []
    objects: list[_Object] = []
    for line in text.splitlines():
        if line.startswith(("depth", "Special", " depth")):
            break
        found = re.match(r"( *)(\w+)(?:\([^)]*\))? (?:L#\d+ )?\((?:P#(\d+))?", line)
        if not found:
            continue
        indent = len(found[1])
        while stack and stack[-1].indent >= indent:
            stack.pop()
        entry = _Object(found[2], int(found[3] or -1), indent, stack[-1] if stack else None)
        stack.append(entry)
        objects.append(entry)
        for above in stack:
            if entry.kind == "PU":
                above.cpus.add(entry.number)
            if entry.kind == "Core":
                above.cores += 1
    view = HwlocView()
    for entry in objects:
        view.packages += entry.kind == "Package"
        view.cores += entry.kind == "Core"
        if entry.kind == "PU":
            view.cpus.add(entry.number)
        if entry.kind == "NUMANode":
            owner = entry.parent
            while owner is not None and owner.kind in ("MemCache", "MemSideCache"):
                owner = owner.parent
            assert owner is not None
            view.node_cpus[entry.number], view.node_cores[entry.number] = owner.cpus, owner.cores
    return view


def _from_xml(path: Path) -> HwlocView:
    view = HwlocView()
    for entry in ElementTree.parse(path).getroot().iter("object"):
        kind = entry.get("type")
        view.packages += kind == "Package"
        view.cores += kind == "Core"
        if kind == "PU":
            view.cpus.add(int(entry.attrib["os_index"]))
        if kind == "NUMANode":
            words = entry.attrib["cpuset"].split(",")
            value = int("".join(word.removeprefix("0x").rjust(8, "0") or "0" * 8 for word in words), 16)
            number = int(entry.attrib["os_index"])
            view.node_cpus[number] = {bit for bit in range(value.bit_length()) if value >> bit & 1}
    return view
