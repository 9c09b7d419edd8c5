"""From floating point to int8 and int4: round to nearest, the same values at every world size.

What is rounded is always decided by the whole weight: an int8 per-channel scale comes from the whole
row's largest magnitude, which ranks that hold pieces of a row combine before rounding (max is exact, so
order cannot matter), and a group's scale comes from all columns of the group, also those a neighbour
holds. Everything else is element-wise IEEE arithmetic in fp32, so pieces put together equal the whole
byte for byte, on the CPU and on a GPU.

Rules (m is the group's value of largest magnitude, with its sign; ties take the positive one):
- int8 per channel: scale = |m| / 127 in fp32.
- fp8 per channel: scale = |m| / 448 in fp32, values rounded to the nearest e4m3.
- int8 groups: scale = |m| / 127, as GGML's Q8_0.
- int4 symmetric: scale = m / -8, as Q4_0: the larger side of an asymmetric group uses all of its range.
- int4 asymmetric: offset = min, scale = (max - min) / 15, as Q4_1.
Group scales and offsets are kept in fp16, and values are rounded against the kept fp16 numbers rather
than the fp32 ones before them (GGML does the latter), which makes the error no larger and mostly smaller.

Legend: N output rows, K input columns held here, C input columns of all touched groups, G groups,
S columns of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..layout import WeightFormat, WeightLayout
from .tensor import QuantizedTensor, pack_nibbles


def row_absmax(w_NK: Tensor) -> Tensor:
    """Each row's largest magnitude, fp32 [N]; inf where the row holds a NaN, 0 where it has no columns.

    The statistic that ranks holding pieces of the same rows combine with max before `quantize`.
    """
    if w_NK.shape[1] == 0:
        return torch.zeros(w_NK.shape[0], dtype=torch.float32, device=w_NK.device)
    return w_NK.abs().amax(dim=1).float().nan_to_num(nan=torch.inf, posinf=torch.inf)


def quantize(w_NC: Tensor, layout: WeightLayout, absmax_N: Tensor | None = None) -> QuantizedTensor:
    """The quantised form of the part of a weight that `layout` describes.

    w_NC: floating point, the layout's rows and its covering columns (layout.covering_cols for a grouped
    format, layout.cols for a per-channel one). absmax_N: fp32, the largest magnitude of each whole row,
    for a per-channel format; by default that of w_NC, right where the part holds whole rows.
    Raises CheckpointError where a value is not finite, or too large for an fp16 scale.
    """
    form = layout.format
    assert form is not None, "a plain weight is not quantised"
    if form.group_size is None:
        assert w_NC.shape == layout.local_shape, f"{tuple(w_NC.shape)} values for {layout}"
        return _per_channel(w_NC, layout, row_absmax(w_NC) if absmax_N is None else absmax_N)
    c0, c1 = layout.covering_cols
    assert w_NC.shape == (layout.local_shape[0], c1 - c0), f"{tuple(w_NC.shape)} values for {layout}"
    k = layout.local_shape[1]
    pieces = [_group_values(part_NGS, form) for part_NGS in _grouped(w_NC.float(), layout.group_size)]
    if not pieces:
        return QuantizedTensor.empty(layout, w_NC.device)
    q_NC, scale_NG, offset_NG = (_joined(column) for column in zip(*pieces, strict=True))
    _require_finite(scale_NG)
    _require_finite(offset_NG)
    q_NK = q_NC[:, layout.head : layout.head + k]
    q = q_NK.contiguous() if form.bits == 8 else pack_nibbles(q_NK)
    return QuantizedTensor(layout, q, scale_NG, offset_NG if form.asymmetric else None)


def _per_channel(w_NK: Tensor, layout: WeightLayout, absmax_N: Tensor) -> QuantizedTensor:
    _require_finite(absmax_N)
    if layout.format is not None and layout.format.is_float:
        scale_N = absmax_N / torch.finfo(torch.float8_e4m3fn).max
        q_NK = w_NK.float() / _divisor(scale_N).unsqueeze(1)
        return QuantizedTensor(layout, q_NK.to(torch.float8_e4m3fn), scale_N)
    scale_N = absmax_N / 127
    q_NK = (w_NK.float() / _divisor(scale_N).unsqueeze(1)).round_().clamp_(-127, 127)
    return QuantizedTensor(layout, q_NK.to(torch.int8), scale_N)


def _grouped(w_NC: Tensor, size: int) -> list[Tensor]:
    """w as [N, G, S] pieces: the full groups, then the short last one (each only where there is one)."""
    n, columns = w_NC.shape
    full = columns // size * size
    pieces = [w_NC[:, :full].reshape(n, full // size, size)] if full else []
    return pieces if full == columns else [*pieces, w_NC[:, full:].unsqueeze(1)]


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _group_values(w_NGS: Tensor, form: WeightFormat) -> tuple[Tensor, Tensor, Tensor]:
    """(values [N, G*S], int8 or uint8; scale fp16 [N, G]; offset fp16 [N, G]) of whole groups."""
    low_NG, high_NG = w_NGS.amin(dim=2), w_NGS.amax(dim=2)
    if form.asymmetric:
        offset_NG = low_NG.half()
        scale_NG = ((high_NG - low_NG) / 15).half()
        q_NGS = (w_NGS - offset_NG.float().unsqueeze(2)) / _divisor(scale_NG.float()).unsqueeze(2)
        return q_NGS.round_().clamp_(0, 15).to(torch.uint8).flatten(1), scale_NG, offset_NG
    extreme_NG = torch.where(high_NG >= -low_NG, high_NG, low_NG)
    scale_NG = (extreme_NG.abs() / 127 if form.bits == 8 else extreme_NG / -8).half()
    q_NGS = (w_NGS / _divisor(scale_NG.float()).unsqueeze(2)).round_()
    if form.bits == 8:
        q_NGS = q_NGS.clamp_(-127, 127).to(torch.int8)
    else:
        q_NGS = q_NGS.add_(8).clamp_(0, 15).to(torch.uint8)
    return q_NGS.flatten(1), scale_NG, torch.zeros_like(scale_NG)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is 0 (all values are 0, or too small for it, and round to 0)."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _require_finite(scales: Tensor) -> None:
    if not bool(torch.isfinite(scales).all()):
        limit = torch.finfo(scales.dtype).max
        raise CheckpointError(
            f"a value is not finite, or needs a quantisation scale beyond {limit:.3g}, the limit of "
            f"{str(scales.dtype).removeprefix('torch.')}; use --quant none, or repair the weights"
        )
