"""This host's topology files as a tar archive, for a bug report and for --sysroot elsewhere.

Only what the topology reader and the doctor read: CPU, node and GPU files, control-group limits, the
mount table. Nothing that names users, programs, the network or a part's serial number. No torch.
"""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path, PurePosixPath

from ..errors import LaunchError
from . import cgroups, pci
from .sysfs import SysRoot

_TREES = (
    ("/sys/devices/system/cpu", ("online", "possible", "present", "offline")),
    ("/sys/devices/system/node", ("online", "possible", "has_cpu", "has_memory")),
)
_CPU_FILES = (
    *("online", "cpu_capacity"),
    *("cpufreq/base_frequency", "cpufreq/cpuinfo_max_freq", "cpufreq/scaling_governor"),
)
_CACHE_FILES = ("level", "type", "shared_cpu_list", "shared_cpu_map", "size")
_NODE_FILES = ("cpulist", "cpumap", "distance", "meminfo")
_GROUP_FILES = (
    *("cpuset.cpus.effective", "cpuset.mems.effective", "cpuset.effective_cpus", "cpuset.effective_mems"),
    *("cpuset.cpus", "cpuset.mems", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"),
    *("memory.max", "memory.limit_in_bytes"),
)
_HUGE_PAGES = "/sys/kernel/mm/hugepages"
_SINGLE_FILES = (
    *("/proc/self/cgroup", "/proc/self/cpuset", "/proc/meminfo", "/sys/devices/cpu_atom/cpus"),
    *("/proc/sys/kernel/numa_balancing", "/sys/kernel/mm/transparent_hugepage/enabled"),
)


def write(path: Path, root: SysRoot | None = None) -> int:
    """Write the archive; the number of files in it. Raises LaunchError where it cannot be written."""
    root = root or SysRoot()
    texts = {name: text for name in _names(root) if (text := root.read(name)) is not None}
    texts |= _without_names(root)
    mounts = [
        line
        for line in (root.read("/proc/self/mounts") or root.read("/proc/mounts") or "").splitlines()
        if line.split()[2:3] and line.split()[2] in ("cgroup", "cgroup2", "cpuset")
    ]
    texts["/proc/mounts"] = "\n".join(mounts)
    status = (root.read("/proc/self/status") or "").splitlines()
    texts["/proc/self/status"] = "\n".join(line for line in status if "_allowed_list:" in line)
    links = {name: target for name in _device_links(root) if (target := _link(root, name)) is not None}
    top = PurePosixPath(path.name.partition(".")[0] or "host")
    try:
        with tarfile.open(path, "w") as archive:
            for name, text in sorted(texts.items()):
                member = tarfile.TarInfo(str(top / name.lstrip("/")))
                data = text.encode() + b"\n"
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            for name, target in sorted(links.items()):
                member = tarfile.TarInfo(str(top / name.lstrip("/")))
                member.type, member.linkname = tarfile.SYMTYPE, target
                archive.addfile(member)
    except OSError as error:
        raise LaunchError(
            f"--capture {path}: {error.strerror}; give a file in a folder that can be written"
        ) from None
    return len(texts) + len(links)


def _names(root: SysRoot) -> list[str]:
    names = [f"{folder}/{name}" for folder, files in _TREES for name in files] + list(_SINGLE_FILES)
    names += [f"{_HUGE_PAGES}/{size}/nr_hugepages" for size in root.listdir(_HUGE_PAGES)]
    cpu_folder, node_folder = (folder for folder, _ in _TREES)
    for cpu in root.numbered(cpu_folder, "cpu"):
        folder = f"{cpu_folder}/cpu{cpu}"
        names += [f"{folder}/{name}" for name in _CPU_FILES]
        names += [f"{folder}/topology/{name}" for name in root.listdir(f"{folder}/topology")]
        for index in root.numbered(f"{folder}/cache", "index"):
            names += [f"{folder}/cache/index{index}/{name}" for name in _CACHE_FILES]
    for node in root.numbered(node_folder, "node"):
        folder = f"{node_folder}/node{node}"
        names += [f"{folder}/{name}" for name in _NODE_FILES]
        names += [f"{folder}/hugepages/{size}/nr_hugepages" for size in root.listdir(f"{folder}/hugepages")]
    for folder in cgroups.group_folders(root):
        names += [f"{folder}/{name}" for name in _GROUP_FILES]
    for device in pci.device_folders(root):
        names += [f"{device}/{name}" for name in ("vendor", "class", "numa_node")]
    return names


def _without_names(root: SysRoot) -> dict[str, str]:
    """The lines that are read of files that also hold serial numbers: CPU features, GPU device numbers."""
    texts = {}
    features = re.search(r"^(flags|Features)\s*:.*$", root.read("/proc/cpuinfo") or "", re.MULTILINE)
    if features:
        texts["/proc/cpuinfo"] = features[0]
    for gpu in pci.read_gpus(root):
        name = pci.information_file(gpu.address)
        minor = re.search(r"^Device Minor:\s*(\d+)", root.read(name) or "", re.MULTILINE)
        if minor:
            # The device file's presence is what counts.
            texts |= {name: minor[0], f"/dev/nvidia{minor[1]}": ""}
    return texts


def _device_links(root: SysRoot) -> list[str]:
    return [f"{pci.DEVICES}/{PurePosixPath(device).name}" for device in pci.device_folders(root)]


def _link(root: SysRoot, name: str) -> str | None:
    path = root.path(name)
    return str(path.readlink()) if path.is_symlink() else None
