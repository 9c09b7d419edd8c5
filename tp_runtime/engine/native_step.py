"""The engine's model as one plan for the C++ kernels, where every layer's weights are on them.

What a plan cannot hold (weights of another kind, other layers) is run through the modules, compiled or
not: the same results, up to the order of sums, with more between the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.distributed as dist
from torch import Tensor, nn

from ..collectives import all_reduce_op
from ..kernels.attention import LANES as ATTENTION_LANES
from ..kernels.linear import PreparedLinear
from ..kernels.step import LayerParts, StepPlan
from ..models.llama import DecoderLayer, Llama, RMSNorm
from ..sharding.layers import RowParallelLinear
from .fused import GatedMLP, JoinedProjections
from .kv_cache import KVCache


def native_step(
    model: Llama, cache: KVCache, group: dist.ProcessGroup, layers: Sequence[int] | None = None
) -> StepPlan | None:
    """A plan of all layers, or of those numbered; None where one has a part that no plan can hold."""
    config = model.config
    if config.head_dim % ATTENTION_LANES:
        return None
    plan = None
    for index in range(config.num_layers) if layers is None else layers:
        layer = _parts(cast(DecoderLayer, model.model.layers[index]), index, model, cache)
        if layer is None:
            return None
        if plan is None:
            kv_heads = cache.shape.num_kv_heads
            q_size = sum(linear.out_features for linear in layer.qkv) - 2 * kv_heads * config.head_dim
            plan = StepPlan(
                _fp32(model.model.norm),
                eps=config.rms_norm_eps,
                scale=config.head_dim**-0.5,
                head_dim=config.head_dim,
                num_heads=q_size // config.head_dim,
                num_kv_heads=kv_heads,
                all_reduce=all_reduce_op(group),
                group=group.group_name if group.size() > 1 else "",
            )
        plan.add_layer(layer)
    return plan


def _parts(layer: DecoderLayer, index: int, model: Llama, cache: KVCache) -> LayerParts | None:
    attention, mlp = layer.self_attn, layer.mlp
    if isinstance(attention.qkv_proj, JoinedProjections):
        qkv: list[nn.Module] = [attention.qkv_proj.joined]
    else:
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    if isinstance(mlp, GatedMLP):
        gate_up: list[nn.Module] = [mlp.gated]
    else:
        gate_up = [mlp.gate_proj, mlp.up_proj]
    (o, o_bias), (down, down_bias) = _row_cut(attention.o_proj), _row_cut(mlp.down_proj)
    linears = [*qkv, o, *gate_up, down]
    if down_bias is not None or not all(_on_kernels(linear) for linear in linears):
        return None
    q_norm, k_norm = attention.q_norm, attention.k_norm
    return LayerParts(
        input_norm=_fp32(layer.input_layernorm),
        post_norm=_fp32(layer.post_attention_layernorm),
        q_norm=None if q_norm is None else _fp32(q_norm),
        k_norm=None if k_norm is None else _fp32(k_norm),
        qkv=cast(list[PreparedLinear], qkv),
        o=cast(PreparedLinear, o),
        o_bias=o_bias,
        gate_up=cast(list[PreparedLinear], gate_up),
        down=cast(PreparedLinear, down),
        keys=cache.keys[index],
        values=cache.values[index],
        scales=cache.scales[index],
        window=model.config.window(index),
    )


def _on_kernels(linear: nn.Module) -> bool:
    return isinstance(linear, PreparedLinear) and linear.prepared.kind == "cpu"


def _row_cut(module: nn.Module) -> tuple[nn.Module, Tensor | None]:
    """The linear inside, and the bias that belongs after the ranks' sum."""
    inner = module.inner if isinstance(module, RowParallelLinear) else module
    bias = module.bias
    return inner, bias.detach() if isinstance(bias, Tensor) else None


def _fp32(norm: nn.Module) -> Tensor:
    return cast(RMSNorm, norm).weight.detach().float().contiguous()
