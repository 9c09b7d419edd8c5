"""Programmatic dependent launch: a step's kernels start before the one ahead of them has ended.

A kernel of a decoding step takes 2 to 100 us, and a start and a drain cost about two of them. So one lets
the next one start before it has ended itself, and waits for the end of the one ahead before it touches what
that may write (Hopper and later; PTX griddepcontrol). In every kernel of a step at least one program waits,
so when one goes on, all before it have ended. Before it waits, a kernel may read what no kernel of the step
writes: a linear asks the L2 for its first weights, attention loads keys and values of earlier steps, and so
memory works while a small kernel runs.

A processor's memory is divided between L1 and shared memory by what it runs, and stays so until it is idle:
beside a small kernel, which by default leaves shared memory little, no program of a linear finds room. So
all kernels of a step ask for as much shared memory as there is.

A start itself takes half a microsecond to one. So a linear before a small kernel (rotation, a sum) lets that
one start at once: its few programs wait beside the linear's. Not so before a linear: its programs are put
where there is room, which is uneven while others run (docs/log.md), so a sum lets the next linear start when
its own wait is over, and gate and up after their loop. That also keeps a step's kernels, from the first qkv
on, behind the end of the step before.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .log import once

# Of the driver's interface (cuda.h): CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent.
_CARVEOUT_ATTRIBUTE = 9
_ALL_SHARED = 100


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Launch a step's kernel, which has a constant PDL. settings: other constants, and Triton's options."""
    options = _options()
    compiled = kernel[grid](*args, **settings, **options)
    if options["PDL"]:
        _ask_for_shared_memory(compiled.function)


@cache
def _ask_for_shared_memory(function: int) -> None:
    """For all launches of the driver's function after this one."""
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuFuncSetAttribute(ctypes.c_void_p(function), _CARVEOUT_ATTRIBUTE, _ALL_SHARED)
    if code != 0:
        once(f"a kernel keeps its division of L1 and shared memory (CUDA error {code}): steps may be slower")


@cache
def _options() -> dict[str, bool]:
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
