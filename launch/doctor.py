"""tp-launch doctor: what of this host costs a job speed, in one line each, and how to mend it.

Every check is a function of the files below a root and returns one finding. No torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from . import preload
from .sysfs import SysRoot
from .topology import HostTopology, read_topology

_GIB = 1 << 30
_COMPILERS = ("c++", "g++", "clang++")
# Two ranks' collectives and descriptors need some tens of MiB; containers often start with 64 MiB.
_MIN_SHM_BYTES = 256 << 20
_MIN_OPEN_FILES = 4096
_COMPILER_TIMEOUT_S = 10


@dataclass(frozen=True)
class Finding:
    """One line: whether it is fine, what was looked at, what was found, and the way out."""

    good: bool
    subject: str
    found: str
    mend: str = ""

    def line(self) -> str:
        """As printed."""
        mark = "ok  " if self.good else "slow"
        return f"{mark}  {self.subject}: {self.found}" + (
            f"; {self.mend}" if self.mend and not self.good else ""
        )


def examine(sysroot: str | os.PathLike[str] = "/") -> list[Finding]:
    """All findings for the host below `sysroot`. Raises LaunchError where it has no CPU files."""
    topology = read_topology(sysroot)
    root = SysRoot(sysroot)
    return [check(root, topology) for check in _CHECKS]


def _compiler(root: SysRoot, topology: HostTopology) -> Finding:
    path = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if path is None:
        mend = "install g++ (apt-get install g++): without it the slow reference kernels run, uncompiled"
        return Finding(False, "C++ compiler", "none on PATH", mend)
    try:
        done = subprocess.run(
            [path, "-dumpfullversion"], capture_output=True, text=True, timeout=_COMPILER_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(False, "C++ compiler", f"{path} does not run ({error})", "install g++")
    return Finding(True, "C++ compiler", f"{path} {done.stdout.strip()}")


def _libnuma(root: SysRoot, topology: HostTopology) -> Finding:
    try:
        available = ctypes.CDLL("libnuma.so.1").numa_available() >= 0
    except (OSError, AttributeError):
        return Finding(
            True, "libnuma", "not installed; memory is placed by system calls, which does the same"
        )
    return Finding(
        True, "libnuma", "works" if available else "installed; this kernel has no NUMA, so nothing to place"
    )


def _shm(root: SysRoot, topology: HostTopology) -> Finding:
    try:
        size = os.statvfs(root.path("/dev/shm"))
    except OSError:
        return Finding(
            False, "/dev/shm", "not there", "mount a tmpfs on it: collectives fall back to sockets"
        )
    total, free = size.f_frsize * size.f_blocks, size.f_frsize * size.f_bavail
    found = f"{total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free"
    mend = "enlarge it (docker run --shm-size=1g) or remove what killed programs left in it"
    return Finding(free >= _MIN_SHM_BYTES, "/dev/shm", found, mend)


def _ulimits(root: SysRoot, topology: HostTopology) -> Finding:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = f"open files {_limit(files)}, locked memory {_limit(locked)}"
    enough = files == resource.RLIM_INFINITY or files >= _MIN_OPEN_FILES
    return Finding(
        enough, "ulimits", found, f"ulimit -n {_MIN_OPEN_FILES}, or a server of many connections runs out"
    )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _governor(root: SysRoot, topology: HostTopology) -> Finding:
    names = {
        root.read(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor") for cpu in topology.cpus
    } - {None}
    if not names:
        return Finding(True, "CPU governor", "none here (a virtual machine, or the firmware decides)")
    found = ", ".join(sorted(str(name) for name in names))
    # intel_pstate's powersave scales on demand as schedutil does; both ramp up late for short steps.
    mend = "cpupower frequency-set -g performance keeps clocks up between tokens"
    return Finding(names == {"performance"}, "CPU governor", found, mend)


def _huge_pages(root: SysRoot, topology: HostTopology) -> Finding:
    text = root.read("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen is None:
        return Finding(True, "transparent huge pages", "this kernel has none")
    mend = (
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: weights in 4 KiB pages cost TLB misses"
    )
    return Finding(chosen[1] != "never", "transparent huge pages", chosen[1], mend)


def _cpu_features(root: SysRoot, topology: HostTopology) -> Finding:
    text = root.read("/proc/cpuinfo") or ""
    line = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    flags = set(line[1].split()) if line else set()
    wanted = {
        "AVX2": {"avx2"},
        "AVX512": {"avx512f"},
        "VNNI": {"avx512_vnni", "avx_vnni"},
        "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
        "AMX": {"amx_tile"},
        "SVE": {"sve"},
    }
    have = [name for name, any_of in wanted.items() if any_of & flags]
    if not flags:
        return Finding(True, "CPU features", "unknown (no flags in /proc/cpuinfo)")
    mend = "no bf16 instructions: use --dtype fp32 and quantised weights (virtual machines may hide them)"
    return Finding("bf16" in have, "CPU features", " ".join(have) or "none of those looked for", mend)


def _cgroup(root: SysRoot, topology: HostTopology) -> Finding:
    quota, memory = topology.cpu_quota, topology.memory_limit_bytes
    parts = [f"{len(topology.allowed_cpus)} of {len(topology.cpus)} CPUs allowed"]
    parts.append("no CPU quota" if quota is None else f"CPU quota {quota:g}")
    parts.append("no memory limit" if memory is None else f"memory limit {memory / _GIB:.0f} GiB")
    bad = quota is not None and quota < len(topology.allowed_cpus)
    return Finding(
        not bad, "control group", ", ".join(parts), "raise the quota (docker run --cpus) or pass fewer CPUs"
    )


def _swap(root: SysRoot, topology: HostTopology) -> Finding:
    text = root.read("/proc/meminfo") or ""
    values = {name: int(size) for name, size in re.findall(r"^(Swap\w+):\s*(\d+) kB", text, re.MULTILINE)}
    total, free = values.get("SwapTotal", 0), values.get("SwapFree", 0)
    used = (total - free) >> 10
    found = "none" if not total else f"{total >> 20} GiB, {used} MiB in use"
    return Finding(
        used < 64, "swap", found, "swapped-out weights stop every rank: free memory, then swapoff -a"
    )


def _numa_balancing(root: SysRoot, topology: HostTopology) -> Finding:
    on = root.read("/proc/sys/kernel/numa_balancing")
    if len(topology.nodes) < 2 or on in (None, "0"):
        return Finding(True, "automatic NUMA balancing", "off or not needed")
    mend = "sysctl kernel.numa_balancing=0: with --numa pages lie right already and its faults only cost"
    return Finding(False, "automatic NUMA balancing", "on", mend)


def _preloads(root: SysRoot, topology: HostTopology) -> Finding:
    found = preload.find().libraries
    if not found:
        return Finding(True, "allocator", "glibc's (tcmalloc, jemalloc and libiomp5 are not installed)")
    return Finding(True, "allocator and OpenMP", ", ".join(found))


_CHECKS: tuple[Callable[[SysRoot, HostTopology], Finding], ...] = (
    _compiler,
    _libnuma,
    _shm,
    _ulimits,
    _governor,
    _huge_pages,
    _cpu_features,
    _cgroup,
    _swap,
    _numa_balancing,
    _preloads,
)
