"""A quantised linear that can still be divided over ranks: it keeps its canonical values beside the packed.

Kernels pack a weight in an order of their own, which cannot be cut. A model that is quantised before it is
sharded therefore holds its weights twice, until `shard` has replaced each by its part.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, cat, nn

from ..kernels.reference import unpack_nibbles
from ..layout import WeightLayout
from .linear import QuantLinear
from .reference import dequantize
from .tensor import QuantizedTensor, pack_nibbles

Ranges = tuple[tuple[int, int], ...]


class DivisibleQuantLinear(QuantLinear):
    """A QuantLinear of a whole weight, and that weight."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self.canonical = weight

    def dense(self) -> nn.Linear:
        """A plain linear with the same values, fp32."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(dequantize(self.canonical), requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.float(), requires_grad=False)
        return made

    def divided(self, dim: int, ranges: Ranges) -> QuantLinear:
        """The linear of `ranges` of dim `dim` (0: outputs, 1: inputs, one range), with the whole bias.

        Its values are those of the whole weight, whose groups it keeps. Raises ValueError for several
        ranges of inputs.
        """
        whole, k = self.canonical, self.canonical.layout.shape[1]
        if dim == 0:
            rows = [slice(start, stop) for start, stop in ranges]
            held = sum(stop - start for start, stop in ranges)
            parts = [None if t is None else _joined(t, rows) for t in (whole.q, whole.scale, whole.offset)]
            layout = WeightLayout.whole((held, k), whole.format)
        else:
            if len(ranges) != 1:
                raise ValueError(f"{len(ranges)} ranges of input columns; a quantised weight takes one")
            layout = replace(whole.layout, cols=ranges[0])
            g0, g1 = layout.groups
            scales = [whole.scale, whole.offset]
            if whole.format.group_size is not None:
                scales = [None if t is None else t[:, g0:g1].contiguous() for t in scales]
            parts = [_columns(whole, *ranges[0]), *scales]
        q, scale, offset = parts
        assert q is not None and scale is not None, "a quantised weight has values and scales"
        return QuantLinear(QuantizedTensor(layout, q, scale, offset), self.bias)


def _joined(tensor: Tensor, rows: list[slice]) -> Tensor:
    return cat([tensor[part] for part in rows])


def _columns(whole: QuantizedTensor, start: int, stop: int) -> Tensor:
    if whole.format.bits == 8:
        return whole.q[:, start:stop].contiguous()
    return pack_nibbles(unpack_nibbles(whole.q, whole.layout.shape[1])[:, start:stop])
