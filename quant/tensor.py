"""One quantised weight, or a rank's part of it, in canonical form: what every kernel packs from.

Logical shape [n, k] = layout.local_shape. Stored:
- 8 bits: q int8 [n, k], or float8_e4m3fn for fp8.
- 4 bits: q uint8 [n, ceil(k/2)], local column 2j in the low nibble of byte j, 2j+1 in the high one; a missing
  last column is 0.
- per channel (int8, fp8): scale fp32 [n], w = scale * q.
- per group: scale fp16 [n, G] for the G groups of the whole weight that the part touches
  (layout.groups; local column j belongs to group (layout.head + j) // group_size), offset likewise or
  None. int8: w = scale * q. int4: w = scale * (q - 8), or with offsets w = scale * q + offset.
A part that begins inside a group keeps that group's scale, and so does its left neighbour.

Legend: N output rows, K input columns, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import WeightFormat, WeightLayout


def pack_nibbles(q_NK: Tensor) -> Tensor:
    """uint8 [N, K] in 0..15 -> uint8 [N, ceil(K/2)]: column 2j low, 2j+1 high, a missing last one 0.

    The inverse of kernels.reference.unpack_nibbles.
    """
    if q_NK.shape[1] % 2:
        q_NK = torch.nn.functional.pad(q_NK, (0, 1))
    return q_NK[:, 0::2] | (q_NK[:, 1::2] << 4)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Values, scales and offsets of the part of a weight that `layout` describes (see the module)."""

    layout: WeightLayout
    q: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        (n, k), form = self.layout.local_shape, self.format
        width = k if form.bits == 8 else (k + 1) // 2
        assert self.q.shape == (n, width), f"q is {tuple(self.q.shape)} for {self.layout}"
        g0, g1 = self.layout.groups
        scales = (n,) if form.group_size is None else (n, g1 - g0)
        assert self.scale.shape == scales, f"scale is {tuple(self.scale.shape)} for {self.layout}"
        assert (self.offset is not None) == form.asymmetric, f"offsets do not fit {self.layout}"
        assert self.offset is None or self.offset.shape == scales, f"offset does not fit {self.layout}"

    @classmethod
    def empty(cls, layout: WeightLayout, device: torch.device | str = "cpu") -> QuantizedTensor:
        """Uninitialised storage for `layout`, to be filled row by row."""
        form = layout.format
        assert form is not None, "a plain weight has no quantised form"
        (n, k), (g0, g1) = layout.local_shape, layout.groups
        eight_bits = torch.float8_e4m3fn if form.is_float else torch.int8
        q_shape, q_dtype = ((n, k), eight_bits) if form.bits == 8 else ((n, (k + 1) // 2), torch.uint8)
        scale_shape = (n,) if form.group_size is None else (n, g1 - g0)
        scale_dtype = torch.float32 if form.group_size is None else torch.float16
        scale = torch.empty(scale_shape, dtype=scale_dtype, device=device)
        return cls(
            layout,
            torch.empty(q_shape, dtype=q_dtype, device=device),
            scale,
            torch.empty_like(scale) if form.asymmetric else None,
        )

    @property
    def format(self) -> WeightFormat:
        """How the values are stored."""
        assert self.layout.format is not None, "a plain weight has no quantised form"
        return self.layout.format

    @property
    def nbytes(self) -> int:
        """Bytes held: values, scales and offsets."""
        return self.q.nbytes + self.scale.nbytes + (0 if self.offset is None else self.offset.nbytes)

    def put_rows(self, start: int, part: QuantizedTensor) -> None:
        """Copy `part` (the same columns, fewer rows) over the rows from `start` on."""
        stop = start + part.q.shape[0]
        self.q[start:stop].copy_(part.q)
        self.scale[start:stop].copy_(part.scale)
        if self.offset is not None and part.offset is not None:
            self.offset[start:stop].copy_(part.offset)
