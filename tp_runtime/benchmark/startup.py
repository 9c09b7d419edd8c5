"""compile_cold_s and compile_warm_s: from the start of rank 0's process to its first token, in fresh jobs.

Cold has an empty cache of compiled graphs, warm the cache that cold has filled; the C++ kernels are built
beforehand in both (building is once a host and torch version). Where the layers run as one C++ call nothing
is compiled, and the two differ by the host's file cache and noise alone. Loading the weights is inside.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from .launching import run_ranks


def measure(words: Sequence[str], nproc: int, *, numa: bool, timeout_s: float) -> dict[str, Any]:
    """Both figures of `bench.py WORDS`, a decode, over `nproc` ranks. Raises as run_ranks."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in ("cold", "warm"):
            run = run_ranks(
                [*words, "--first-token"],
                nproc,
                numa=numa,
                timeout_s=timeout_s,
                variables={"TORCHINDUCTOR_CACHE_DIR": folder},
                quiet=True,
            )
            taken.append(float(run["first_token_s"]))
    return {"compile_cold_s": taken[0], "compile_warm_s": taken[1]}


def line(document: dict[str, Any]) -> str:
    """Both figures for people."""
    cold, warm = document["compile_cold_s"], document["compile_warm_s"]
    return f"start to first token: {cold:.1f} s with an empty compile cache, {warm:.1f} s with a filled one"
