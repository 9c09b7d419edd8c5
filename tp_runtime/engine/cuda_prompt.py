"""A prompt's layers on a GPU: few operations between the products, the sums over ranks beside other work.

It computes what the model's own forward computes (its slow twin), with the weights of the decoding step. A
sum runs on a stream of its own while the next weight's first rows are widened to bf16, what it gives is
added to the residual stream by the norm that follows, and nothing is copied on the way. Prompts in two
halves, so that one's sum travels while the other is multiplied, were slower (docs/log.md).

Legend: T tokens, H hidden size, N outputs, K inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import start_all_reduce_
from ..kernels.attention import cache_write, paged_attention
from ..kernels.cuda.elementwise import add_rms_norm_, rms_norm
from ..kernels.cuda.linear import row_slices
from ..models.llama import Attention, DecoderLayer, Llama
from .cuda_decode import Layer, Linear, Weights
from .kv_cache import KVCache
from .step import StepTensors

StartSum = Callable[[Tensor], Callable[[], None]]


class PromptPass:
    """The layers of steps of more tokens than the captured step takes, for one rank."""

    def __init__(self, model: Llama, weights: Weights, cache: KVCache, group: dist.ProcessGroup) -> None:
        self.model, self.weights, self.cache, self.group = model, weights, cache, group

    def embed(self, inputs: StepTensors) -> Tensor:
        """What the layers begin with, fp32 [T, H]."""
        return self.model.model.embed_tokens(inputs.tokens_T).float()

    def run(
        self, x_TH: Tensor, inputs: StepTensors, layers: Sequence[int] | None = None,
        start_sum: StartSum | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states after the last norm, [T, H]. Writes the cache. layers: as ModelRunner.execute.

        x_TH: of `embed`; it becomes the residual stream. start_sum: begins a sum over ranks, in place, and
        gives what waits for it; None: NCCL's.
        """
        decoder = self.model.model
        stream = _Stream(x_TH, start_sum or self._start_sum, self.weights.eps)
        angles = self.model.rotary(inputs.positions_T)
        for index in range(len(decoder.layers)) if layers is None else layers:
            layer, module = self.weights.layers[index], cast(DecoderLayer, decoder.layers[index])
            qkv_TN = stream.multiply(layer.qkv, layer.input_norm)
            stream.add(layer.out, self._attend(index, layer, module.self_attn, qkv_TN, angles, inputs))
            gate_TN, up_TN = stream.multiply(layer.gate_up, layer.post_norm).chunk(2, dim=-1)
            stream.add(layer.down, module.mlp.gate(gate_TN, up_TN))
        dtype = getattr(decoder.norm, "dtype", torch.float32)  # the head's
        return stream.normed(self.weights.norm, dtype)

    def _start_sum(self, y_TH: Tensor) -> Callable[[], None]:
        return start_all_reduce_(y_TH, self.group)

    def _attend(
        self, index: int, layer: Layer, attention: Attention, qkv_TN: Tensor,
        angles: tuple[Tensor, Tensor], inputs: StepTensors,
    ) -> Tensor:  # fmt: skip
        """Attention's output, [T, heads * D]."""
        if layer.qkv.bias is not None:
            qkv_TN += layer.qkv.bias
        dim, kv_heads = attention.head_dim, self.cache.shape.num_kv_heads
        heads = qkv_TN.shape[-1] // dim - 2 * kv_heads
        q, k, v = qkv_TN.unflatten(-1, (-1, dim)).split((heads, kv_heads, kv_heads), dim=-2)
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = attention.turn(q, *angles), attention.turn(k, *angles)
        keys, values = self.cache.keys[index], self.cache.values[index]
        cache_write(k, v, keys, values, inputs.slots_T)
        lines = (inputs.block_table_RB, inputs.query_start, inputs.context_lens_R)
        window = self.model.config.window(index)
        return paged_attention(q, keys, values, *lines, dim**-0.5, window).flatten(-2)


class _Stream:
    """The residual stream of one pass, in fp32: what `add` was given is added when it is read next."""

    def __init__(self, x_TH: Tensor, start_sum: StartSum, eps: float) -> None:
        self._x, self._start_sum, self._eps = x_TH, start_sum, eps
        self._added: tuple[Tensor, Tensor | None, Callable[[], None]] | None = None

    def normed(self, norm: Tensor, dtype: torch.dtype) -> Tensor:
        """The stream's norm, [T, H] in dtype, once the sum over ranks has come."""
        if self._added is None:
            return rms_norm(self._x, norm, self._eps, dtype)
        (y_TH, bias, wait), self._added = self._added, None
        wait()
        return add_rms_norm_(self._x, y_TH, bias, norm, self._eps, dtype)

    def multiply(self, linear: Linear, norm: Tensor) -> Tensor:
        """The stream's norm times W^T, [T, N] in bf16, without a bias."""
        return _product(linear, lambda: self.normed(norm, torch.bfloat16))

    def add(self, linear: Linear, x_TK: Tensor) -> None:
        """Begin to add x W^T (+ bias), summed over ranks."""
        y_TH = _product(linear, lambda: x_TK)
        self._added = y_TH, linear.bias, self._start_sum(y_TH)


def _product(linear: Linear, make_x: Callable[[], Tensor]) -> Tensor:
    """x W^T, [T, N] in bf16. make_x: gives x, [T, K] in bf16; called when the first rows of W are there."""
    weight = linear.weight
    y_TN = x_TK = torch.empty(0)
    for first, w_NK in row_slices(weight.tensors, weight.k, weight.group_size):
        if first == 0:
            x_TK = make_x()
            y_TN = torch.empty((len(x_TK), weight.n), dtype=torch.bfloat16, device=x_TK.device)
        torch.mm(x_TK, w_NK.t(), out=y_TN[:, first : first + len(w_NK)])
    return y_TN
