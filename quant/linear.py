"""QuantLinear: a linear layer whose weight stays quantised, on the weight-only kernels.

A single-device layer that goes through ops torch.compile can trace; sharding wraps it where the weight is
a rank's part.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..kernels.linear import PreparedLinear, prepare
from .tensor import QuantizedTensor


class QuantLinear(PreparedLinear):
    """y = x W^T + bias with W quantised.

    weight: the canonical quantised weight, [out_features, in_features] as held here; it is packed for
    the kernel and not kept. bias: floating point [out_features] or None. backend: "auto" or "reference".
    round_activations: bf16's precision is enough for fp32 activations (kernels.linear.PreparedWeight).
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        backend: str = "auto",
        round_activations: bool = False,
    ) -> None:
        n, k = weight.layout.local_shape
        prepared = prepare(
            weight.q,
            weight.scale,
            weight.offset,
            bits=weight.format.bits,
            group_size=weight.format.group_size or 0,
            head=weight.layout.head,
            n=n,
            k=k,
            backend=backend,
        )
        super().__init__(replace(prepared, round_activations=round_activations), bias)
        self.format = weight.format

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"
