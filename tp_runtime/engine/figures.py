"""What a run is measured by, defined in one place.

weight_bytes_per_token: the unsharded model's matmul weights and scales at the stated format, a tied
head once, no padding, no copies: what decoding one token must read. mbu = weight_bytes_per_token x
tok_s / read ceiling, the ceiling being what all ranks together read from memory in a plain loop. A
model under CACHE_FACTOR times the last-level cache may live there, so no share of the memory bandwidth
is claimed for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..layout import WeightFormat
from ..sharding.plan import Plan

CACHE_FACTOR = 4


def weight_bytes_per_token(
    plan: Plan, tied: bool, format_of: Callable[[str], WeightFormat | None], dtype_bytes: int
) -> int:
    """See the module. plan: any plan of the model (its whole shapes count). format_of: by parameter name."""
    total = 0
    for weight in plan.weights:
        lookup = weight.name.endswith("embed_tokens.weight") and not tied
        if len(weight.shape) == 2 and not lookup:
            total += weight.whole_bytes(dtype_bytes, format_of(weight.name))
    return total


def last_level_cache_bytes(sysroot: Path = Path("/")) -> int:
    """Bytes of the last-level caches this process may run on, each counted once; 0 where unknown."""
    return sum(last_level_caches(sysroot).values())


def last_level_caches(sysroot: Path = Path("/")) -> dict[str, int]:
    """The same by the CPUs that share each, so that those of several ranks can be joined."""
    caches: dict[str, int] = {}
    for cpu in os.sched_getaffinity(0):
        levels = sorted((sysroot / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"))
        best = (0, "", 0)
        for index in levels:
            try:
                level = int((index / "level").read_text())
                size = (index / "size").read_text().strip().rstrip("\0")
                shared = (index / "shared_cpu_map").read_text().strip()
            except (OSError, ValueError):
                continue
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
            best = max(best, (level, shared, int(size.rstrip("KMG")) * scale))
        caches[best[1]] = best[2]
    return caches


@dataclass(frozen=True)
class Timing:
    """Seconds of one generate call: to the first token of all rows, and from there to the end."""

    ttft_s: float
    decode_s: float
    decoded_tokens: int

    @property
    def tok_s(self) -> float | None:
        """Tokens a second after the first of each row; None where there was no second."""
        return self.decoded_tokens / self.decode_s if self.decoded_tokens and self.decode_s > 0 else None


def peak_rss_bytes() -> int:
    """Most resident memory this process ever had (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
