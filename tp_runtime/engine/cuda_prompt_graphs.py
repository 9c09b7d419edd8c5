"""Prompt passes of few tokens as CUDA graphs, with sums that are pushed.

A pass is some 20 launches a layer, which take the host most of a millisecond; for few tokens a GPU needs
less. So passes of up to MOST_CAPTURED tokens are padded to a power of two, and each size is captured when it
comes for the second time: the first has loaded its kernels, which a capture cannot. Captured or not, they
compute the same bits: their sums over ranks go through the push kernels, some tokens at a time. More tokens
go layer by layer, with NCCL beside the next weight (cuda_prompt.py).

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import all_reduce
from ..collectives.push_group import PushGroup
from ..log import once
from .cuda_prompt import PromptPass
from .step import StepTensors

MOST_CAPTURED = 512
_PUSHED = 256  # tokens of one sum: it takes memory for each of them, twice a rank


@dataclass(frozen=True)
class _Captured:
    """A graph, where it reads, and the hidden states it leaves."""

    graph: torch.cuda.CUDAGraph
    x_TH: Tensor
    inputs: StepTensors
    hidden_TH: Tensor

    def replay(self, x_TH: Tensor, inputs: StepTensors) -> Tensor:
        self.x_TH.copy_(x_TH)
        for mine, its in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            mine.copy_(its)
        self.graph.replay()
        return self.hidden_TH


def _tensors(inputs: StepTensors) -> list[Tensor]:
    """Those that layers read."""
    values = vars(inputs).items()
    return [value for name, value in values if isinstance(value, Tensor) and name != "logit_rows_L"]


def _copied(inputs: StepTensors) -> StepTensors:
    values: dict[str, Any] = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(inputs).items()
    }
    return StepTensors(**values)


class PromptGraphs:
    """The passes of one rank's PromptPass. All ranks run the same ones in the same order."""

    def __init__(self, prompt: PromptPass, push: PushGroup, group: dist.ProcessGroup) -> None:
        self._prompt, self._push, self._group = prompt, push, group
        self._seen: set[int] = set()
        self._graphs: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._full = False

    @staticmethod
    def words(hidden_size: int, max_tokens: int) -> int:
        """32-bit words of the largest sum."""
        return min(_PUSHED, max_tokens) * hidden_size // 2

    @staticmethod
    def serves(num_tokens: int) -> bool:
        """Whether steps of so many tokens are padded, and may be captured."""
        return num_tokens <= MOST_CAPTURED

    def run(self, inputs: StepTensors, layers: Sequence[int] | None = None) -> Tensor:
        """As PromptPass.run. Inputs of a size that it serves are padded (StepTensors.build)."""
        x_TH = self._prompt.embed(inputs)
        size = len(x_TH)
        if not self.serves(size):
            return self._prompt.run(x_TH, inputs, layers)
        if layers is None and size not in self._graphs and size in self._seen and not self._full:
            self._capture(size, x_TH, inputs)
        if layers is None and size in self._graphs:
            return self._graphs[size].replay(x_TH, inputs)
        self._seen.add(size)
        return self._pushing(x_TH, inputs, layers)

    def _pushing(self, x_TH: Tensor, inputs: StepTensors, layers: Sequence[int] | None = None) -> Tensor:
        """The pass with pushed sums, which are over when the next operation begins."""
        sums = 0

        def start_sum(y_TH: Tensor) -> Callable[[], None]:
            nonlocal sums
            for part_TH in y_TH.split(_PUSHED) if self._push.world_size > 1 else ():
                self._push.all_reduce(part_TH, part_TH, op=sums)
                sums += 1
            return lambda: None

        hidden_TH = self._prompt.run(x_TH, inputs, layers, start_sum)
        self._push.advance(sums)
        return hidden_TH

    def _capture(self, size: int, x_TH: Tensor, inputs: StepTensors) -> None:
        """The graph of passes of `size` tokens, if it fits every rank's memory."""
        once(f"capturing the pass of {size} tokens", logging.DEBUG)
        graph, captured = torch.cuda.CUDAGraph(), None
        try:
            x_TH, inputs = x_TH.clone(), _copied(inputs)
            # The watchdog of NCCL may ask for events meanwhile, in a thread of its own.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                hidden_TH = self._pushing(x_TH, inputs)
            captured = _Captured(graph, x_TH, inputs, hidden_TH)
        except torch.OutOfMemoryError as error:
            once(f"capturing the pass of {size} tokens failed: {error}", logging.DEBUG)
        made = torch.tensor([int(captured is not None)], dtype=torch.int32)
        if not int(all_reduce(made, self._group, "min")) or captured is None:
            self._full = True
            once(
                f"prompts of up to {MOST_CAPTURED} tokens go layer by layer, which is slower: a GPU has no "
                "memory left to capture them; a smaller --context leaves some"
            )
            return
        self._graphs[size] = captured
