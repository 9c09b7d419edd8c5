"""QuantLinear and QuantEmbedding against the reference, eager and compiled."""

from __future__ import annotations

import pytest
import torch

from tp_runtime.layout import WeightFormat, WeightLayout, weight_format
from tp_runtime.quant import reference
from tp_runtime.quant.embedding import QuantEmbedding
from tp_runtime.quant.linear import QuantLinear
from tp_runtime.quant.rounding import quantize
from tp_runtime.quant.tensor import QuantizedTensor

FORMATS = [
    weight_format("int8"),
    weight_format("int8-g32"),
    weight_format("int4-g32"),
    weight_format("int4-g64", asymmetric=True),
    weight_format("int4-g128"),
]
each_format = pytest.mark.parametrize(
    "form", FORMATS, ids=lambda form: f"{form.name}{'-asym' * form.asymmetric}"
)


def made_weight(form: WeightFormat, n: int = 48, k: int = 192) -> QuantizedTensor:
    """The right part of a wider weight: it begins inside a group wherever there are groups."""
    w_NK = torch.randn(n, k, generator=torch.Generator().manual_seed(5))
    layout = WeightLayout((n, k + 16), (0, n), (16, k + 16), form)
    covering = torch.cat((w_NK[:, :16], w_NK), dim=1)
    return quantize(covering if form.group_size is not None else w_NK, layout)


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_linear_equals_the_reference(form: WeightFormat, dtype: torch.dtype, rows: int) -> None:
    weight = made_weight(form)
    bias = torch.randn(48, dtype=dtype)
    x = torch.randn(2, rows, 192, dtype=dtype)
    expected = reference.linear(x, weight) + bias
    found = QuantLinear(weight, bias)(x)
    error = (found - expected).abs().float()
    print(f"{form.name}: largest error {error.max():.2e}, mean {error.mean():.2e}")
    # fp32: sums of 192 products in another order, and x to 8 bits where a kernel does that (a step of
    # 0.03, 192 times at random). bf16: the result's own rounding, 2^-8 of values up to 60.
    assert error.max() < (0.5 if dtype is torch.bfloat16 else 0.15)
    assert found.dtype is dtype


@each_format
def test_linear_compiles_in_one_graph(form: WeightFormat) -> None:
    layer = QuantLinear(made_weight(form))
    x = torch.randn(2, 192)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


@each_format
def test_reference_backend_is_the_reference(form: WeightFormat) -> None:
    weight = made_weight(form)
    x = torch.randn(3, 192)
    assert torch.equal(QuantLinear(weight, backend="reference")(x), reference.linear(x, weight))


@each_format
def test_buffers_are_the_weight_and_move_with_the_module(form: WeightFormat) -> None:
    layer = QuantLinear(made_weight(form))
    assert not list(layer.parameters()) and not layer.state_dict()
    moved = layer.to("meta")
    assert all(buffer.device.type == "meta" for buffer in moved.buffers())
    assert moved(torch.randn(1, 192, device="meta")).shape == (1, 48)


@each_format
def test_embedding_equals_the_reference(form: WeightFormat) -> None:
    weight = made_weight(form)
    ids = torch.tensor([[0, 47, 3], [5, 5, 1]])
    found = QuantEmbedding(weight, torch.float32)(ids)
    assert torch.equal(found, reference.dequantize(weight)[ids])
    assert QuantEmbedding(weight, torch.bfloat16)(ids).dtype is torch.bfloat16
