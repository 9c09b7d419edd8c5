"""Rounding against its slow twin, against GGML's, and pieces against the whole."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_runtime.errors import CheckpointError
from tp_runtime.kernels.reference import unpack_nibbles
from tp_runtime.layout import WeightFormat, WeightLayout, weight_format
from tp_runtime.quant import reference
from tp_runtime.quant.rounding import quantize, row_absmax
from tp_runtime.quant.tensor import QuantizedTensor

FORMATS = [
    weight_format(name, asymmetric=asymmetric)
    for name in ("int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128")
    for asymmetric in (False, True)
    if not (asymmetric and name.startswith("int8"))
]
IDS = [f"{form.name}{'-asym' * form.asymmetric}" for form in FORMATS]
each_format = pytest.mark.parametrize("form", FORMATS, ids=IDS)


def unpacked(weight: QuantizedTensor) -> torch.Tensor:
    k = weight.layout.local_shape[1]
    return (weight.q if weight.format.bits == 8 else unpack_nibbles(weight.q, k)).to(torch.int16)


def rounded_part(w_NK: torch.Tensor, layout: WeightLayout) -> QuantizedTensor:
    """`layout`'s part as a rank would make it: from the covering columns, or with the whole row's absmax."""
    (n0, n1), (k0, k1) = layout.rows, layout.cols
    if layout.format is not None and layout.format.group_size is None:
        return quantize(w_NK[n0:n1, k0:k1], layout, row_absmax(w_NK)[n0:n1])
    c0, c1 = layout.covering_cols
    return quantize(w_NK[n0:n1, c0:c1], layout)


@each_format
@pytest.mark.parametrize("k", [1, 31, 32, 136, 256])
def test_equals_the_slow_twin(form: WeightFormat, k: int) -> None:
    w_NK = torch.randn(6, k, generator=torch.Generator().manual_seed(k))
    w_NK[2] = 0
    w_NK[3] *= 1e-7  # scales that vanish in fp16
    fast = quantize(w_NK, WeightLayout.whole((6, k), form))
    q, scale, offset = reference.round_weight(w_NK, form)
    assert torch.equal(unpacked(fast), q)
    assert torch.equal(fast.scale, scale)
    assert (fast.offset is None) == (offset is None) and (offset is None or torch.equal(fast.offset, offset))


@each_format
def test_error_is_at_most_half_a_step(form: WeightFormat) -> None:
    w_NK = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
    weight = quantize(w_NK, WeightLayout.whole((64, 300), form))
    error = (reference.dequantize(weight) - w_NK).abs()
    group_of_K = torch.arange(300) // weight.layout.group_size
    step = weight.scale.float().abs()
    step_NK = step.unsqueeze(1) if step.dim() == 1 else step[:, group_of_K]
    # Symmetric int4 has 7 steps above zero and 8 below: a value near the far end is cut by up to one step.
    allowed = 1.01 if form.bits == 4 and not form.asymmetric else 0.51
    print(f"{form.name}: largest error {error.max():.4f}, mean {error.mean():.5f}, step {step.mean():.4f}")
    assert bool((error <= allowed * step_NK + 1e-6).all())


@pytest.mark.parametrize(("ours", "theirs"), [("int8-g32", "Q8_0"), ("int4-g32", "Q4_0"), ("asym", "Q4_1")])
def test_error_is_no_larger_than_ggmls(ours: str, theirs: str) -> None:
    form = weight_format("int4-g32", asymmetric=True) if ours == "asym" else weight_format(ours)
    w_NK = torch.randn(128, 512, generator=torch.Generator().manual_seed(2)) * 0.02
    kind = gguf.GGMLQuantizationType[theirs]
    reference_NK = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w_NK.numpy(), kind), kind))
    weight = quantize(w_NK, WeightLayout.whole((128, 512), form))
    mine, ggml = ((w - w_NK).square().mean().sqrt() for w in (reference.dequantize(weight), reference_NK))
    print(f"{theirs}: rms error {mine:.3e} here, {ggml:.3e} in GGML")
    assert mine <= ggml * 1.0001


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_cut_equals_the_whole(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMATS))
    n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 300))
    k0 = data.draw(st.integers(0, k))
    layout = WeightLayout((n, k), (0, n), (k0, data.draw(st.integers(k0, k))), form)
    w_NK = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k)).to(torch.bfloat16)
    whole, part = quantize(w_NK, WeightLayout.whole((n, k), form)), rounded_part(w_NK, layout)
    assert torch.equal(unpacked(part), unpacked(whole)[:, k0 : layout.cols[1]])
    groups = slice(None) if form.group_size is None else slice(*layout.groups)
    assert torch.equal(part.scale, whole.scale if form.group_size is None else whole.scale[:, groups])
    if part.offset is not None and whole.offset is not None:
        assert torch.equal(part.offset, whole.offset[:, groups])
    whole_NK = reference.dequantize(whole)[:, k0 : layout.cols[1]]
    assert torch.equal(reference.dequantize(part), whole_NK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_format
def test_values_that_are_not_finite_are_refused(form: WeightFormat, bad: float) -> None:
    w_NK = torch.ones(3, 40)
    w_NK[1, 7] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        quantize(w_NK, WeightLayout.whole((3, 40), form))


def test_values_beyond_fp16_scales_are_refused() -> None:
    with pytest.raises(CheckpointError, match="6.55e"):
        quantize(torch.full((1, 32), 1e7), WeightLayout.whole((1, 32), weight_format("int4")))


def test_nan_of_one_rank_reaches_all_through_max() -> None:
    w_NK = torch.tensor([[1.0, float("nan")], [2.0, -3.0]])
    assert row_absmax(w_NK).tolist() == [float("inf"), 3.0]
    assert row_absmax(w_NK[:, :0]).tolist() == [0.0, 0.0]
