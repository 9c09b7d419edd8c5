"""What stands between a prompt's linears, one kernel each: norm, rotary positions, the gate of an MLP.

PyTorch's own operations, which these replace on GPUs, read and write the activations up to ten times; a
prompt of 2,048 tokens of Llama-70B spent a fifth of its time there. The twins are ResidualNorm.forward,
models.rope.turn and silu(gate) * up.

Legend: T tokens, H heads, D head_dim, N features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x_ptr, added_ptr, bias_ptr, weight_ptr, out_ptr, size, eps,
    ADD: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """With ADD x becomes x + added (+ bias) first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BC)
    inside = column < size
    x = tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(added_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * size + column, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * size + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last dim, in fp32, rounded once to dtype. x: [..., N]."""
    return _rms_norm(x.contiguous(), None, None, weight, eps, dtype)


def add_rms_norm_(
    x: Tensor, added: Tensor, bias: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """x += added + bias, in place, and rms_norm of the sum. x: fp32 [..., N]; added: its shape, bias: [N]."""
    assert x.is_contiguous() and added.is_contiguous() and added.shape == x.shape, (x.shape, added.shape)
    return _rms_norm(x, added, bias, weight, eps, dtype)


def _rms_norm(
    x: Tensor, added: Tensor | None, bias: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    size = x.shape[-1]
    columns = triton.next_power_of_2(size)
    _rms_norm_kernel[(x.numel() // size,)](
        x, x if added is None else added, x if bias is None else bias, weight, out, size, eps,
        ADD=added is not None, HAS_BIAS=bias is not None, BC=columns,
        num_warps=max(1, min(16, columns // 512)),
    )  # fmt: skip
    return out


@triton.jit
def _turn_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_stride, H, HALF: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """One token's heads, BH of them at a time."""
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, HALF)
    angle = token * 2 * HALF + i
    cos_left, cos_right = tl.load(cos_ptr + angle)[None, :], tl.load(cos_ptr + angle + HALF)[None, :]
    sin_left, sin_right = tl.load(sin_ptr + angle)[None, :], tl.load(sin_ptr + angle + HALF)[None, :]
    for start in tl.range(0, H, BH):
        head = start + tl.arange(0, BH)[:, None]
        at, inside = head * 2 * HALF + i[None, :], head < H
        left = tl.load(x_ptr + token * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(x_ptr + token * x_stride + at + HALF, mask=inside, other=0.0).to(tl.float32)
        turned = left * cos_left - right * sin_left
        across = right * cos_right + left * sin_right
        out = out_ptr + token * H * 2 * HALF + at
        tl.store(out, turned.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out + HALF, across.to(out_ptr.dtype.element_ty), mask=inside)


def turn(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """models.rope.turn: every head turned by its token's angles, in fp32, returned in x's dtype.

    x: [T, H, D], where a token's heads lie together. D is a power of two (others: the twin).
    """
    tokens, heads, dim = x_THD.shape
    assert x_THD.stride()[1:] == (dim, 1) and dim & (dim - 1) == 0, (x_THD.shape, x_THD.stride())
    out = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    _turn_kernel[(tokens,)](
        x_THD, cos_TD, sin_TD, out, x_THD.stride(0), heads,
        HALF=dim // 2, BH=min(16, triton.next_power_of_2(heads)), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _silu_mul_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, N, BC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=column < N, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=column < N, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * N + column, value.to(out_ptr.dtype.element_ty), mask=column < N)


def silu_mul(gate_TN: Tensor, up_TN: Tensor) -> Tensor:
    """silu(gate) * up in fp32, rounded once to their dtype. Rows may be strided."""
    tokens, size = gate_TN.shape
    out = torch.empty((tokens, size), dtype=gate_TN.dtype, device=gate_TN.device)
    _silu_mul_kernel[(tokens, triton.cdiv(size, 2048))](
        gate_TN, up_TN, out, gate_TN.stride(0), up_TN.stride(0), size, BC=2048, num_warps=4
    )
    return out
