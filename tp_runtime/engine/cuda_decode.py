"""The decoding step on a GPU: the model's layers for 1 to 16 tokens as a fixed list of kernel launches.

It computes what the model's own forward computes (its slow twin, which prompts still go through), cut at
other places: a layer is qkv, rotary positions with the cache write, attention, output projection, a sum
over ranks with residual and norm, gate and up with SiLU, down projection, and the second such sum. Eight
launches; the weights are read by four of them.

Everything a launch needs lies in tensors that stay where they are, so the list can be captured in a CUDA
graph, and the last kernels write the chosen tokens to where the first ones read them: a graph can be replayed
again and again without the host.

Legend: T tokens, H hidden size, S splits, D head_dim, V this rank's vocabulary, R rows, B blocks of a row.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import cast

import torch
import triton
from torch import Tensor, nn

from ..collectives.push import advance_kernel, choose_kernel, reduce_norm_kernel
from ..collectives.push_group import PushGroup
from ..dependent_launch import launch
from ..kernels.cuda import attention_ops, tokens
from ..kernels.cuda.linear import Tile, choose_tile, launch_gemv
from ..kernels.linear import PreparedWeight
from ..models.llama import DecoderLayer, Llama
from ..quant.embedding import QuantEmbedding
from ..sharding.layers import VocabParallelEmbedding
from .cuda_fuse import packed_weight
from .kv_cache import KVCache
from .residual import ResidualNorm

MOST_TOKENS = 16
_TILED_TOKENS = (1, 8, MOST_TOKENS)  # up to so many tokens a linear has the same tile
RING_STEPS = 64  # steps whose tokens wait to be read
_NORM_COLUMNS = 256  # columns of one program of a sum: one word a thread, so that none waits twice


@dataclass(frozen=True)
class Linear:
    """A weight of the step with its tiles, one for each of _TILED_TOKENS, and its bias."""

    weight: PreparedWeight
    bias: Tensor | None
    tiles: tuple[Tile, ...]
    outputs: int

    def tile(self, count: int) -> Tile:
        """That of a step of `count` tokens."""
        return self.tiles[bisect_left(_TILED_TOKENS, count)]

    @property
    def most_splits(self) -> int:
        return max(tile.splits for tile in self.tiles)


@dataclass(frozen=True)
class Layer:
    """What a layer's launches read. norms: of q and k, or None."""

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    input_norm: Tensor
    post_norm: Tensor
    head_norms: tuple[Tensor, Tensor, float] | None
    window: int


@dataclass(frozen=True)
class Weights:
    """A whole model's. table: the embedding's rows start .. stop, scale: theirs or None."""

    layers: tuple[Layer, ...]
    table: Tensor
    scale: Tensor | None
    start: int
    stop: int
    norm: Tensor
    eps: float
    head: Linear


def _linear(module: nn.Module | None, *, gated: bool = False, split: bool = True) -> Linear | None:
    found = None if module is None else packed_weight(module)
    if found is None:
        return None
    weight, bias = found
    if gated and bias is not None:
        return None
    outputs = weight.n // (2 if gated else 1)
    tiles = tuple(
        choose_tile(weight.tensors[0], weight.k, rows=rows, gated=gated, split=split)
        for rows in _TILED_TOKENS
    )
    return Linear(weight, bias, tiles, outputs)


def _layer(layer: DecoderLayer, window: int) -> Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, out = _linear(attention.qkv_proj), _linear(attention.o_proj)
    gate_up, down = _linear(mlp.gate_up_proj, gated=True), _linear(mlp.down_proj)
    if qkv is None or out is None or gate_up is None or down is None:
        return None
    norms = None
    if attention.q_norm is not None and attention.k_norm is not None:
        q_norm, k_norm = attention.q_norm, attention.k_norm
        norms = (q_norm.weight, k_norm.weight, q_norm.eps)
    input_norm = cast(ResidualNorm, layer.input_layernorm)
    post_norm = cast(ResidualNorm, layer.post_attention_layernorm)
    return Layer(qkv, out, gate_up, down, input_norm.weight, post_norm.weight, norms, window)


def step_weights(model: Llama) -> Weights | None:
    """The weights as this step reads them; None where some of them have no kernel here."""
    embedding: nn.Module = model.model.embed_tokens
    start, stop = 0, model.config.vocab_size
    if isinstance(embedding, VocabParallelEmbedding):
        start, stop, embedding = embedding.start, embedding.stop, embedding.inner
    if isinstance(embedding, QuantEmbedding):
        table, scale = embedding.q, embedding.scale
        if embedding.format.bits != 8 or embedding.format.group_size is not None:
            return None
    else:
        table, scale = cast(nn.Embedding, embedding).weight.detach(), None
    layers = []
    for index, module in enumerate(model.model.layers):
        layer = _layer(cast(DecoderLayer, module), model.config.window(index))
        if layer is None:
            return None
        layers.append(layer)
    head_module = model.lm_head if model.lm_head is not None else _tied_head(table)
    head = _linear(head_module, split=False)
    if head is None or head.bias is not None or not tokens.as_table(table):
        return None
    norm = cast(ResidualNorm, model.model.norm)
    return Weights(tuple(layers), table, scale, start, stop, norm.weight, norm.eps, head)


def _tied_head(table: Tensor) -> nn.Module:
    head = nn.Linear(1, 1, bias=False, device="meta")
    head.weight = nn.Parameter(table, requires_grad=False)
    return head


def pieces_of(hidden_size: int) -> tuple[int, int]:
    """(programs, columns of each) that a sum over ranks of one token is cut into: powers of two."""
    programs = triton.next_power_of_2(triton.cdiv(hidden_size, _NORM_COLUMNS))
    return programs, triton.next_power_of_2(triton.cdiv(hidden_size, programs))


def most_words(hidden_size: int) -> int:
    """32-bit words of the step's largest reduction."""
    programs, columns = pieces_of(hidden_size)
    return MOST_TOKENS * programs * columns


class Inputs:
    """What the host writes before a step, in device memory: one line of words each, and the block table.

    tokens, positions, rows (of the block table), active (1: the position moves on with every replay), and
    the number of the step in the ring, [RING_STEPS, MOST_TOKENS], of chosen tokens.
    """

    def __init__(self, max_rows: int, max_blocks: int, device: str) -> None:
        self.words = torch.zeros((5, MOST_TOKENS), dtype=torch.int32, device=device)
        self.tokens, self.positions, self.rows, self.active, self.step = self.words.unbind(0)
        # The last row is padding's: all scratch.
        self.table = torch.zeros((max_rows + 1, max_blocks), dtype=torch.int32, device=device)
        self.ring = torch.zeros((RING_STEPS, MOST_TOKENS), dtype=torch.int32, device=device)


class DecodeStep:
    """The launches of one step, for one rank."""

    def __init__(
        self, model: Llama, weights: Weights, cache: KVCache, push: PushGroup, inputs: Inputs, *,
        context: int, first_id: int, device: str,
    ) -> None:  # fmt: skip
        """first_id: the id of this rank's first logit. context: positions there may be."""
        self._first_id = first_id
        self.weights, self.cache, self.push, self.inputs = weights, cache, push, inputs
        self.scale = model.config.head_dim**-0.5
        self.hidden_size, self.head_dim = model.config.hidden_size, model.config.head_dim
        self.kv_heads = cache.shape.num_kv_heads
        first = weights.layers[0]
        self.heads = first.qkv.outputs // self.head_dim - 2 * self.kv_heads
        half = self.head_dim // 2
        cos, sin = model.rotary(torch.arange(context, device=device))
        self.cos, self.sin = cos[:, :half].contiguous(), sin[:, :half].contiguous()
        size = self.hidden_size
        self.sums_width, self.columns = pieces_of(size)

        def make(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(count * MOST_TOKENS, dtype=dtype, device=device)

        most_splits = max(each.most_splits for layer in weights.layers for each in (layer.out, layer.down))
        self._part = make(size * most_splits)
        self._qkv = make(first.qkv.outputs * first.qkv.most_splits)
        self._q, self._attended = (make(self.heads * self.head_dim, torch.bfloat16) for _ in range(2))
        self._residual, self._x = make(size), make(size, torch.bfloat16)
        self._sums = make(self.sums_width)
        self._middle = make(first.gate_up.outputs, torch.bfloat16)
        self._logits = make(weights.head.outputs)
        pieces = tokens.num_candidates(weights.head.outputs)
        self._values, self._indices = make(pieces), make(pieces, torch.int32)
        self._pieces = pieces
        self._scratch = attention_ops.DecodeScratch.make(MOST_TOKENS, self.heads, cache.keys[0], context)

    def logits(self, count: int) -> Tensor:
        """fp32 [count, V] of the last step of `count` tokens."""
        vocab = self.weights.head.outputs
        return self._logits[: count * vocab].view(count, vocab)

    def run(self, count: int) -> None:
        """Launch the step for `count` tokens, on the current stream."""
        weights, inputs = self.weights, self.inputs
        size = self.hidden_size
        part = self._part[: count * size].view(1, count, size)
        tokens.embed(inputs.tokens, weights.table, weights.scale, part[0], weights.start, weights.stop)
        op = self._reduce(part, None, weights.layers[0].input_norm, count, op=0, first=True)
        for index, layer in enumerate(weights.layers):
            attended = self._attend(layer, index, count)
            op = self._into_residual(layer.out, attended, layer.post_norm, count, op=op)
            middle = self._gate_up(layer, count)
            last = index + 1 == len(weights.layers)
            norm = weights.norm if last else weights.layers[index + 1].input_norm
            op = self._into_residual(layer.down, middle, norm, count, op=op)
        self._gemv(weights.head, self._x[: count * size].view(count, size), self.logits(count), norm=True)
        self._choose(count, op)

    def _gemv(self, linear: Linear, x: Tensor, y: Tensor, *, norm: bool, gated: bool = False) -> None:
        weight = linear.weight.tensors[0]
        scale, offset = (*linear.weight.tensors[1:], None, None)[:2]
        sums = self._sums[: x.shape[0] * self.sums_width].view(x.shape[0], self.sums_width) if norm else None
        launch_gemv(
            x, weight, scale, offset, sums, y, group_size=linear.weight.group_size, gated=gated,
            eps=self.weights.eps, tile=linear.tile(x.shape[0]), early=not gated,
        )  # fmt: skip

    def _into_residual(self, linear: Linear, x: Tensor, norm: Tensor, count: int, *, op: int) -> int:
        """x W^T, summed over splits and ranks, into the residual, and its norm; the next sum's number."""
        splits = linear.tile(count).splits
        part = self._part[: splits * count * linear.outputs].view(splits, count, linear.outputs)
        self._gemv(linear, x, part, norm=False)
        return self._reduce(part, linear.bias, norm, count, op=op)

    def _reduce(
        self, part: Tensor, bias: Tensor | None, norm: Tensor, count: int, *, op: int, first: bool = False
    ) -> int:
        """The sum over splits and ranks into the residual, and its norm; the number of the next sum."""
        launch(
            reduce_norm_kernel, (count, self.sums_width),
            part, norm if bias is None else bias, self._residual, norm, self._x, self._sums,
            *self.push.arguments, op, self.push.limit_ns, count,
            H=self.hidden_size, BC=self.columns, SPLITS=part.shape[0], FIRST=first, HAS_BIAS=bias is not None,
            num_warps=max(1, min(8, self.columns // 32)),
            **self.push.constants,
        )  # fmt: skip
        return op + 1

    def _attend(self, layer: Layer, index: int, count: int) -> Tensor:
        linear, size = layer.qkv, self.heads * self.head_dim
        splits = linear.tile(count).splits
        qkv = self._qkv[: splits * count * linear.outputs].view(splits, count, linear.outputs)
        x = self._x[: count * self.hidden_size].view(count, self.hidden_size)
        self._gemv(linear, x, qkv, norm=True)
        keys, values = self.cache.keys[index], self.cache.values[index]
        inputs = self.inputs
        where = (inputs.positions, inputs.rows, inputs.table)
        q = self._q[: count * size].view(count, self.heads, self.head_dim)
        attention_ops.rope_write(
            qkv, linear.bias, self.cos, self.sin, layer.head_norms, *where, q, keys, values
        )  # fmt: skip
        attended = self._attended[: count * size].view(count, self.heads, self.head_dim)
        attention_ops.decode_attention(
            q, keys, values, *where, self._scratch, attended, scale=self.scale, window=layer.window
        )
        return attended.view(count, size)

    def _gate_up(self, layer: Layer, count: int) -> Tensor:
        x = self._x[: count * self.hidden_size].view(count, self.hidden_size)
        middle = self._middle[: count * layer.gate_up.outputs].view(count, layer.gate_up.outputs)
        self._gemv(layer.gate_up, x, middle, norm=True, gated=True)
        return middle

    def _choose(self, count: int, op: int) -> None:
        """Each token's likeliest successor: into the ring, and as the next input."""
        inputs, pieces = self.inputs, self._pieces
        values, indices = (
            each[: count * pieces].view(count, pieces) for each in (self._values, self._indices)
        )
        tokens.candidates(self.logits(count), values, indices, self._first_id)
        launch(
            choose_kernel, (count,),
            values, indices, inputs.tokens, inputs.ring, inputs.step, inputs.ring.stride(0), pieces,
            *self.push.arguments, op, self.push.limit_ns,
            BC=triton.next_power_of_2(pieces), num_warps=1,
            **self.push.constants,
        )  # fmt: skip
        launch(
            advance_kernel, (1,),
            self.push.epoch, inputs.step, inputs.positions, inputs.active, op + 1, T=MOST_TOKENS,
            num_warps=1,
        )  # fmt: skip
