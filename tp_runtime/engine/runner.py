"""Runs one step through this rank's part of the model: embedding, layers over the cache, logits.

On the CPU kernels all layers are one op (native_step.py). Elsewhere the layer function is the unit of
compilation: all layers share their code, so one compiled graph per shape class (one token; several)
serves them all, and a deep model compiles as fast as a shallow one. The token dimension is dynamic from
two up; rows are padded to one size. So neither a longer context nor another prompt length compiles
anything.

`--kernels reference --no-compile` pads nothing and computes the head on every token before choosing
rows: at world 1 an unpadded prefill then does exactly what the plain model does, bit for bit.

Legend: T tokens of the step, H hidden size, D head dim, L wanted logit rows, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..collectives import collective_errors
from ..kernels.attention import Scales, cache_write, paged_attention
from ..kernels.step import StepPlan
from ..models.llama import Llama
from ..sharding.layers import gather_last_dim
from ..sharding.plan import Ranges
from .kv_blocks import SCRATCH_BLOCK
from .kv_cache import KVCache
from .native_step import native_step
from .step import Row, Step, StepTensors


def _layer_step(
    layer: nn.Module,
    x_TH: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: Scales | None,
    step: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    window: int,
    backend: str,
) -> Tensor:
    """One decoder layer, its attention going through the cache."""
    slots_T, block_table, query_start, context_lens = step

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache_write(k, v, keys, values, slots_T, scales=scales, backend=backend)
        lines = (block_table, query_start, context_lens)
        return paged_attention(q, keys, values, *lines, scale, window, scales=scales, backend=backend)

    return layer(x_TH, cos_TD, sin_TD, attend)


@functools.cache
def _compiled_step(kind: str) -> Callable[..., Tensor]:
    """`_layer_step`, compiled for runners of one kind.

    torch keeps at most eight graphs of a code object and then gives up, so every kind has a copy of its own.
    """
    code = _layer_step.__code__.replace()
    return torch.compile(types.FunctionType(code, _layer_step.__globals__), fullgraph=True)


class ModelRunner:
    """One rank's model and cache.

    model: a Llama whose modules hold this rank's part. group: the tensor-parallel process group. native: the
    plan that runs its layers, if there is one.
    vocab_parts: each rank's ranges of the vocabulary. max_blocks: blocks of the longest row. exact_tokens:
    steps of at most that many tokens are not padded (speculation brings 1 + k, and padding costs).
    min_tokens: shorter steps are padded to that, and so take the code of longer ones.
    """

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        group: dist.ProcessGroup,
        vocab_parts: tuple[Ranges, ...],
        *,
        max_rows: int,
        max_tokens: int,
        max_blocks: int,
        compile: bool,
        reference: bool,
        device: str,
        native: StepPlan | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.group = group
        self.vocab_parts = vocab_parts
        self.max_rows, self.max_tokens, self.max_blocks = max_rows, max_tokens, max_blocks
        self.native = native
        self.pad = native is None and (compile or not reference)
        self.reference = reference
        self.compiled = compile
        self.device = device
        self._angles: tuple[Tensor, Tensor] | None = None  # of every position, made when first needed
        self._plans: dict[tuple[int, ...], StepPlan] = {}
        self.exact_tokens = self.min_tokens = 0
        self._layer: Callable[..., Tensor] = _compiled_step(self._kind()) if compile else _layer_step

    def _kind(self) -> str:
        """All that a compiled layer depends on: runners of one kind share its graphs."""
        dtypes = sorted({str(parameter.dtype) for parameter in self.model.parameters()})
        sizes = (self.max_rows, self.max_blocks, self.cache.num_blocks, self.cache.shape)
        where = (self.device, self.reference, self.group.group_name)
        return repr((self.model, self.model.config, dtypes, sizes, where))

    @property
    def burst_steps(self) -> int:
        """Steps it can run in a row, feeding its own greedy choices to itself; 0: none (see CudaRunner)."""
        return 0

    def start_burst(self, step: Step, steps: int) -> None:
        """Queue such steps. Only where burst_steps is not 0."""
        raise NotImplementedError(f"{type(self).__name__} runs one step at a time")

    def burst_tokens(self, rows: int, steps: int) -> Iterator[list[int]]:
        """The tokens of each step of a burst, one a row."""
        raise NotImplementedError(f"{type(self).__name__} runs one step at a time")

    def warm_up(self) -> None:
        """Compile what decoding and prefill run, on all ranks at once. Writes the scratch block only."""
        if self.compiled:
            for count in (1, 2):
                self.execute(Step((Row((0,) * count, 0, (SCRATCH_BLOCK,), 1),)))

    def _rotary(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        if self.native is None:
            return self.model.rotary(positions_T)
        if self._angles is None:
            self._angles = self.model.rotary(torch.arange(self.max_blocks * self.cache.shape.block_size))
        return self._angles[0][positions_T], self._angles[1][positions_T]

    def _plan_of(self, layers: tuple[int, ...]) -> StepPlan:
        """The plan of some layers; it shares their weights and caches with the plan of all."""
        if layers not in self._plans:
            plan = native_step(self.model, self.cache, self.group, layers)
            assert plan is not None, "all layers fit a plan, so some do"
            self._plans[layers] = plan
        return self._plans[layers]

    def pads(self, step: Step) -> bool:
        """Whether the step is padded to one of a few sizes."""
        return self.pad

    def tensors(self, step: Step) -> StepTensors:
        """The step laid out and padded for this runner."""
        return StepTensors.build(
            step,
            block_size=self.cache.shape.block_size,
            max_blocks=self.max_blocks,
            max_rows=self.max_rows,
            max_tokens=self.max_tokens,
            pad=self.pads(step),
            exact_tokens=self.exact_tokens,
            min_tokens=self.min_tokens,
            device=self.device,
        )

    @torch.inference_mode()
    def execute(self, step: Step, layers: Sequence[int] | None = None) -> Tensor:
        """Run the step; the wanted rows of logits, [L, V] float, whole on every rank. Writes the cache.

        layers: the numbers of those that run, in order; None: all. Raises CollectiveError where a peer is
        lost.
        """
        inputs = self.tensors(step)
        with collective_errors():
            return self._logits(inputs, layers)

    def _logits(self, inputs: StepTensors, layers: Sequence[int] | None) -> Tensor:
        return self._head(self._layers(inputs, layers), inputs)

    def _head(self, hidden_TH: Tensor, inputs: StepTensors) -> Tensor:
        """The wanted logits of all ranks, from hidden states with the last norm."""
        if self.reference:
            local_LV = self.model.head(hidden_TH)[inputs.logit_rows_L]
        else:
            local_LV = self.model.head(hidden_TH[inputs.logit_rows_L])
        return gather_last_dim(local_LV, self.vocab_parts, self.group)[: inputs.num_logits]

    def _layers(self, inputs: StepTensors, layers: Sequence[int] | None) -> Tensor:
        decoder, config = self.model.model, self.model.config
        x_TH = decoder.embed_tokens(inputs.tokens_T)
        if not self.reference:
            x_TH = x_TH.float()
        cos_TD, sin_TD = self._rotary(inputs.positions_T)
        step = (inputs.slots_T, inputs.block_table_RB, inputs.query_start, inputs.context_lens_R)
        if self.native is not None:
            plan = self.native if layers is None else self._plan_of(tuple(layers))
            return plan.run(x_TH, cos_TD, sin_TD, *step)
        if self.compiled and x_TH.shape[0] > 1:
            for tensor in (x_TH, cos_TD, sin_TD, inputs.slots_T):
                torch._dynamo.mark_dynamic(tensor, 0)
        scale, backend = config.head_dim**-0.5, "reference" if self.reference else "auto"
        for index in range(len(decoder.layers)) if layers is None else layers:
            layer = decoder.layers[index]
            cache = (self.cache.keys[index], self.cache.values[index], self.cache.scales[index])
            window = config.window(index)
            x_TH = self._layer(layer, x_TH, cos_TD, sin_TD, *cache, step, scale, window, backend)
            if self.compiled and x_TH.shape[0] > 1:
                torch._dynamo.mark_dynamic(x_TH, 0)
        return decoder.norm(x_TH)
