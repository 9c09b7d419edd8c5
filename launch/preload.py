"""Allocators and OpenMP runtimes that make CPU ranks faster, where they are installed.

glibc's allocator returns large blocks to the kernel and faults them in again; tcmalloc and jemalloc
keep them. libiomp5 wakes its threads faster than libgomp; it spins for 200 ms after each region unless
told otherwise, which would starve the collectives' threads. Nothing is installed or searched beyond
the usual folders, and what is used stands in the plan. No torch.
"""

from __future__ import annotations

import glob
import os
import platform
import sys
from dataclasses import dataclass

# The first of each group that is found is taken.
_ALLOCATORS = ("libtcmalloc_minimal.so*", "libtcmalloc.so*", "libjemalloc.so*")
_OPENMP = ("libiomp5.so",)
_SPIN_MS = 1


@dataclass(frozen=True)
class Preload:
    """Libraries for LD_PRELOAD, by path, and the variables that go with them."""

    libraries: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def environment(self, already: str | None) -> dict[str, str]:
        """The variables of a rank, with the user's own LD_PRELOAD kept last."""
        if not self.libraries:
            return {}
        return {
            "LD_PRELOAD": ":".join((*self.libraries, *((already,) if already else ()))),
            **dict(self.variables),
        }


def folders() -> tuple[str, ...]:
    """Where libraries are looked for, in this order."""
    machine = platform.machine()
    return (
        os.path.join(sys.prefix, "lib"),
        f"/usr/lib/{machine}-linux-gnu",
        f"/lib/{machine}-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
        "/opt/intel/oneapi/compiler/latest/lib",
    )


def find(where: tuple[str, ...] | None = None) -> Preload:
    """What is installed in the folders `where` (None: the usual ones)."""
    allocator = _first(_ALLOCATORS, where if where is not None else folders())
    openmp = _first(_OPENMP, where if where is not None else folders())
    variables = (("KMP_BLOCKTIME", str(_SPIN_MS)),) if openmp else ()
    return Preload(tuple(path for path in (allocator, openmp) if path), variables)


def _first(patterns: tuple[str, ...], where: tuple[str, ...]) -> str | None:
    for pattern in patterns:
        for folder in where:
            found = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
            if found:
                return found[0]
    return None
