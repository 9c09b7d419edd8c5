"""Programmatic dependent launch: a step's kernels start before the one ahead of them has ended.

A kernel of a decoding step takes 2 to 100 us, and a start and a drain cost about two of them. So one lets
the next one start before it has ended itself, and waits for the end of the one ahead before it touches what
that may write (Hopper and later; PTX griddepcontrol). Every kernel of a step waits, so when one goes on, all
before it have ended. Before it waits, a kernel may read what no kernel of the step writes: a linear asks the
L2 for its first weights, and so memory works while a small kernel runs.

Not too early: programs of the next kernel are put where there is room, and a linear's crowd onto the
processors that have none of the kernel ahead (docs/log.md). Linears let the next one start after their loop.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def launch_options() -> dict[str, bool]:
    """Keyword arguments of a launch: the kernels' constant PDL, and the launch attribute."""
    if triton.knobs.runtime.interpret or torch.version.hip or torch.cuda.get_device_capability()[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def start_next():
    """Let the next kernel start as soon as every program of this one has come here (or ended)."""
    gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Wait until every kernel before this one has ended."""
    gdc_wait()


@triton.jit
def prefetch_l2(address):
    """Ask the L2 for the lines at the addresses."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
