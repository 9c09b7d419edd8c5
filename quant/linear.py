"""QuantLinear: a linear layer whose weight stays quantised, on the weight-only kernels.

The module holds what `kernels.linear.prepare` made of the weight as buffers, so that `.to(device)` and
the accounting of bytes see it, and calls the kernel through an op torch.compile can trace. It is a
single-device layer: sharding wraps it where the weight is a rank's part.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..kernels.linear import prepare, weight_only_linear
from .tensor import QuantizedTensor


class QuantLinear(nn.Module):
    """y = x W^T + bias with W quantised.

    weight: the canonical quantised weight, [out_features, in_features] as held here; it is packed for
    the kernel and not kept. bias: floating point [out_features] or None. backend: "auto" or "reference".
    """

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None, *, backend: str = "auto") -> None:
        super().__init__()
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
        self.out_features, self.in_features, self.format = n, k, weight.format
        self._prepared = replace(prepared, tensors=())
        self._buffer_names = [f"packed_{i}" for i in range(len(prepared.tensors))]
        for name, tensor in zip(self._buffer_names, prepared.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.bias: Tensor | None
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features], fp32, bf16 or fp16. Returns [..., out_features] in x's dtype."""
        tensors = tuple(getattr(self, name) for name in self._buffer_names)
        y = weight_only_linear(x, replace(self._prepared, tensors=tensors))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"format={self.format.name}, kernel={self._prepared.kind}"
        )
