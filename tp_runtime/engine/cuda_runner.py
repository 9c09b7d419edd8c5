"""One rank's model on a GPU: prompts (cuda_prompt_graphs.py), and decoding through captured graphs.

A step of at most 16 tokens, one or a few a row, is a replay of a CUDA graph: the host writes some words
(tokens, positions, block numbers), and reads logits or tokens. The graph of a size is captured when the first
step of that size comes, by all ranks at once, since they run the same steps.

Greedy rows need no logits on the host: the graph itself chooses the likeliest token over all ranks and
feeds it to the next replay. `burst` queues several replays and hands out the tokens as they come, so that
the host is never in the way: the one wait a token needs is for showing it.

Legend: L wanted rows of logits, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..collectives import all_reduce, collective_errors
from ..collectives.push_group import PushGroup, connect
from ..log import once
from ..sharding.layers import gather_last_dim
from .cuda_decode import MOST_TOKENS, RING_STEPS, DecodeStep, Inputs, Weights, most_words, step_weights
from .cuda_prompt import PromptPass
from .cuda_prompt_graphs import PromptGraphs
from .kv_blocks import SCRATCH_BLOCK
from .runner import ModelRunner
from .step import Row, Step

BURST_STEPS = 16


def graph_size(num_tokens: int) -> int:
    """Tokens of the graph that takes a step: as many, or one more of 9 to 16.

    A padded token costs: linears read its x in every program, attention and sums do its work.
    """
    return num_tokens if num_tokens <= 8 else num_tokens + num_tokens % 2


class CudaRunner(ModelRunner):
    """ModelRunner with a captured decoding step. Its arguments are ModelRunner's.

    timeout_s: how long a reduction inside a graph may wait for a peer.
    """

    def __init__(self, *args: Any, timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "compile": False})
        self.pad = False
        self._decode: DecodeStep | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        weights = step_weights(self.model) if not self.reference else None
        served = torch.tensor([int(weights is not None)], dtype=torch.int32)
        if not int(all_reduce(served, self.group, "min")) or weights is None:
            once("this model has weights that the GPU's decoding step cannot read: it decodes layer by layer")
            return
        hidden = self.model.config.hidden_size
        words = max(most_words(hidden), PromptGraphs.words(hidden, self.max_tokens))
        push = connect(self.group, self.device, max_words=words, timeout_s=timeout_s)
        if push is not None:
            self._prepare(weights, push)

    def _prepare(self, weights: Weights, push: PushGroup) -> None:
        self._inputs = Inputs(self.max_rows, self.max_blocks, self.device)
        first_id = self.vocab_parts[self.group.rank()][0][0]
        self._decode = DecodeStep(
            self.model, weights, self.cache, push, self._inputs,
            context=self.max_blocks * self.cache.shape.block_size, first_id=first_id, device=self.device,
        )  # fmt: skip
        prompt = PromptPass(self.model, weights, self.cache, self.group)
        self._prompts = PromptGraphs(prompt, push, self.group)
        self._push = push
        self._host_words = torch.zeros_like(self._inputs.words, device="cpu").pin_memory()
        self._host_table = torch.zeros_like(self._inputs.table, device="cpu").pin_memory()
        self._host_ring = torch.zeros_like(self._inputs.ring, device="cpu").pin_memory()
        self._host_status = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._written = torch.cuda.Event()  # the host's words have been read
        self._events = [torch.cuda.Event() for _ in range(RING_STEPS)]

    @property
    def burst_steps(self) -> int:
        """Most steps of a burst; 0 where there are none."""
        return 0 if self._decode is None else BURST_STEPS

    def warm_up(self) -> None:
        """Compile the kernels and capture one-token decoding. All ranks together; writes scratch only."""
        for count in (32, 1):
            self.execute(Step((Row((0,) * count, 0, (SCRATCH_BLOCK,), 1),)))

    def pads(self, step: Step) -> bool:
        """As ModelRunner's: prompts that may be captured are."""
        served = step.num_tokens > MOST_TOKENS and PromptGraphs.serves(step.num_tokens)
        return self._decode is not None and served

    @torch.inference_mode()
    def execute(self, step: Step, layers: Sequence[int] | None = None) -> Tensor:
        """As ModelRunner.execute; all layers of a few tokens are the captured graph."""
        if self._decode is None or (layers is not None and step.num_tokens <= MOST_TOKENS):
            return super().execute(step, layers)
        if step.num_tokens > MOST_TOKENS:
            inputs = self.tensors(step)
            with collective_errors():
                hidden_TH = self._prompts.run(inputs, layers)
                self._host_status.copy_(self._push.status, non_blocking=True)
                return self._head(hidden_TH, inputs)
        self._replay(self._fill(step, moving=False), 1)
        wanted: list[int] = []
        at = 0
        for row in step.rows:
            at += len(row.tokens)
            wanted += range(at - row.num_logits, at)
        local_LV = self._decode.logits(step.num_tokens)
        if len(wanted) < step.num_tokens:
            local_LV = local_LV[wanted]
        with collective_errors():
            logits_LV = gather_last_dim(local_LV, self.vocab_parts, self.group)
        return logits_LV if self.group.size() > 1 else logits_LV.clone()

    @torch.inference_mode()
    def start_burst(self, step: Step, steps: int) -> None:
        """Queue `steps` steps: the one described, of one token a row, and those its likeliest tokens begin.

        The rows' blocks hold all of them. At most burst_steps and MOST_TOKENS rows.
        """
        assert step.num_tokens == len(step.rows) and steps <= self.burst_steps, (step, steps)
        self._replay(self._fill(step, moving=True), steps)

    def burst_tokens(self, rows: int, steps: int) -> Iterator[list[int]]:
        """The tokens of each queued step, one a row, as they come."""
        for at in range(steps):
            self._events[at].synchronize()
            if int(self._host_status):
                self._push.check()
            yield self._host_ring[at, :rows].tolist()

    def _fill(self, step: Step, *, moving: bool) -> int:
        """Write a step into the inputs; the size of the graph that takes it."""
        self._written.synchronize()
        if int(self._host_status):
            self._push.check()
        size = max(graph_size(step.num_tokens), self.min_tokens)
        words = self._host_words.numpy()
        words[:] = 0
        words[2] = self.max_rows  # padding: the row of scratch blocks
        at = 0
        for number, row in enumerate(step.rows):
            stop = at + len(row.tokens)
            words[0, at:stop] = row.tokens
            words[1, at:stop] = range(row.start, row.start + len(row.tokens))
            words[2, at:stop] = number
            words[3, at:stop] = int(moving)
            self._host_table.numpy()[number, : len(row.blocks)] = row.blocks
            at = stop
        self._inputs.words.copy_(self._host_words, non_blocking=True)
        self._inputs.table.copy_(self._host_table, non_blocking=True)
        self._written.record()
        return size

    def _replay(self, size: int, steps: int) -> None:
        graph = self._graphs.get(size) or self._capture(size)
        for at in range(steps):
            graph.replay()
            self._host_ring[at].copy_(self._inputs.ring[at], non_blocking=True)
            self._host_status.copy_(self._push.status, non_blocking=True)
            self._events[at].record()

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """The graph for `size` tokens. Kernels run once before: a capture can load no code.

        The run before is a real one of the step that is in the inputs, whose effects the replay repeats: it
        writes the same cache slots and moves positions and tokens, so the inputs are written anew.
        """
        assert self._decode is not None
        once(f"capturing the decoding step of {size} tokens", logging.DEBUG)
        self._decode.run(size)
        self._inputs.words.copy_(self._host_words)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode.run(size)
        self._graphs[size] = graph
        return graph
