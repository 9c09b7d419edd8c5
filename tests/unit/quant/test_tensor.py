"""The canonical form: nibbles, storage, and its bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tp_runtime.kernels.reference import unpack_nibbles
from tp_runtime.layout import WeightFormat, WeightLayout, weight_format
from tp_runtime.quant.tensor import QuantizedTensor, pack_nibbles

FORMATS = [weight_format("int8"), weight_format("int8-g32"), weight_format("int4-g64", asymmetric=True)]


@given(n=st.integers(0, 4), k=st.integers(0, 9))
def test_nibbles_come_back(n: int, k: int) -> None:
    q_NK = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    packed = pack_nibbles(q_NK)
    assert packed.shape == (n, (k + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, k), q_NK)


def test_nibbles_by_hand() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 15]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_storage_is_what_the_layout_says(form: WeightFormat) -> None:
    layout = WeightLayout((8, 200), (2, 7), (37, 150), form)
    weight = QuantizedTensor.empty(layout)
    assert weight.nbytes == layout.weight_bytes(dtype_bytes=2)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_rows_are_put_in_place(form: WeightFormat) -> None:
    whole = QuantizedTensor.empty(WeightLayout((4, 70), (0, 4), (0, 70), form))
    for tensor in (whole.q, whole.scale, whole.offset):
        if tensor is not None:
            tensor.zero_()
    part = QuantizedTensor.empty(WeightLayout((4, 70), (1, 3), (0, 70), form))
    for tensor in (part.q, part.scale, part.offset):
        if tensor is not None:
            tensor.fill_(3)
    whole.put_rows(1, part)
    for tensor in (whole.q, whole.scale, whole.offset):
        if tensor is not None:
            assert tensor.reshape(4, -1)[:, 0].tolist() == [0, 3, 3, 0]
