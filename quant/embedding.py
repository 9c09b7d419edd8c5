"""QuantEmbedding: a token embedding whose table stays quantised.

A step looks up a few rows of a table that is read nowhere else, so they are dequantised in plain PyTorch.
It keeps the canonical values, not a copy: a head tied to the embedding may share them.

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.reference import dequantize
from .tensor import QuantizedTensor


class QuantEmbedding(nn.Module):
    """ids -> rows of the table, in `dtype`.

    weight: quantised [num_embeddings, embedding_dim] as held here. dtype: of the result.
    """

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.layout.local_shape
        self.format, self.head, self.dtype = weight.format, weight.layout.head, dtype
        self.q: Tensor
        self.scale: Tensor
        self.offset: Tensor | None
        self.register_buffer("q", weight.q, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("offset", weight.offset, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers [...], each below num_embeddings. Returns [..., embedding_dim]."""
        flat = ids.reshape(-1)
        rows_TH = dequantize(
            self.q[flat],
            self.scale[flat],
            None if self.offset is None else self.offset[flat],
            bits=self.format.bits,
            group_size=self.format.group_size or 0,
            head=self.head,
            k=self.embedding_dim,
        )
        return rows_TH.to(self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format.name}"
