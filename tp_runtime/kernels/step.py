"""A step's layers as one op of the C++ kernels (cpu/src/step.cpp): nothing but kernels between kernels.

A plan is built once, weight by weight and layer by layer, and keeps what it is given alive. The caller
knows the model; here are only shapes and tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Scales
from .linear import PreparedLinear


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer of this rank.

    Norm weights: fp32 [hidden_size], q_norm and k_norm [head_dim] or None. qkv: one linear that returns
    all three side by side, or three. gate_up: one gated linear, or gate and up. o_bias: added after the
    ranks' sum. keys, values, scales: the layer's cache. window: tokens a query sees (0: all).
    """

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Sequence[PreparedLinear]
    o: PreparedLinear
    o_bias: Tensor | None
    gate_up: Sequence[PreparedLinear]
    down: PreparedLinear
    keys: Tensor
    values: Tensor
    scales: Scales | None
    window: int


class StepPlan:
    """The layers of one rank, ready to run.

    final_norm: fp32 [hidden_size], after the last layer. eps: of all norms. scale: of attention scores.
    num_heads, num_kv_heads: as held here. all_reduce, group: the op that sums over ranks and the name of
    their group; both empty for one rank.
    """

    def __init__(
        self,
        final_norm: Tensor,
        *,
        eps: float,
        scale: float,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        all_reduce: str = "",
        group: str = "",
    ) -> None:
        self._ops = torch.ops.tp_cpu
        self._plan = self._ops.step_new(
            final_norm, eps, scale, head_dim, num_heads, num_kv_heads, all_reduce, group
        )
        weakref.finalize(self, self._ops.step_free, self._plan)

    def add_layer(self, parts: LayerParts) -> None:
        """Append a layer. Its linears are "cpu" ones."""
        # The bias of a row-cut linear is not its own: it is added once, after the sum.
        self._ops.step_add_layer(
            self._plan,
            parts.input_norm,
            parts.post_norm,
            parts.q_norm,
            parts.k_norm,
            [self._add(linear, linear.bias) for linear in parts.qkv],
            self._add(parts.o, None),
            None if parts.o_bias is None else parts.o_bias.float(),
            [self._add(linear, linear.bias) for linear in parts.gate_up],
            self._add(parts.down, None),
            parts.keys,
            parts.values,
            *(parts.scales or (None, None)),
            parts.window,
        )

    def _add(self, linear: PreparedLinear, bias: Tensor | None) -> int:
        p = linear.prepared
        assert p.kind == "cpu", f"a {p.kind!r} weight cannot be part of a step plan"
        bias = None if bias is None else bias.float().contiguous()
        shape = (p.n, p.k, p.bits, p.group_size, p.head, p.asymmetric)
        return self._ops.step_add_weight(
            self._plan, p.tensors[0], p.channel_scale, bias, *shape, p.gated, p.round_activations
        )

    def run(
        self,
        x_TE: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        slots_T: Tensor,
        block_table_RB: Tensor,
        query_start: Tensor,
        context_lens_R: Tensor,
    ) -> Tensor:
        """Take the residual stream (fp32, contiguous) through all layers; the final-normed hidden state.

        The stream is changed in place and the caches are written. cos, sin: fp32. slots: int64. The rest
        as for kernels.attention.paged_attention. Raises as the collective does where a peer is lost.
        """
        return self._ops.step_run(
            self._plan, x_TE, cos_TD, sin_TD, slots_T, block_table_RB, query_start, context_lens_R
        )
