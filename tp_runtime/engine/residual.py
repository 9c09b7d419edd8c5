"""Activations between the weights: what the layers compute in, and the residual stream in fp32.

Every layer adds twice to the stream. Kept in bf16, each sum is rounded to 8 bits of a value that grows
with depth; in fp32 the stream costs a few kilobytes a token and no weight byte. Norms read it and hand
the layers their own type. On CPUs the layers compute in fp32 throughout: their kernels widen the weights
anyway, decoding reads no byte more, and what is left of the error is the weights' (SmolLM2 as int8, mean
logit error against fp32: 0.03; with bf16 activations 0.10-0.12). Prefill's linears round to bf16 all the
same, which the matrix units want (kernels.linear.PreparedWeight.round_activations).
The reference path does not use this: there the model runs exactly as written.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.linear import PreparedLinear
from ..models.llama import DecoderLayer, Llama, RMSNorm


class ResidualNorm(nn.Module):
    """RMSNorm of an fp32 stream, all in fp32, rounded once to `dtype`."""

    weight: Tensor

    def __init__(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", norm.weight.detach().float(), persistent=False)
        self.eps = norm.eps
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: fp32 [..., size]; the same shape in `dtype`."""
        if x.is_cuda:
            from ..kernels.cuda.elementwise import rms_norm

            return rms_norm(x, self.weight, self.eps, self.dtype)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * scale * self.weight).to(self.dtype)


def keep_residual_in_fp32(model: Llama, dtype: torch.dtype, device: str) -> None:
    """Replace the norms that read the stream. The caller makes the embedding's output fp32.

    dtype: of plain weights. A head on the weight-only kernels gives fp32 logits on every device: bf16
    knows no number between 16 and 16.125, and near-ties are decided there.
    """
    head_dtype = torch.float32 if isinstance(model.lm_head, PreparedLinear) else dtype
    layers = [cast(DecoderLayer, layer) for layer in model.model.layers]
    if device == "cpu" and isinstance(layers[0].self_attn.q_proj, PreparedLinear):
        dtype = torch.float32
    for layer in layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, ResidualNorm(getattr(layer, name), dtype))
    setattr(model.model, "norm", ResidualNorm(model.model.norm, head_dtype))  # noqa: B010  (another class)
