"""What steps of a few sizes cost, timed before the first answer on the block that nobody reads.

A few steps a size: they only say how cost grows with tokens, see costs.py. All ranks of the runner run them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..kv_blocks import SCRATCH_BLOCK
from ..runner import ModelRunner
from ..step import Row, Step

TARGET_SIZES = (1, 2, 3, 5, 9, 16)
DRAFT_SIZES = (1, 2, 16, 64)  # one token a row, and prompts
_TIMED = 3


def settle(device: str) -> None:
    """Wait until the device has done what it was given, so that a clock says how long that took."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_steps(
    runner: ModelRunner,
    sizes: Sequence[int],
    clock: Callable[[], float],
    layers: Sequence[int] | None = None,
) -> dict[int, float]:
    """Least seconds of a step of one row by its tokens, for those sizes that a step may have.

    Where a larger step took less, the smaller one was disturbed and counts as that. layers: as
    ModelRunner.execute takes them.
    """
    found: dict[int, float] = {}
    for size in (size for size in sizes if size <= runner.max_tokens):
        blocks = (SCRATCH_BLOCK,) * runner.cache.shape.blocks_for(size)
        step = Step((Row((0,) * size, 0, blocks, size if size <= max(TARGET_SIZES) else 1),))
        if runner.device == "cuda":
            runner.execute(step, layers)  # captures
        runs = []
        for _ in range(_TIMED):
            settle(runner.device)
            began = clock()
            runner.execute(step, layers)
            settle(runner.device)
            runs.append(clock() - began)
        found[size] = min(runs)
    return {size: min(s for other, s in found.items() if other >= size) for size in found}
