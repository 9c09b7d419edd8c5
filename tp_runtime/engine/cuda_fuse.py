"""The model's own forward on a GPU in fewer kernels: joined projections, rotary positions, the gate.

A linear of one row takes a few microseconds to start and to drain whatever its size, so one of five
thousand rows beats three. Their packed weights are joined along the output rows and put into the places
that the model leaves for it (Attention.qkv_proj, MLP.gate_up_proj); the separate ones are let go, a layer
at a time. The operations between them are replaced one for one (kernels/cuda/elementwise.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.linear import PreparedWeight, weight_only_linear
from ..models.llama import DecoderLayer, Llama
from ..quant.linear import QuantLinear
from ..sharding.layers import RowParallelLinear
from .device_memory import give_back_where_tight


class FusedLinear(nn.Module):
    """x -> the outputs of several linears, as a tuple. weight: theirs, joined; sizes: rows of each."""

    def __init__(self, weight: PreparedWeight, bias: Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__()
        self._weight = replace(weight, tensors=())
        self._names = [f"packed_{i}" for i in range(len(weight.tensors))]
        for name, tensor in zip(self._names, weight.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.bias: Tensor | None
        self.register_buffer("bias", bias, persistent=False)
        self.sizes = list(sizes)

    @property
    def prepared(self) -> PreparedWeight:
        """The joined weight."""
        return replace(self._weight, tensors=tuple(getattr(self, name) for name in self._names))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [..., K]; one tensor [..., rows] for each part."""
        y = weight_only_linear(x, self.prepared)
        if self.bias is not None:
            y = y + self.bias
        return y.split(self.sizes, dim=-1)


def packed_weight(module: nn.Module) -> tuple[PreparedWeight, Tensor | None] | None:
    """(weight, bias) of a linear as the GPU's kernels take it; None where they do not."""
    if isinstance(module, RowParallelLinear):
        inner = packed_weight(module.inner)
        return None if inner is None else (inner[0], module.bias)
    if isinstance(module, FusedLinear | QuantLinear):
        weight, bias = module.prepared, module.bias
    elif isinstance(module, nn.Linear):
        weight, bias = _plain(module.weight.detach()), module.bias
    else:
        return None
    return (weight, bias) if weight.kind == "cuda" else None


def _plain(weight: Tensor) -> PreparedWeight:
    from ..kernels.cuda.pack import takes

    n, k = weight.shape
    served = weight.dtype == torch.bfloat16 and takes(bits=16, group_size=0, head=0, n=n, k=k)
    kind = "cuda" if served and weight.device.type == "cuda" else "plain"
    return PreparedWeight(kind, n, k, weight.dtype.itemsize * 8, 0, 0, (weight,))


def _joined(modules: Sequence[nn.Module]) -> FusedLinear | None:
    """The modules as one; None where a kernel of ours serves them differently, or not all of them."""
    found = [packed_weight(module) for module in modules]
    parts = [each for each in found if each is not None]
    if len(parts) < len(found) or len({(w.bits, w.group_size, w.asymmetric) for w, _ in parts}) != 1:
        return None
    weights, biases = [w for w, _ in parts], [b for _, b in parts]
    tensors = []
    for at in range(len(weights[0].tensors)):
        each = [weight.tensors[at] for weight in weights]
        # Values are [rows, bytes] and scales [rows] or [pairs, rows]: rows are joined.
        tensors.append(_cat(each, 0 if at == 0 else -1))
    sizes = [weight.n for weight in weights]
    bias = torch.cat([b for b in biases if b is not None]) if biases[0] is not None else None
    return FusedLinear(replace(weights[0], n=sum(sizes), tensors=tuple(tensors)), bias, sizes)


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    """torch.cat, by bytes for 8-bit floats, which not every release joins."""
    if tensors[0].dtype != torch.float8_e4m3fn:
        return torch.cat(tensors, dim=dim)
    return torch.cat([each.view(torch.uint8) for each in tensors], dim=dim).view(torch.float8_e4m3fn)


def fuse_projections(model: Llama) -> None:
    """Join what reads the same input, where the GPU's kernels take it. In place."""
    from ..kernels.cuda import elementwise

    for module in model.model.layers:
        layer = cast(DecoderLayer, module)
        attention, mlp = layer.self_attn, layer.mlp
        mlp.gate = elementwise.silu_mul
        if attention.head_dim & (attention.head_dim - 1) == 0:
            attention.turn = elementwise.turn
        qkv = _joined((attention.q_proj, attention.k_proj, attention.v_proj))
        if qkv is not None:
            attention.qkv_proj = qkv
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, name, None)
        gate_up = _joined((mlp.gate_proj, mlp.up_proj))
        if gate_up is not None:
            mlp.gate_up_proj = gate_up
            for name in ("gate_proj", "up_proj"):
                setattr(mlp, name, None)
        give_back_where_tight()
