"""The slow and obvious twin of quantised weights: what fast rounding and fast linears are tested against.

Legend: N output rows, K input columns, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reference as kernels_reference
from ..layout import WeightFormat
from .tensor import QuantizedTensor


def dequantize(weight: QuantizedTensor) -> Tensor:
    """The fp32 weight [n, k] that `weight` stands for."""
    return kernels_reference.dequantize(
        weight.q,
        weight.scale,
        weight.offset,
        bits=weight.format.bits,
        group_size=weight.format.group_size or 0,
        head=weight.layout.head,
        k=weight.layout.local_shape[1],
    )


def linear(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """x W^T in x's dtype, summed in fp32. x: [..., k]. Returns [..., n]."""
    return F.linear(x.float(), dequantize(weight)).to(x.dtype)


def round_weight(w_NK: Tensor, form: WeightFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """A whole weight rounded group by group: (q [N, K] unpacked, as int16 or fp32; scale; offset or None).

    w_NK: fp32. scale: fp32 [N] per channel, fp16 [N, G] per group, as in quant.tensor. One group of
    columns of one row at a time, in Python: for small weights in tests.
    """
    n, k = w_NK.shape
    size = form.group_size or k
    q_NK = torch.zeros(n, k, dtype=torch.float32 if form.is_float else torch.int16)
    scale_NG = torch.zeros(n, -(-k // size))
    offset_NG = torch.zeros(n, -(-k // size))
    kept = torch.float32 if form.group_size is None else torch.float16
    for row in range(n):
        for group in range(scale_NG.shape[1]):
            values = w_NK[row, group * size : (group + 1) * size]
            q, scale, offset = _round_group(values, form, kept)
            q_NK[row, group * size : (group + 1) * size] = q
            scale_NG[row, group], offset_NG[row, group] = scale, offset
    if form.group_size is None:
        return q_NK, scale_NG[:, 0], None
    return q_NK, scale_NG.half(), offset_NG.half() if form.asymmetric else None


def _round_group(values: Tensor, form: WeightFormat, kept: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, offset) of the values that share one scale; scale and offset in fp32, rounded to `kept`."""
    low, high = values.min(), values.max()
    offset = torch.zeros(())
    if form.is_float:
        scale = torch.maximum(high, -low) / 448
        steps = values / scale if scale != 0 else torch.zeros_like(values)
        return steps.to(torch.float8_e4m3fn).float(), scale, offset
    if form.asymmetric:
        offset, scale, least, most, zero = low, (high - low) / 15, 0, 15, 0
    elif form.bits == 4:
        scale, least, most, zero = (high if high >= -low else low) / -8, 0, 15, 8
    else:
        scale, least, most, zero = torch.maximum(high, -low) / 127, -127, 127, 0
    scale, offset = scale.to(kept).float(), offset.to(kept).float()
    steps = (values - offset) / scale if scale != 0 else torch.zeros_like(values)
    return (steps.round() + zero).clamp(least, most).to(torch.int16), scale, offset
