"""Linears of one input, read in one go: q, k and v; gate and up with their product.

Decoding is bound by reading weights, and every kernel start lets the memory idle for a few microseconds:
one read of three weights has one start. Weights are joined block by block after loading, one layer at a
time, so that loading needs no room for two copies. What the kernels cannot join (kernels.linear.join_rows)
stays as it is, which changes speed and no result.

Legend: T leading dims.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.linear import PreparedEmbedding, PreparedLinear, join_rows
from ..models.llama import MLP, Attention, DecoderLayer, Llama
from ..sharding.layers import VocabParallelEmbedding


class JoinedProjections(nn.Module):
    """x -> (q, k, v), from one weight of all their rows."""

    def __init__(self, joined: PreparedLinear, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.joined = joined
        self.sizes = sizes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [..., in_features]. Returns one tensor a projection."""
        return self.joined(x).split(self.sizes, dim=-1)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the product made where gate and up are."""

    def __init__(self, gated: PreparedLinear, down_proj: nn.Module) -> None:
        super().__init__()
        self.gated = gated
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; the same shape back, before the residual sum."""
        return self.down_proj(self.gated(x))


def join_projections(model: Llama) -> None:
    """Join what the kernels can, in place."""
    for layer in model.model.layers:
        decoder = cast(DecoderLayer, layer)
        _join_attention(decoder.self_attn)
        gated = _joined((decoder.mlp.gate_proj, decoder.mlp.up_proj), gated=True)
        if gated is not None:
            # Any module from hidden state to hidden state will do there.
            decoder.mlp = cast(MLP, GatedMLP(gated, decoder.mlp.down_proj))


def share_tied_table(model: Llama, dtype: torch.dtype) -> None:
    """Where the head is the embedding's weight, packed, look tokens up there and drop the other copy."""
    head, embedding = model.lm_head, model.model.embed_tokens
    if not model.config.tie_word_embeddings or not isinstance(head, PreparedLinear):
        return
    if head.prepared.kind != "cpu":
        return
    shared = PreparedEmbedding(head.prepared, dtype)
    if isinstance(embedding, VocabParallelEmbedding):
        embedding.inner = shared
    else:
        setattr(model.model, "embed_tokens", shared)  # noqa: B010  (another class)


def _join_attention(attention: Attention) -> None:
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    joined = _joined(parts, gated=False)
    if joined is not None:
        attention.qkv_proj = JoinedProjections(joined, tuple(part.out_features for part in parts))
        del attention.q_proj, attention.k_proj, attention.v_proj


def _joined(parts: tuple[nn.Module, ...], *, gated: bool) -> PreparedLinear | None:
    linears = [part for part in parts if isinstance(part, PreparedLinear)]
    if len(linears) < len(parts) or len({linear.bias is None for linear in linears}) > 1:
        return None
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if gated and biases:
        return None
    prepared = join_rows([linear.prepared for linear in linears], gated=gated)
    if prepared is None:
        return None
    return PreparedLinear(prepared, torch.cat(biases) if biases else None)
